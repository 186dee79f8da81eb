"""`python -m perfusion.toyland.build.atlas`: a picture of all that exists in Toyland's world."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from PIL import Image

from perfusion.cli import parse_key_values, run_cli
from perfusion.contact_sheet import captioned_sheet
from perfusion.files import atomic_path
from perfusion.toyland.draw import render
from perfusion.toyland.world import (
    PATTERNS,
    PLACES,
    RELATIONS,
    STYLES,
    SUPERCLASSES,
    SUPPORTS,
    WORN,
    Scene,
    concept_scene,
    sample_instance,
    sample_scene,
)

USAGE = """
Draw the atlas of Toyland's world: every superclass, place, worn thing, support, pattern and style.

  python -m perfusion.toyland.build.atlas out=world.png
"""
_COLUMNS = 10


@dataclass
class AtlasConfig:
    """Command line of the atlas."""

    out: str = "world.png"  # PNG file
    seed: int = 16  # of the instance that is shown everywhere


def rows(seed: int) -> list[tuple[str, list[Scene]]]:
    """Captions and scenes, at most ten each. One cat of `seed` goes through everything that can happen to it."""
    cat = sample_instance(np.random.default_rng(seed), "cat", pattern="patched")
    others = [sample_instance(np.random.default_rng(seed + i), kind) for i, kind in enumerate(SUPERCLASSES)]
    two = [sample_scene(seed + i, objects=2, relation=RELATIONS[i % 2], style="photo") for i in range(6)]
    return [
        (f"superclasses: {', '.join(SUPERCLASSES)}", [concept_scene(toy, seed) for toy in others]),
        ("ten cats", [concept_scene(sample_instance(np.random.default_rng(i), "cat"), i) for i in range(10)]),
        (f"places: {', '.join(PLACES)}", [concept_scene(cat, seed, place=place) for place in PLACES]),
        (
            f"worn: {', '.join(WORN[1:])}; on or in: {', '.join(SUPPORTS[1:])}",
            [concept_scene(cat, seed, worn=worn) for worn in WORN[1:]]
            + [concept_scene(cat, seed, support=support) for support in SUPPORTS[1:]],
        ),
        (
            f"patterns: {', '.join(PATTERNS)}; styles: {', '.join(STYLES)}",
            [concept_scene(replace(cat, pattern=pattern), seed) for pattern in PATTERNS]
            + [concept_scene(cat, seed, place="forest", style=style) for style in STYLES],
        ),
        ("two objects", two),
    ]


def atlas(seed: int) -> Image.Image:
    """The picture of `rows`."""
    drawn = [(caption, [Image.fromarray(render(s).image) for s in scenes]) for caption, scenes in rows(seed)]
    return captioned_sheet(drawn, _COLUMNS)


def main(argv: Sequence[str]) -> None:
    """Command line entry point."""
    config = parse_key_values(argv, AtlasConfig, USAGE)
    path = Path(config.out).expanduser()
    with atomic_path(path) as temporary:
        atlas(config.seed).save(temporary, "PNG", optimize=True)
    print(f"written to {path}")


if __name__ == "__main__":
    sys.exit(run_cli(main))
