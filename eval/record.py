"""The record of a scoring: a point for every method, concept and setting, with the scores of every picture.

    {"version": 1, "made_with": {...}, "scorer": {...}, "bootstrap": {...}, "summary": [...],
     "references": {"cat": [a small picture as a data URI, ...], ...},
     "points": [{"method", "concept", "setting": {"beta": 0.4, ...}, "scores": {...}, "prompts": [...],
                 "pictures": [{"file", "prompt", "seed", "training", "scores": {...}}, ...],
                 "pairs": [[i, j, distance], ...]}]}

`summary`, and `scores` and `prompts` of a point, are there to be read by people; fronts and reports are made from
`pictures` and `pairs` alone. Files are named relative to the record's folder, so that both can be moved together.
"""

from __future__ import annotations

import json
import os
import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from perfusion.files import PathLike, atomic_write_text
from perfusion.manifest import spelled

VERSION = 1
Value = str | int | float
# What sets pictures of one method apart beside its dials, and how it is written.
BESIDE_DIALS = {"steps": "{} steps", "guidance": "guidance {}", "setting": "{}"}


class ScoreError(ValueError):
    """Pictures or a record of scores that cannot be used; names the file, what was found and what was expected."""


@dataclass(frozen=True)
class Picture:
    """One picture and its own scores."""

    file: Path
    prompt: str
    seed: int | None = None
    training: str | None = None  # which training of the concept made it: the hash of the concept's tensors
    scores: Mapping[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class Point:
    """All pictures of one method, concept and setting."""

    method: str
    concept: str
    setting: Mapping[str, Value]
    pictures: tuple[Picture, ...]
    pairs: tuple[tuple[int, int, float], ...] = ()  # (i, j, distance), i < j, of one prompt and one training

    @property
    def key(self) -> tuple[str, str, str]:
        """Points with equal keys are one point."""
        return self.method, self.concept, setting_key(self.setting)


def setting_key(setting: Mapping[str, Value]) -> str:
    """A setting as text, the same for equal settings."""
    return json.dumps(dict(setting), sort_keys=True, ensure_ascii=False)


def merged(points: Iterable[Point]) -> list[Point]:
    """One point for each key, in order of method, setting and concept; the same pictures given again count once. Raises
    ScoreError: two points share some of their pictures, but not all."""
    together: dict[tuple[str, str, str], Point] = {}
    for point in points:
        if (before := together.get(point.key)) is None:
            together[point.key] = point
            continue
        if {picture.file for picture in point.pictures} <= {picture.file for picture in before.pictures}:
            continue
        shift = len(before.pictures)
        pairs = before.pairs + tuple((i + shift, j + shift, d) for i, j, d in point.pairs)
        together[point.key] = Point(point.method, point.concept, point.setting, before.pictures + point.pictures, pairs)
    for point in together.values():
        for file, count in Counter(picture.file for picture in point.pictures).most_common(1):
            if count > 1:
                raise ScoreError(f"{file}: is in two points of {point.method}, {point.concept}, expected one")
    keys = _keys([point.setting for point in together.values()])
    return sorted(together.values(), key=lambda p: (p.method, setting_order(p.setting, keys), p.concept))


def setting_order(setting: Mapping[str, Value], keys: Iterable[str]) -> list[tuple[Any, ...]]:
    """Sorts settings: nothing first, then numbers by size, then text, "50 steps" before "100 steps"."""
    order: list[tuple[Any, ...]] = []
    for value in map(setting.get, keys):
        if value is None:
            order.append((0,))
        elif isinstance(value, str):
            order.append((2, [(int(p), "") if p.isdecimal() else (-1, p) for p in re.split(r"(\d+)", value)]))
        else:
            order.append((1, value))
    return order


def _keys(settings: Iterable[Mapping[str, Value]]) -> list[str]:
    """The keys of settings: dials first, as they come."""
    found = dict.fromkeys(key for setting in settings for key in setting)
    return [*(key for key in found if key not in BESIDE_DIALS), *(key for key in BESIDE_DIALS if key in found)]


def setting_labels(settings: Sequence[Mapping[str, Value]]) -> list[str]:
    """What to call each of one method's settings: those of its values in which they differ; "" for a single one."""
    differing = [key for key in _keys(settings) if len({setting.get(key) for setting in settings}) > 1]
    return [", ".join(_spelled(key, setting[key]) for key in differing if key in setting) for setting in settings]


def _spelled(key: str, value: Value) -> str:
    if key not in BESIDE_DIALS:
        return spelled(key, value)
    return BESIDE_DIALS[key].format(f"{value:g}" if isinstance(value, float) else value)


def write_scores(
    path: PathLike, document: Mapping[str, Any], points: Sequence[tuple[Point, Mapping[str, Any]]]
) -> None:
    """Write a record, atomically: what `document` says, and the points, each with what else is to be said of it."""
    path = Path(path)
    content = {"version": VERSION, **document, "points": [_entry(point, said, path.parent) for point, said in points]}
    atomic_write_text(path, _pretty(content) + "\n")


def read_scores(path: PathLike) -> tuple[dict[str, Any], list[Point]]:
    """What a record says of itself, and its points. Raises ScoreError: no such file, no record of scores, or one of
    another version."""
    path = Path(path)
    if not path.is_file():
        raise ScoreError(f"{path}: found no such file, expected what `python -m eval.score` writes")
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ScoreError(f"{path}: not readable as JSON: {error}") from error
    if not isinstance(content, dict) or "points" not in content:
        raise ScoreError(f"{path}: no record of scores; expected what `python -m eval.score` writes")
    if content.get("version") != VERSION:
        raise ScoreError(f"{path}: found version {content.get('version')}, expected {VERSION}; score the pictures anew")
    try:
        points = [_point(entry, path.parent) for entry in content.pop("points")]
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise ScoreError(f"{path}: damaged record of scores: {error!r}") from error
    return content, points


def read_all(files: Any) -> tuple[dict[str, Any], list[Point]]:
    """Several records as one, with what the first says of itself and the references of all. Raises ScoreError: none
    given, one that cannot be read, or records that were scored with different models."""
    listed = files if isinstance(files, list) else [files]
    if not listed or not all(isinstance(file, str) and file.strip() for file in listed):
        raise ScoreError(f"scores: found {files!r}, expected a score file or a list of them")
    read = [read_scores(Path(file).expanduser()) for file in listed]
    scorers = [document.get("scorer") for document, _ in read]
    for file, scorer in zip(listed, scorers, strict=True):
        if scorer != scorers[0]:
            raise ScoreError(f"{file}: scored with {scorer}, but {listed[0]} with {scorers[0]}; expected one scorer")
    points = merged(point for _, points in read for point in points)
    if not points:
        raise ScoreError(f"scores: found no scored picture in {', '.join(listed)}")
    shown = {concept: seen for document, _ in read for concept, seen in document.get("references", {}).items()}
    return {**read[0][0], "references": shown}, points


def _entry(point: Point, said: Mapping[str, Any], base: Path) -> dict[str, Any]:
    pictures = []
    for picture in point.pictures:
        file = Path(os.path.relpath(picture.file, base)).as_posix()
        scores = {name: round(value, 6) for name, value in picture.scores.items()}
        entry = {**vars(picture), "file": file, "scores": scores}
        pictures.append({key: value for key, value in entry.items() if value is not None})
    pairs = [[i, j, round(distance, 6)] for i, j, distance in point.pairs]
    which = {"method": point.method, "concept": point.concept, "setting": dict(point.setting)}
    return {**which, **said, "pictures": pictures, "pairs": pairs}


def _point(entry: Mapping[str, Any], base: Path) -> Point:
    pictures = []
    for known in entry["pictures"]:
        file = Path(os.path.normpath(base / known["file"]))
        scores = {name: float(value) for name, value in known["scores"].items()}
        pictures.append(Picture(**{**known, "file": file, "scores": scores}))
    pairs = tuple((int(i), int(j), float(distance)) for i, j, distance in entry["pairs"])
    assert all(0 <= i < j < len(pictures) for i, j, _ in pairs)
    return Point(entry["method"], entry["concept"], dict(entry["setting"]), tuple(pictures), pairs)


def _pretty(value: Any, depth: int = 0) -> str:
    """JSON with a line for every picture, rather than one for every number."""
    compact = json.dumps(value, ensure_ascii=False)
    if len(compact) <= 100 or depth > 3 or not isinstance(value, dict | list):
        return compact
    inside, outside = " " * (depth + 1), " " * depth
    if isinstance(value, dict):
        parts = [f"{json.dumps(k, ensure_ascii=False)}: {_pretty(v, depth + 1)}" for k, v in value.items()]
        return "{\n" + ",\n".join(inside + part for part in parts) + f"\n{outside}}}"
    if all(isinstance(item, list) for item in value):
        return compact
    return "[\n" + ",\n".join(inside + _pretty(item, depth + 1) for item in value) + f"\n{outside}]"
