"""The scores of all pictures of one folder, kept until a picture or a scorer changes."""

from __future__ import annotations

import hashlib
import json
import logging
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

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
from eval.sheets import data_uri
from perfusion.bars import Bar
from perfusion.data.images import read_image
from perfusion.files import atomic_write_text
from perfusion.manifest import ImageRecord
from perfusion.provenance import provenance
from perfusion.scoring.clip import ScorerError
from perfusion.scoring.metrics import TEXT_SCALE
from perfusion.toyland.captions import CaptionError, parse
from perfusion.toyland.reader import Wish, judge
from perfusion.toyland.world import SUPERCLASSES, Instance, sample_instance

VERSION = 1  # changes when the scores of the same picture do
_AT_ONCE = 64  # pictures in memory

_log = logging.getLogger(__name__)
Means = dict[tuple[str, str], np.ndarray]  # mean embeddings of references, by the scorer's kind and their digest


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
    """Score a folder, or take what was kept of the same pictures in the folder `cache`; says whether it was there.
    Pictures whose prompt names no concept are held against the base model's, where there is `base`, and else not
    scored.

    Raises:
        ScoreError: no references for a concept, no picture of the base model for a prompt.
        ConceptImageError: a picture cannot be read.
        OSError: `cache` is no folder that can be written; nothing has been scored then.
    """
    subjects = []
    for record in folder.records:
        shown, file = shows_concept(record), folder.file(record)
        targets = references.targets(folder, record) if shown else ()
        subjects.append(_Subject(record, file, targets, None if shown or base is None else base.file(record)))
    file = None if cache is None else cache / f"{_key(subjects, scorers)}.json"
    if file is not None and file.is_file() and (kept := _read(file, len(subjects))) is not None:
        return kept, True
    if file is not None:
        file.parent.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=file.parent).close()  # that it can be written is known before it takes long
    found = _scored(folder, subjects, scorers, progress)
    if file is not None:
        try:
            atomic_write_text(file, json.dumps({"scores": found.scores, "pairs": found.pairs}))
        except OSError as error:  # a disk that is full by now costs time later, but no score
            _log.warning("%s: not kept for the next time: %s", file, error)
    return found, False


def scored_with(scorers: Scorers, references: References, count: int) -> dict[str, Any]:
    """What a record says of a scoring: the models, what made it, and the first `count` references of each concept."""
    shown = {name: [data_uri(image) for image in images[:count]] for name, images in references.shown.items()}
    return {"made_with": {**scorers.names, **provenance()}, "scorer": scorers.identity, "references": shown}


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


@dataclass(frozen=True)
class _Subject:
    """A picture and what it is held against: targets, or the base model's picture; with neither it is not scored."""

    record: ImageRecord
    file: Path
    targets: Sequence[Target]
    base: Path | None


def _scored(folder: ImageFolder, subjects: Sequence[_Subject], scorers: Scorers, progress: bool) -> FolderScores:
    seen = [i for i, one in enumerate(subjects) if one.targets or one.base]
    embedded: dict[int, np.ndarray] = {}
    scores: list[dict[str, float]] = [{} for _ in subjects]
    means: Means = {}
    with Bar(total=len(seen), desc=f"Scoring {folder.path.name}", unit="picture", disable=not progress) as bar:
        for start in range(0, len(seen), _AT_ONCE):
            part = seen[start : start + _AT_ONCE]
            batch = [subjects[i] for i in part]
            images = [read_image(one.file) for one in batch]
            vectors = _numpy(scorers.clip.image_embeddings(images))
            for i, vector, found in zip(part, vectors, _scores(batch, images, vectors, scorers, means), strict=True):
                scores[i] = found
                if subjects[i].targets:
                    embedded[i] = vector
            bar.update(len(part))
    pairs = [
        (i, j, float(1 - embedded[i] @ embedded[j]))
        for i, j in same_prompt(folder.records)
        if i in embedded and j in embedded
    ]
    return FolderScores(tuple(scores), tuple(pairs))


def _scores(
    batch: Sequence[_Subject],
    images: Sequence[Image.Image],
    vectors: np.ndarray,
    scorers: Scorers,
    means: Means,
) -> list[dict[str, float]]:
    """The scores of each picture; `vectors` are their CLIP embeddings (n, d)."""
    found: list[dict[str, float]] = [{} for _ in batch]
    if shown := [k for k, one in enumerate(batch) if one.targets]:
        prompts = {k: plain_prompt(batch[k].record) for k in shown}
        texts = list(dict.fromkeys(prompts.values()))
        rows = dict(zip(texts, _numpy(scorers.clip.text_embeddings(texts)), strict=True))
        for k, prompt in prompts.items():
            cosine = float(vectors[k] @ rows[prompt])
            found[k]["clip_i"] = _likeness(means, "clip", scorers.clip, vectors[k], batch[k].targets)
            found[k] |= {"clip_t": cosine, "clip_t_scaled": TEXT_SCALE * max(cosine, 0.0)}
        if (dino := scorers.dino) is not None:
            seen = _numpy(dino.image_embeddings([images[k] for k in shown]))
            for k, vector in zip(shown, seen, strict=True):
                found[k]["dino"] = _likeness(means, "dino", dino, vector, batch[k].targets)
    if scorers.reader is not None and (wishes := {k: wish for k in shown if (wish := _wish(batch[k])) is not None}):
        judged = judge(scorers.reader, [images[k] for k in wishes], list(wishes.values()))
        for k, read in zip(wishes, judged, strict=True):
            found[k] |= read
    if held := {k: one.base for k, one in enumerate(batch) if one.base is not None}:
        before = [read_image(file) for file in held.values()]
        changes = zip(*drift(before, [images[k] for k in held], scorers.clip), strict=True)
        for k, (cosine, square) in zip(held, changes, strict=True):
            found[k] |= {"drift": float(cosine), "drift_mse": float(square)}
    return found


def _likeness(means: Means, kind: str, scorer: Embedder, vector: np.ndarray, targets: Sequence[Target]) -> float:
    """The mean cosine to the references of each target, and the mean over targets. The mean over all references of one
    is the product with their mean, which is kept in `means`."""
    for target in targets:
        if (kind, target.digest) not in means:
            means[kind, target.digest] = _numpy(scorer.image_embeddings(target.images)).mean(0)
    return float(np.mean([vector @ means[kind, target.digest] for target in targets]))


def drift(
    before: Sequence[Image.Image], after: Sequence[Image.Image], scorer: Embedder
) -> tuple[np.ndarray, np.ndarray]:
    """How much n pictures changed: 1 − cosine of their embeddings, and the mean squared difference of their pixels on
    [0, 1]; both float64 (n,). Raises ScoreError: a picture changed its size."""
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


def _wish(one: _Subject) -> Wish | None:
    """What the attribute reader shall look for; None: the picture is not of Toyland."""
    kinds = parts(one.record.superclass) if one.record.superclass else []
    known = zip(one.targets, kinds, strict=False)  # none without superclass
    toys = {kind: toy(target.instance, kind) for target, kind in known if target.instance is not None}
    if not toys and one.record.backbone != "toyland":
        return None
    text = plain_prompt(one.record)
    try:
        parse(text)
    except CaptionError:
        if toys:
            raise
        return None
    return Wish(text, toys)


def _key(subjects: Sequence[_Subject], scorers: Scorers) -> str:
    """A hash over pictures, manifest, references and models."""
    content: list[Any] = [VERSION, scorers.identity]
    for one in subjects:
        files = [hashlib.sha256(file.read_bytes()).hexdigest() for file in (one.file, one.base) if file is not None]
        content.append([asdict(one.record), files, [[target.digest, target.instance] for target in one.targets]])
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()[:32]


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
