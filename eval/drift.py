"""`python -m eval.drift`: how far attaching a concept moves the pictures of prompts that do not name it."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from omegaconf import MISSING

from eval.aggregate import RESAMPLES, Bootstrap, as_json, interval_of, prompt_scores
from eval.folders import ImageFolder, Said, find_folders, read_folder, setting_of, shows_concept
from eval.scores import Picture, Point, ScoreError, merged
from perfusion.cli import parse_key_values, run_cli
from perfusion.files import atomic_write_text
from perfusion.manifest import ImageRecord

# Torch and its friends take seconds to import: `--help` and a mistyped key do without them.
if TYPE_CHECKING:
    from PIL import Image

    from eval.scorers import Embedder

USAGE = """
Usage: python -m eval.drift base=<folder> images=<folder> [key=value ...]

Compares pictures of prompts without the concept, drawn with it attached, with those that the base model alone draws for
the same prompts and seeds: 1 - cosine of their CLIP embeddings, and the mean squared difference of their pixels on
[0, 1]. Both folders have a manifest. `python -m eval.score ... base=<folder>` puts the same numbers into its table.
"""
_AT_ONCE = 64  # pairs of pictures in memory


@dataclass
class DriftConfig:
    """The options of `python -m eval.drift`."""

    base: str = MISSING  # folder with the base model's pictures
    images: Any = MISSING  # folder, or folders, with pictures that were drawn with the concept attached
    scorer: str | None = None  # toyland, an open_clip name, or a folder; null: Toyland's own on Toyland
    pretrained: str | None = None  # the scorer's weights: a file or a tag
    device: str = "auto"  # auto: cuda, then mps, then cpu
    out: str | None = None  # JSON file for the numbers; null: none
    resamples: int = RESAMPLES  # of the bootstrap over seeds that gives the intervals
    seed: int = 0  # of the bootstrap


class Base:
    """The base model's pictures, found by prompt and seed.

    Raises:
        ScoreError: two of the same prompt and seed.
    """

    def __init__(self, folder: ImageFolder) -> None:
        self._path = folder.path
        self._files: dict[tuple[str, int | None], Path] = {}
        for record in folder.records:
            if (record.prompt, record.seed) in self._files:
                raise ScoreError(f"base={self._path}: has two pictures of {record.prompt!r} with seed {record.seed}")
            self._files[record.prompt, record.seed] = folder.file(record)

    def file(self, record: ImageRecord) -> Path:
        """The picture of the same prompt and seed. ScoreError if there is none."""
        if (record.prompt, record.seed) not in self._files:
            raise ScoreError(f"base={self._path}: has no picture of {record.prompt!r} with seed {record.seed}")
        return self._files[record.prompt, record.seed]


def drift(
    before: Sequence[Image.Image], after: Sequence[Image.Image], scorer: Embedder
) -> tuple[np.ndarray, np.ndarray]:
    """How much n pictures changed: 1 − cosine of their embeddings, and the mean squared difference of their pixels on
    [0, 1]; both float64 (n,).

    Raises:
        ScoreError: a picture changed its size.
    """
    assert len(before) == len(after) > 0
    squares = []
    for old, new in zip(before, after, strict=True):
        if old.size != new.size:
            raise ScoreError(f"drift: found pictures of {old.size} and {new.size} pixels, expected the same size")
        a, b = (np.asarray(image.convert("RGB"), np.float64) / 255 for image in (old, new))
        squares.append(float(np.square(a - b).mean()))
    first, second = (scorer.image_embeddings(list(images)).double().cpu().numpy() for images in (before, after))
    return 1 - (first * second).sum(1), np.array(squares)


def drift_points(base: Base, folders: Iterable[ImageFolder], scorer: Embedder) -> list[Point]:
    """The drift of all pictures whose prompt names no concept, as far as is known.

    Raises:
        ScoreError: the base model has no picture of a prompt and seed.
        ConceptImageError: a picture cannot be read.
    """
    from perfusion.data.images import read_image

    found = []
    for folder in folders:
        records = [r for r in folder.records if r.placeholder is None or not shows_concept(r)]
        pairs = [(base.file(record), folder.file(record)) for record in records]
        for start in range(0, len(records), _AT_ONCE):
            part = pairs[start : start + _AT_ONCE]
            before, after = ([read_image(pair[k]) for pair in part] for k in (0, 1))
            for record, cosine, square in zip(records[start:], *drift(before, after, scorer), strict=False):
                scores = {"drift": float(cosine), "drift_mse": float(square)}
                file = folder.file(record).resolve()
                picture = Picture(file, record.prompt, record.seed, record.concept_hash, scores)
                assert record.method and record.concept
                found.append(Point(record.method, record.concept, setting_of(record), (picture,)))
    return merged(found)


def main(argv: Sequence[str]) -> None:
    """Command line entry point."""
    config = parse_key_values(argv, DriftConfig, USAGE)
    bootstrap = Bootstrap(config.resamples, config.seed)
    base = Base(read_folder(Path(config.base).expanduser(), Said(concept="none")))
    folders = [read_folder(path, Said(concept="unnamed")) for path in find_folders(config.images)]
    from eval.scorers import clip_scorer

    points = drift_points(base, folders, clip_scorer(config.scorer, config.pretrained, config.device, folders))
    if not points:
        raise ScoreError(f"images={config.images}: every prompt names the concept, expected some that do not")
    rows = []
    for point in points:
        scores = interval_of(point, bootstrap)
        said = {"method": point.method, "concept": point.concept, "setting": dict(point.setting)}
        prompts = prompt_scores(point)
        rows.append({**said, "images": len(point.pictures), "scores": as_json(scores), "prompts": prompts})
        shown = ", ".join(f"{name} {interval.mean:.4f}" for name, interval in scores.items())
        print(f"{point.method}, {point.concept}, {len(point.pictures)} pictures: {shown}")
    if config.out:
        atomic_write_text(Path(config.out).expanduser(), json.dumps(rows, indent=2, ensure_ascii=False) + "\n")


if __name__ == "__main__":
    sys.exit(run_cli(main))
