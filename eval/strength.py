"""`python -m eval.strength`: the β at which a concept looks like itself and still does what prompts say."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from omegaconf import MISSING

from perfusion.cli import parse_key_values, run_cli
from perfusion.files import atomic_write_text
from perfusion.strength import GRID, STEPS, best, measure, table

USAGE = """
Usage: python -m eval.strength concept=<file> [key=value ...]

Draws the validation prompts at each β of a grid and scores the pictures: CLIP-I against pictures of the concept, CLIP-T
against the prompts. The β with the best harmonic mean is the one that `python -m perfusion.generate beta=auto` takes.
"""


@dataclass
class StrengthConfig:
    """The options of `python -m eval.strength`."""

    concept: str = MISSING  # concept file, or hub:owner/name
    references: Any = None  # pictures of the concept; null: those that it was trained on, as its run folder names them
    grid: list[float] = field(default_factory=lambda: list(GRID))  # values of β
    scorer: str | None = None  # toyland, an open_clip name, or a folder; null: Toyland's own on Toyland
    pretrained: str | None = None  # the scorer's weights: a file or a tag
    backbone: str | None = None  # toyland, sd15, ...; null: the kind that the concept was trained on
    path: str | None = None  # backbone's folder, .safetensors file or hub id; null: what it ships
    layout: str | None = None  # configs of a .safetensors file: known layout or diffusers folder; null: as it looks
    dtype: str = "float32"  # float32, float16 or bfloat16
    device: str = "auto"  # auto: cuda, then mps, then cpu
    steps: int = STEPS  # denoising steps of a sample
    seed: int = 0  # of the first prompt's sample; the others follow on
    out: str | None = None  # JSON file for the scores; null: none


def main(argv: Sequence[str]) -> None:
    """Command line entry point."""
    config = parse_key_values(argv, StrengthConfig, USAGE)
    # Torch and its friends take seconds to import: `--help` and a mistyped key do without them.
    from perfusion.backbones import load_backbone
    from perfusion.concept import Concept
    from perfusion.hub import named_file

    concept = Concept.load(named_file(config.concept))
    with concept.attach(load_backbone(config, default=concept.family)) as attached:
        found = measure(
            attached, config.references, config.grid, config.scorer, config.pretrained, config.steps, config.seed
        )
    print(table(found))
    if config.out:
        content = {"best": best(found).beta, "strengths": [asdict(strength) for strength in found]}
        atomic_write_text(Path(config.out).expanduser(), json.dumps(content, indent=2) + "\n")


if __name__ == "__main__":
    sys.exit(run_cli(main))
