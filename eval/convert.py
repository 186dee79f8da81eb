"""`python -m eval.convert`: pictures in CustomConcept101's layout, described as `python -m eval.score` reads them."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from omegaconf import MISSING

from eval.record import ScoreError
from perfusion.cli import parse_key_values, run_cli
from perfusion.data.formats import SUFFIXES
from perfusion.data.images import find_images
from perfusion.data.prompts import contains
from perfusion.manifest import FILE_NAME, ImageRecord, write_manifest

SAMPLES, PROMPTS = "samples", "prompts.json"

USAGE = """
Usage: python -m eval.convert root=<folder> method=<name> concept=<name> [key=value ...]

CustomConcept101 (Kumari et al., arXiv 2212.04488) has the pictures of a method in `samples/` and beside it
`prompts.json`, an object from the name of each picture without its suffix to its prompt. Writes manifest.json beside
both; the pictures stay as they are. Several concepts in one picture: concept='cat + dog' superclass='cat + dog'
placeholder='<new1> + <new2>'
"""


@dataclass
class ConvertConfig:
    """The options of `python -m eval.convert`."""

    root: str = MISSING  # folder with samples/ and prompts.json
    method: str = MISSING  # what made the pictures
    concept: str = MISSING  # name of the concept; pictures of one concept share it
    superclass: str | None = None  # takes the placeholder's place when prompts are scored
    placeholder: str | None = None  # the word, or words, that stand for the concept in the prompts, as "<new1> cat"
    setting: str | None = None  # what sets these pictures apart from others of their method
    backbone: str | None = None  # model that drew them, as sd15
    steps: int | None = None  # denoising steps
    guidance: float | None = None  # classifier-free guidance
    overwrite: bool = False  # write over a manifest that is there


def convert(config: ConvertConfig) -> list[ImageRecord]:
    """Write the manifest of a folder in CustomConcept101's layout; returns its records.

    Raises:
        ScoreError: a part of the layout is missing, a picture has no prompt or a prompt no picture, no prompt has the
            placeholder, a manifest is there already.
        ConceptImageError: `samples` holds no picture, or a file that only its name calls one.
    """
    root = Path(config.root).expanduser()
    prompts = _prompts(root / PROMPTS)
    if not (root / SAMPLES).is_dir():
        raise ScoreError(f"root={config.root}: expected the pictures in {SAMPLES}/, found no such folder")
    if (root / FILE_NAME).exists() and not config.overwrite:
        raise ScoreError(f"{root / FILE_NAME}: is there already; overwrite=true writes over it")
    if (config.placeholder is None) != (config.superclass is None):
        raise ScoreError(
            f"found placeholder={config.placeholder} and superclass={config.superclass}, expected both or neither"
        )
    files = {file.stem: file for file in find_images(str(root / SAMPLES), key=SAMPLES)}
    for missing, text in (
        (files.keys() - prompts.keys(), f"no prompt in {PROMPTS} for the pictures"),
        (prompts.keys() - files.keys(), f"no picture ({', '.join(SUFFIXES)}) for the prompts of"),
    ):
        if missing:
            raise ScoreError(f"{root}: {text} {', '.join(sorted(missing)[:8])} ({len(missing)} in all)")
    words = [] if config.placeholder is None else config.placeholder.split(" + ")
    if words and not any(contains(prompt, word) for prompt in prompts.values() for word in words):
        raise ScoreError(f"{root / PROMPTS}: no prompt has the placeholder {config.placeholder!r}, expected it in some")
    known = {key: value for key, value in vars(config).items() if key not in ("root", "overwrite")}
    records = [ImageRecord(f"{SAMPLES}/{file.name}", prompts[stem], **known) for stem, file in files.items()]
    write_manifest(root, records)
    return records


def _prompts(file: Path) -> dict[str, str]:
    expected = "expected an object from picture names without suffix to prompts"
    if not file.is_file():
        raise ScoreError(f"{file}: no such file; {expected}")
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ScoreError(f"{file}: not readable as JSON: {error}") from error
    if not isinstance(content, dict) or not all(isinstance(prompt, str) and prompt for prompt in content.values()):
        raise ScoreError(f"{file}: {expected}")
    return content


def main(argv: Sequence[str]) -> None:
    """Command line entry point."""
    config = parse_key_values(argv, ConvertConfig, USAGE)
    records = convert(config)
    prompts = len({record.prompt for record in records})
    print(f"manifest: {Path(config.root).expanduser() / FILE_NAME} ({len(records)} pictures of {prompts} prompts)")


if __name__ == "__main__":
    sys.exit(run_cli(main))
