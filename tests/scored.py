"""Folders of pictures, and made-up scores, for the tests of eval."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from eval.record import Picture, Point, write_scores
from perfusion.manifest import ImageRecord, write_manifest

SIDE = 32


def noise(seed: int, side: int = SIDE) -> Image.Image:
    """A picture that differs for every seed."""
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (side, side, 3), dtype=np.uint8))


def record(file: str, prompt: str = "a photo of <cat*>", seed: int | None = 0, **known: Any) -> ImageRecord:
    """A picture of the concept `cat`, unless `known` says otherwise; what is no field is a dial."""
    cat = {"concept": "cat", "placeholder": "<cat*>", "superclass": "cat", "method": "perfusion"}
    fields = {field.name for field in dataclasses.fields(ImageRecord)}
    dials = {name: value for name, value in known.items() if name not in fields and value is not None}
    known = {name: value for name, value in known.items() if name in fields}
    return ImageRecord(file, prompt, seed, **{**cat, **known}, dials=dials)


def folder(path: Path, records: Iterable[ImageRecord], first: int = 0) -> Path:
    """A folder with these pictures, noise from the seed `first` on, and their manifest."""
    path.mkdir(parents=True)
    records = list(records)
    for k, one in enumerate(records):
        noise(first + k).save(path / one.file)
    write_manifest(path, records)
    return path


def made_up(folder: Path, methods: dict[str, list[float | None]], concepts: Iterable[str] = ("cat", "dog")) -> Path:
    """A record of scores of small pictures, with two prompts and two seeds for each point; returns its file.

    Methods map to their β. The higher β, the higher CLIP-T and the lower CLIP-I.
    """
    (folder / "pictures").mkdir(parents=True)
    rng = np.random.default_rng(0)
    points = []
    for m, (method, betas) in enumerate(methods.items()):
        for beta in betas:
            for concept in concepts:
                pictures = []
                for prompt in (f"a <{concept}*> on the beach", f"a sketch of a <{concept}*> & </script>"):
                    for seed in (0, 1):
                        file = folder / "pictures" / f"{method}-{beta}-{concept}-{len(pictures)}.png"
                        noise(len(points) * 10 + seed, 16).save(file)
                        strength = 0.5 if beta is None else beta
                        scores = {
                            "clip_i": 0.9 - 0.4 * strength - 0.05 * m + 0.02 * rng.random(),
                            "clip_t": 0.2 + 0.1 * strength - 0.01 * m + 0.02 * rng.random(),
                        }
                        pictures.append(Picture(file, prompt, seed, "0" * 12, scores))
                setting = {"steps": 50} if beta is None else {"beta": beta, "steps": 50}
                points.append(Point(method, concept, setting, tuple(pictures), ((0, 1, 0.3), (2, 3, 0.1))))
    document = {
        "made_with": {"clip": "tiny", "versions": {"torch": "1"}, "git_commit": None},
        "scorer": {"clip": "0123"},
        "references": {},
    }
    write_scores(folder / "scores.json", document, [(point, {}) for point in points])
    return folder / "scores.json"
