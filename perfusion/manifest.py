"""Pictures with their origin: `manifest.json` beside them, and the same in the text chunks of every PNG.

The manifest is a JSON list with one object per picture. `file` and `prompt` are required, every other field of
`ImageRecord` is optional, and any other key is a dial of the method: pictures that another tool made can be described,
and scored, in the same way.
"""

from __future__ import annotations

import contextlib
import dataclasses
import difflib
import itertools
import json
import math
import os
import re
import types
import typing
import unicodedata
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from PIL import Image
from PIL.PngImagePlugin import PngInfo

from perfusion.files import PathLike, atomic_path, atomic_write_text

FILE_NAME = "manifest.json"
JOINED = " + "  # between what is said of several concepts in one picture
_DIALS = "dials"
_SLUG = 48  # characters of a prompt in the name of a file
_TYPO = 0.75  # how like a field's name a key has to be to pass for a mistake


class ManifestError(ValueError):
    """A manifest that cannot be used; names the file, what was found and what was expected."""


@dataclass(frozen=True)
class ImageRecord:
    """Where one picture comes from. None: not known, or not a thing of the method that made it.

    What is said of several concepts in one picture is joined by " + ", in one order.
    """

    file: str  # relative to the manifest's folder, with "/"
    prompt: str  # as it was given, with the placeholder in it
    seed: int | None = None
    concept: str | None = None  # name of the concept; pictures of one concept share it
    concept_hash: str | None = None  # of the concept file's tensors
    placeholder: str | None = None
    superclass: str | None = None
    method: str | None = None
    backbone: str | None = None
    # What the method's dials were set to, such as beta; text where concepts differ. In files each is a key of its own.
    dials: Mapping[str, float | str] = field(default_factory=dict)
    scheduler: str | None = None  # diffusers' class
    steps: int | None = None
    guidance: float | None = None
    negative_prompt: str | None = None
    width: int | None = None  # pixels, where they were asked for
    height: int | None = None
    loras: str | None = None  # their files and scales
    embeddings: str | None = None  # words of textual inversions
    image: str | None = None  # that it starts from: the file's name and a digest of it; likewise the other pictures
    strength: float | None = None  # how much of that is drawn anew
    mask: str | None = None  # of what is drawn anew
    controlnet: str | None = None  # its name and scale
    control_image: str | None = None  # what that follows
    setting: str | None = None  # what else sets pictures of one method apart, e.g. "trained 200 steps"
    instance: int | None = None  # of a toy that Toyland draws: the seed of its looks, as in `concept.toyland.instance`


def spelled(name: str, value: float | str) -> str:
    """A dial for people, Greek where its name is that of a letter: `β 0.6`, `key_lock global`."""
    return f"{symbol(name)} {value:g}" if isinstance(value, float) else f"{symbol(name)} {value}"


def symbol(name: str) -> str:
    """A dial's name, or the Greek letter of that name."""
    with contextlib.suppress(KeyError):
        return unicodedata.lookup(f"GREEK SMALL LETTER {name}")
    return name


def slug(text: str) -> str:
    """A prompt as part of a file's name."""
    return re.sub(r"[\W_]+", "-", text.lower()).strip("-")[:_SLUG].rstrip("-") or "image"


def named(records: Sequence[ImageRecord], folder: Path) -> list[ImageRecord]:
    """The records with a file name each: `<prompt>-<seed>.png`, counted on where another picture or any other file in
    the folder has that name.

    Where they differ in a dial, it is part of the name.
    """
    taken: dict[str, ImageRecord | None] = {path.name: None for path in folder.glob("*")}
    taken |= {record.file: record for record in known_records(folder)}
    differing = differing_dials(records)
    result: list[ImageRecord] = []
    for record in records:
        dials = "".join(f"-{name}-{_shown(record.dials[name])}" for name in differing)
        stem = f"{slug(record.prompt)}-{record.seed:04d}{dials}"
        choices = (replace(record, file=name) for name in numbered(stem))
        free = next(choice for choice in choices if taken.get(choice.file, choice) == choice)
        taken[free.file] = free
        result.append(free)
    return result


def numbered(stem: str, ending: str = ".png") -> Iterator[str]:
    """`<stem>.png`, `<stem>-2.png`, and so on."""
    return (f"{stem}{suffix}{ending}" for suffix in itertools.chain([""], (f"-{k}" for k in itertools.count(2))))


def differing_dials(records: Sequence[ImageRecord]) -> list[str]:
    """The dials in which pictures of one call differ."""
    return [name for name in records[0].dials if len({record.dials[name] for record in records}) > 1]


def _shown(value: float | str) -> str:
    return value.replace(" + ", "-") if isinstance(value, str) else f"{value:g}"


def save_png(folder: PathLike, image: Image.Image, record: ImageRecord, flush: bool = True) -> None:
    """Write a picture as `record.file` in `folder`, atomically, with everything known about it as PNG text chunks.

    `flush`: see `atomic_path`.
    """
    info = PngInfo()
    for key, value in _known(record).items():
        if key != "file":
            info.add_itxt(key, value if isinstance(value, str) else json.dumps(value))
    with atomic_path(Path(folder) / record.file, flush) as temporary:
        image.save(temporary, "PNG", pnginfo=info)


def write_manifest(folder: PathLike, records: Iterable[ImageRecord]) -> Path:
    """Write `manifest.json` into `folder`, atomically; returns its path."""
    path = Path(folder) / FILE_NAME
    atomic_write_text(path, json.dumps([_known(record) for record in records], indent=2, ensure_ascii=False) + "\n")
    return path


def read_manifest(folder: PathLike) -> list[ImageRecord]:
    """The records of `manifest.json` in `folder`, in its order.

    Raises:
        ManifestError: no such file, no JSON list of objects, an unknown key, a missing or wrong value, a file that is
            named twice, does not exist, or lies outside of the folder.
    """
    path = Path(folder) / FILE_NAME
    if not path.is_file():
        raise ManifestError(f"{path}: no such file; expected a list of pictures (file, prompt, seed, ...)")
    records = _records(path)
    for record in records:
        if not (path.parent / record.file).is_file():
            raise ManifestError(f"{path}: names {record.file!r}, but there is no such file")
    return records


def known_records(folder: PathLike) -> list[ImageRecord]:
    """The records of those pictures in `folder` that are there; none without a manifest. Raises ManifestError."""
    path = Path(folder) / FILE_NAME
    records = _records(path) if path.is_file() else []
    return [record for record in records if (path.parent / record.file).is_file()]


def _records(path: Path) -> list[ImageRecord]:
    try:
        entries = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:  # json's and Unicode's errors are ValueErrors
        raise ManifestError(f"{path}: not readable as JSON: {error}") from error
    if not isinstance(entries, list):
        raise ManifestError(f"{path}: found {_kind(entries)}, expected a list of objects")
    records = [_record(entry, f"{path}, entry {i}") for i, entry in enumerate(entries)]
    seen: set[str] = set()
    for record in records:
        if record.file in seen:
            raise ManifestError(f"{path}: {record.file!r} is there twice, expected one entry per file")
        seen.add(record.file)
    return records


def _known(record: ImageRecord) -> dict[str, Any]:
    known: dict[str, Any] = {}
    for key, value in dataclasses.asdict(record).items():
        known |= value if key == _DIALS else {} if value is None else {key: value}
    return known


def _record(entry: Any, where: str) -> ImageRecord:
    if not isinstance(entry, Mapping):
        raise ManifestError(f"{where}: found {_kind(entry)}, expected an object")
    hints = {key: hint for key, hint in typing.get_type_hints(ImageRecord).items() if key != _DIALS}
    for key, value in entry.items():
        if key not in hints and (near := difflib.get_close_matches(key, hints, n=1, cutoff=_TYPO)):
            raise ManifestError(f"{where}: unknown key {key!r}; did you mean {near[0]!r}? Known: {', '.join(hints)}")
        _check(value, hints.get(key, float | str | None), f"{where}: {key}")
    for key in ("file", "prompt"):
        if not entry.get(key):
            raise ManifestError(f"{where}: {key!r} is missing or empty")
    inside = os.path.normpath(entry["file"])
    if os.path.isabs(inside) or inside.split(os.sep)[0] == os.pardir:
        raise ManifestError(f"{where}: found the file {entry['file']!r}, expected one inside of the manifest's folder")
    dials = {key: value for key, value in entry.items() if key not in hints and value is not None}
    return ImageRecord(**{key: value for key, value in entry.items() if key in hints}, dials=dials)


def _check(value: Any, hint: Any, where: str) -> None:
    kinds = typing.get_args(hint) if isinstance(hint, types.UnionType) else (hint,)
    whole_for_float = float in kinds and type(value) is int
    if not (type(value) in kinds or whole_for_float) or (type(value) is float and not math.isfinite(value)):
        names = " or ".join(_NAMES[kind] for kind in kinds)
        raise ManifestError(f"{where}: found {value!r}, expected {names}")


_NAMES = {str: "text", int: "a whole number", float: "a finite number", types.NoneType: "null"}


def _kind(value: Any) -> str:
    return {dict: "an object", list: "a list", str: "text"}.get(type(value), repr(value))
