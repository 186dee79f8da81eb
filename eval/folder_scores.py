"""The scores of all pictures of one folder, kept until a picture or a scorer changes."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from tqdm import tqdm

from eval.folders import (
    Base,
    ImageFolder,
    References,
    Target,
    parts,
    plain_prompt,
    same_prompt,
    setting_of,
    shows_concept,
)
from eval.record import Picture, Point, ScoreError
from eval.scorers import Embedder, Scorers
from perfusion.data.images import read_image
from perfusion.files import atomic_write_text
from perfusion.manifest import ImageRecord
from perfusion.scoring.clip import ScorerError
from perfusion.scoring.metrics import TEXT_SCALE
from perfusion.toyland.captions import CaptionError, parse
from perfusion.toyland.judge import Wish, judge
from perfusion.toyland.world import SUPERCLASSES, Instance, sample_instance

VERSION = 1  # changes when the scores of the same picture do
_AT_ONCE = 64  # pictures in memory


@dataclass(frozen=True)
class FolderScores:
    """The scores of each picture of a folder, and distances between pictures of one prompt."""

    scores: tuple[dict[str, float], ...]
    pairs: tuple[tuple[int, int, float], ...]


def score_folder(
    folder: ImageFolder,
    scorers: Scorers,
    references: References,
    base: Base | None = None,
    cache: Path | None = None,
    progress: bool = True,
) -> tuple[FolderScores, bool]:
    """Score a folder, or take what was kept of the same pictures; says whether it was there.

    Pictures whose prompt names no concept are held against the base model's, where there is `base`, and else not
    scored.

    Args:
        cache: folder of what is kept; None: nothing is.

    Raises:
        ScoreError: no references for a concept, no picture of the base model for a prompt.
        ConceptImageError: a picture cannot be read.
    """
    targets = [references.targets(folder, r) if shows_concept(r) else [] for r in folder.records]
    bases = [None if base is None or shows_concept(r) else base.file(r) for r in folder.records]
    file = None if cache is None else cache / f"{_key(folder, scorers, targets, bases)}.json"
    if file is not None and file.is_file() and (kept := _read(file, len(folder.records))) is not None:
        return kept, True
    found = _scored(folder, scorers, targets, bases, progress)
    if file is not None:
        file.parent.mkdir(parents=True, exist_ok=True)
        atomic_write_text(file, json.dumps({"scores": found.scores, "pairs": found.pairs}))
    return found, False


def points_of(folder: ImageFolder, found: FolderScores) -> Iterator[Point]:
    """The points that a folder's pictures belong to; pictures without any score are left out."""
    groups: dict[str, list[int]] = {}
    for i, (record, scores) in enumerate(zip(folder.records, found.scores, strict=True)):
        if scores:
            key = json.dumps([record.method, record.concept, setting_of(record)], sort_keys=True)
            groups.setdefault(key, []).append(i)
    for members in groups.values():
        place = {i: k for k, i in enumerate(members)}
        records = [folder.records[i] for i in members]
        pictures = tuple(
            Picture(folder.file(r).resolve(), r.prompt, r.seed, r.concept_hash, found.scores[i])
            for i, r in zip(members, records, strict=True)
        )
        pairs = tuple((place[i], place[j], d) for i, j, d in found.pairs if i in place and j in place)
        first = records[0]
        assert first.method and first.concept
        yield Point(first.method, first.concept, setting_of(first), pictures, pairs)


def _scored(
    folder: ImageFolder,
    scorers: Scorers,
    targets: Sequence[Sequence[Target]],
    bases: Sequence[Path | None],
    progress: bool,
) -> FolderScores:
    seen = [i for i in range(len(folder.records)) if targets[i] or bases[i]]
    embedded: dict[int, np.ndarray] = {}
    scores: list[dict[str, float]] = [{} for _ in folder.records]
    wanted = _Cosines()
    with tqdm(total=len(seen), desc=f"Scoring {folder.path.name}", unit="picture", disable=not progress) as bar:
        for start in range(0, len(seen), _AT_ONCE):
            part = seen[start : start + _AT_ONCE]
            images = [read_image(folder.file(folder.records[i])) for i in part]
            vectors = _numpy(scorers.clip.image_embeddings(images))
            for name, values in _parts(part, images, vectors, folder, scorers, targets, bases, wanted):
                for i, value in values.items():
                    scores[i][name] = value
            embedded |= {i: vectors[k] for k, i in enumerate(part) if targets[i]}
            bar.update(len(part))
    pairs = [
        (i, j, float(1 - embedded[i] @ embedded[j]))
        for i, j in same_prompt(folder.records)
        if i in embedded and j in embedded
    ]
    return FolderScores(tuple(scores), tuple(pairs))


def _parts(
    part: Sequence[int],
    images: Sequence[Image.Image],
    vectors: np.ndarray,
    folder: ImageFolder,
    scorers: Scorers,
    targets: Sequence[Sequence[Target]],
    bases: Sequence[Path | None],
    wanted: _Cosines,
) -> Iterator[tuple[str, dict[int, float]]]:
    """Each kind of score of some pictures: picture -> score."""
    shown = [k for k, i in enumerate(part) if targets[i]]
    if shown:
        texts = list(dict.fromkeys(plain_prompt(folder.records[part[k]]) for k in shown))
        rows = dict(zip(texts, _numpy(scorers.clip.text_embeddings(texts)), strict=True))
        cosines = {part[k]: float(vectors[k] @ rows[plain_prompt(folder.records[part[k]])]) for k in shown}
        yield "clip_i", {part[k]: wanted.mean("clip", scorers.clip, vectors[k], targets[part[k]]) for k in shown}
        yield "clip_t", cosines
        yield "clip_t_scaled", {i: TEXT_SCALE * max(cosine, 0.0) for i, cosine in cosines.items()}
        if (dino := scorers.dino) is not None:
            seen = _numpy(dino.image_embeddings([images[k] for k in shown]))
            yield (
                "dino",
                {part[k]: wanted.mean("dino", dino, v, targets[part[k]]) for k, v in zip(shown, seen, strict=True)},
            )
    if scorers.reader is not None:
        wishes = {k: wish for k in shown if (wish := _wish(folder.records[part[k]], targets[part[k]])) is not None}
        if wishes:
            judged = judge(scorers.reader, [images[k] for k in wishes], list(wishes.values()))
            for name in ("identity", "prompt", "superclass"):
                yield name, {part[k]: found[name] for k, found in zip(wishes, judged, strict=True) if name in found}
    if held := [k for k, i in enumerate(part) if bases[i] is not None]:
        before = [read_image(bases[part[k]]) for k in held]  # type: ignore[arg-type]
        cosine, square = drift(before, [images[k] for k in held], scorers.clip)
        yield "drift", {part[k]: float(value) for k, value in zip(held, cosine, strict=True)}
        yield "drift_mse", {part[k]: float(value) for k, value in zip(held, square, strict=True)}


class _Cosines:
    """Likeness to reference pictures: the mean cosine over all of them is the product with their mean."""

    def __init__(self) -> None:
        self._means: dict[tuple[str, str], np.ndarray] = {}

    def mean(self, kind: str, scorer: Embedder, vector: np.ndarray, targets: Sequence[Target]) -> float:
        """The mean cosine to the references of each target, and the mean over targets."""
        return float(np.mean([vector @ self._of(kind, scorer, target) for target in targets]))

    def _of(self, kind: str, scorer: Embedder, target: Target) -> np.ndarray:
        key = (kind, target.digest)
        if key not in self._means:
            self._means[key] = _numpy(scorer.image_embeddings(target.images)).mean(0)
        return self._means[key]


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


def toy(instance: int, superclass: str) -> Instance:
    """The toy of a seed, as `concept.toyland.instance` draws it. Raises ScorerError if there is no such superclass."""
    if superclass not in SUPERCLASSES:
        raise ScorerError(
            f"instance={instance}: found the superclass {superclass!r}, expected one of Toyland's: "
            f"{', '.join(SUPERCLASSES)}"
        )
    return sample_instance(np.random.default_rng(instance), superclass)


def _wish(record: ImageRecord, targets: Sequence[Target]) -> Wish | None:
    """What the attribute reader shall look for; None: the picture is not of Toyland."""
    kinds = parts(record.superclass) if record.superclass else []
    known = [(target.instance, kind) for target, kind in zip(targets, kinds, strict=False)]  # none without superclass
    toys = {kind: toy(instance, kind) for instance, kind in known if instance is not None}
    if not toys and record.backbone != "toyland":
        return None
    text = plain_prompt(record)
    try:
        parse(text)
    except CaptionError:
        if toys:
            raise
        return None
    return Wish(text, toys)


def _key(
    folder: ImageFolder, scorers: Scorers, targets: Sequence[Sequence[Target]], bases: Sequence[Path | None]
) -> str:
    """A hash over pictures, manifest, references and models."""
    content: list[Any] = [VERSION, scorers.identity]
    for record, wanted, base in zip(folder.records, targets, bases, strict=True):
        files = [_digest(file) for file in (folder.file(record), base) if file is not None]
        content.append([asdict(record), files, [[target.digest, target.instance] for target in wanted]])
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()[:32]


def _digest(file: Path) -> str:
    with open(file, "rb") as opened:
        return hashlib.file_digest(opened, "sha256").hexdigest()


def _read(file: Path, count: int) -> FolderScores | None:
    """What was kept; None if it cannot be used, so that the folder is scored anew."""
    try:
        content: Mapping[str, Any] = json.loads(file.read_text(encoding="utf-8"))
        scores = tuple({str(k): float(v) for k, v in entry.items()} for entry in content["scores"])
        pairs = tuple((int(i), int(j), float(d)) for i, j, d in content["pairs"])
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return None
    return FolderScores(scores, pairs) if len(scores) == count else None


def _numpy(vectors: Tensor) -> np.ndarray:
    return vectors.to("cpu", torch.float64).numpy()
