"""The pictures that are to be scored: folders with a manifest, and what the command line adds where they are silent."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from eval.record import BESIDE_DIALS, ScoreError, Value
from perfusion.data.prompts import contains, replace_placeholder
from perfusion.manifest import FILE_NAME, JOINED, ImageRecord, read_manifest

CONFIG = "config.yaml"  # in the folder of a training run


@dataclass(frozen=True)
class Said:
    """What the command line says of pictures whose manifest does not; None: nothing."""

    method: str | None = None
    concept: str | None = None
    superclass: str | None = None
    placeholder: str | None = None
    setting: str | None = None


@dataclass(frozen=True)
class ImageFolder:
    """A folder of pictures with everything that is known of each; `method` and `concept` always are."""

    path: Path
    records: tuple[ImageRecord, ...]

    def file(self, record: ImageRecord) -> Path:
        return self.path / record.file

    @property
    def run_config(self) -> Path | None:
        """The config of the training run that the folder lies in, or is."""
        return next((c for c in (self.path / CONFIG, self.path.parent / CONFIG) if c.is_file()), None)


def find_folders(spec: Any, key: str = "images") -> list[Path]:
    """The folders that hold a manifest: those named, and all below them.

    Raises:
        ScoreError: nothing named, no such folder, or no manifest in it.
    """
    named = spec if isinstance(spec, list) else [spec]
    if not named or not all(isinstance(name, str) and name.strip() for name in named):
        raise ScoreError(f"{key}: found {spec!r}, expected a folder or a list of folders")
    found: dict[Path, None] = {}
    for name in named:
        folder = Path(name).expanduser()
        if not folder.is_dir():
            raise ScoreError(f"{key}={name}: no such folder")
        below = sorted(manifest.parent for manifest in folder.rglob(FILE_NAME))
        if not below:
            raise ScoreError(
                f"{key}={name}: no {FILE_NAME} there; expected a list of its pictures (file, prompt, seed, concept, "
                "...), as `python -m perfusion.generate` and `python -m eval.convert` write it"
            )
        found |= dict.fromkeys(below)
    return list(found)


def read_folder(path: Path, said: Said) -> ImageFolder:
    """The pictures of a folder, described as far as its manifest and `said` go; a method is else the folder's name.

    Raises:
        ManifestError: the manifest cannot be used.
        ScoreError: no concept is known for a picture, a prompt names a concept whose superclass is not known.
    """
    filled = [_filled(record, said, path) for record in read_manifest(path)]
    if not filled:
        raise ScoreError(f"{path / FILE_NAME}: names no picture")
    return ImageFolder(path, tuple(filled))


def _filled(record: ImageRecord, said: Said, folder: Path) -> ImageRecord:
    missing = {name: value for name, value in dataclasses.asdict(said).items() if getattr(record, name) is None}
    record = dataclasses.replace(record, **missing)
    record = record if record.method else dataclasses.replace(record, method=folder.resolve().name)
    where = f"{folder / FILE_NAME}: {record.file}"
    if not record.concept:
        raise ScoreError(f"{where}: which concept is it? Put `concept` into the manifest, or give concept=<name>")
    if record.placeholder:
        if not record.superclass:
            raise ScoreError(
                f"{where}: has the placeholder {record.placeholder!r}, expected its superclass, too: give superclass="
            )
        counts = {len(parts(text)) for text in (record.concept, record.placeholder, record.superclass)}
        if len(counts) > 1:
            raise ScoreError(
                f"{where}: found concept {record.concept!r}, placeholder {record.placeholder!r} and superclass "
                f"{record.superclass!r}, expected as many of each, joined by {JOINED!r}"
            )
    return record


def parts(text: str) -> list[str]:
    """What is said of each of several concepts."""
    return text.split(JOINED)


def shows_concept(record: ImageRecord) -> bool:
    """Whether the prompt names a concept; taken for granted where the placeholder is not known."""
    return record.placeholder is None or any(contains(record.prompt, word) for word in parts(record.placeholder))


def plain_prompt(record: ImageRecord) -> str:
    """The prompt with superclasses in the places of concepts."""
    prompt = record.prompt
    if record.placeholder and record.superclass:
        for placeholder, superclass in zip(parts(record.placeholder), parts(record.superclass), strict=True):
            prompt = replace_placeholder(prompt, placeholder, superclass)
    return prompt


def setting_of(record: ImageRecord) -> dict[str, Value]:
    """What sets the picture apart from others of its method and concept."""
    beside = {key: value for key in BESIDE_DIALS if (value := getattr(record, key)) is not None}
    return {**record.dials, **beside}


def same_prompt(records: Sequence[ImageRecord]) -> Iterator[tuple[int, int]]:
    """(i, j), i < j, of the records of one point, one prompt and one training."""
    together: Mapping[Any, list[int]] = {}
    for i, record in enumerate(records):
        setting = tuple(sorted(setting_of(record).items(), key=str))
        key = (record.method, record.concept, record.concept_hash, setting, record.prompt)
        together.setdefault(key, []).append(i)  # type: ignore[attr-defined]
    for members in together.values():
        for k, i in enumerate(members):
            for j in members[k + 1 :]:
                yield i, j
