"""How far attaching a concept moves the pictures of prompts that do not name it."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image

from eval.folders import ImageFolder
from eval.record import ScoreError
from eval.scorers import Embedder
from perfusion.manifest import ImageRecord


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
