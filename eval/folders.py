"""The pictures that are to be scored, and what they are held against.

Pictures lie in folders with a manifest; the command line adds what it leaves open. They are held against reference
pictures of their concept and, for a toy of Toyland, what it looks like; those of prompts without the concept against
the base model's.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations
from pathlib import Path
from typing import Any

from PIL import Image

from eval.record import BESIDE_DIALS, ScoreError, Value
from perfusion.config import ConceptConfig, ToylandConcept
from perfusion.data.images import find_images, read_image
from perfusion.data.prompts import contains, replace_placeholder
from perfusion.manifest import FILE_NAME, JOINED, ImageRecord, read_manifest
from perfusion.training.run_folder import RunFolder, read_config

DRAWN = 5  # renders of a toy, as training draws them: the first is what a training on one picture sees
_TOYLAND_SIDE = 64


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
        configs = (RunFolder(path).config for path in (self.path, self.path.parent))
        return next((config for config in configs if config.is_file()), None)


def find_folders(spec: Any) -> list[Path]:
    """The folders that hold a manifest: those named, and all below them. Raises ScoreError: nothing named, no such
    folder, or no manifest in it."""
    named = spec if isinstance(spec, list) else [spec]
    if not named or not all(isinstance(name, str) and name.strip() for name in named):
        raise ScoreError(f"images: found {spec!r}, expected a folder or a list of folders")
    found: dict[Path, None] = {}
    for name in named:
        folder = Path(name).expanduser()
        if not folder.is_dir():
            raise ScoreError(f"images={name}: no such folder")
        below = sorted(manifest.parent for manifest in folder.rglob(FILE_NAME))
        if not below:
            raise ScoreError(
                f"images={name}: no {FILE_NAME} there; expected a list of its pictures (file, prompt, seed, concept, "
                "...), as `python -m perfusion.generate` and `python -m eval.convert` write it"
            )
        found |= dict.fromkeys(below)
    return list(found)


def read_folder(path: Path, **said: str | None) -> ImageFolder:
    """The pictures of a folder, described as far as its manifest goes, and `said` where that leaves them open: fields
    of a record, None being nothing. A method is else the folder's name.

    Raises:
        ManifestError: the manifest cannot be used.
        ScoreError: no concept is known for a picture, a prompt names a concept whose superclass is not known.
    """
    if filled := tuple(_filled(record, said, path) for record in read_manifest(path)):
        return ImageFolder(path, filled)
    raise ScoreError(f"{path / FILE_NAME}: names no picture")


def _filled(record: ImageRecord, said: Mapping[str, Any], folder: Path) -> ImageRecord:
    missing = {name: value for name, value in said.items() if getattr(record, name) is None}
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
    together: dict[Any, list[int]] = defaultdict(list)
    for i, record in enumerate(records):
        setting = tuple(sorted(setting_of(record).items(), key=str))
        together[record.method, record.concept, record.concept_hash, setting, record.prompt].append(i)
    for members in together.values():
        yield from combinations(members, 2)


# --- what pictures are held against -----------------------------------------------------------------------------------


@dataclass(frozen=True)
class Target:
    """What pictures of one concept are held against."""

    images: tuple[Image.Image, ...]  # at least one
    instance: int | None  # the toy's seed, if it is one that Toyland draws
    digest: str  # the same for the same pictures


class References:
    """Finds what pictures of a concept are held against, in this order.

    Pictures: `references` (a mapping from concepts to pictures; a folder with a sub-folder for each concept; else
    pictures of the one concept that all is about); else, of a known toy, DRAWN renders; else the pictures that the run
    was trained on which the generated pictures lie in. A toy's seed: the manifest's; else `instance` (a number, or a
    mapping from concepts to numbers); else that of the run. Raises ScoreError for what is neither of these.
    """

    def __init__(self, references: Any = None, instance: Any = None) -> None:
        if isinstance(instance, bool) or not isinstance(instance, int | dict | None):
            raise ScoreError(f"instance: found {instance!r}, expected a number, or one for each concept as {{cat: 16}}")
        if isinstance(instance, dict) and not all(type(number) is int for number in instance.values()):
            raise ScoreError(f"instance: found {instance!r}, expected a number for each concept")
        if not isinstance(references, str | list | dict | None):
            raise ScoreError(f"references: found {references!r}, expected pictures, or pictures for each concept")
        self._references, self._instance = references, instance
        self._read: dict[str, tuple[tuple[Image.Image, ...], str]] = {}
        self._config = functools.cache(read_config)  # of runs, each read once
        self._shared_by: str | None = None
        self.shown: dict[str, tuple[Image.Image, ...]] = {}  # the references of each concept that was asked for

    def targets(self, folder: ImageFolder, record: ImageRecord) -> list[Target]:
        """One target for each concept of a record (several are joined by " + ").

        Raises:
            ScoreError: no pictures, or pictures of one concept for several.
            ConceptImageError, ConfigError: pictures or a run's config that cannot be read.
        """
        assert record.concept
        concepts = parts(record.concept)
        kinds = parts(record.superclass) if record.superclass else [None] * len(concepts)
        return [self._target(folder, record, *pair) for pair in zip(concepts, kinds, strict=True)]

    def _target(self, folder: ImageFolder, record: ImageRecord, concept: str, superclass: str | None) -> Target:
        run = None if folder.run_config is None else self._config(folder.run_config)  # that the folder lies in
        if run is not None and JOINED in (record.concept or "") and run.concept.name != concept:
            run = None
        instance = record.instance
        if instance is None:
            instance = self._instance.get(concept) if isinstance(self._instance, dict) else self._instance
        if instance is None and run is not None and run.concept.images is None:
            instance = run.concept.toyland.instance
        if self._references is not None:
            images, digest = self._given(concept)
        elif instance is not None:
            if superclass is None:
                raise ScoreError(f"{folder.path}: instance={instance} of which superclass? Give superclass=<word>")
            toy = ConceptConfig(concept, superclass, "<toy*>", toyland=ToylandConcept(instance, DRAWN))
            images, digest = self._once(f"drawn {superclass} {instance}", lambda: _pictures(toy, _TOYLAND_SIDE))
        elif run is not None:
            side = run.backbone.resolution
            images, digest = self._once(f"trained {folder.run_config}", lambda: _pictures(run.concept, side))
        else:
            raise ScoreError(
                f"{folder.path}: nothing to hold pictures of {concept!r} against. Give references=<pictures of it>, or "
                "instance=<seed> for a toy that Toyland draws"
            )
        self.shown.setdefault(concept, images)
        return Target(images, instance, digest)

    def _given(self, concept: str) -> tuple[tuple[Image.Image, ...], str]:
        spec: Any = self._references
        if isinstance(spec, Mapping):
            if concept not in spec:
                raise ScoreError(
                    f"references: found pictures of {', '.join(map(str, spec))}, expected {concept!r}, too"
                )
            spec = spec[concept]
        elif isinstance(spec, str) and (Path(spec).expanduser() / concept).is_dir():
            spec = str(Path(spec).expanduser() / concept)
        else:
            if self._shared_by not in (None, concept):
                raise ScoreError(
                    f"references={spec}: pictures of {self._shared_by!r} and of {concept!r}? Expected a sub-folder for "
                    "each concept, or a list for each as references={cat: photos/cat, ...}"
                )
            self._shared_by = concept
        return self._once(f"given {spec}", lambda: tuple(map(read_image, find_images(spec, key="references"))))

    def _once(self, name: str, make: Callable[[], tuple[Image.Image, ...]]) -> tuple[tuple[Image.Image, ...], str]:
        if name not in self._read:
            images = make()
            digest = hashlib.sha256()
            for image in images:
                digest.update(f"{image.size}".encode() + image.tobytes())
            self._read[name] = images, digest.hexdigest()[:16]
        return self._read[name]


def _pictures(concept: ConceptConfig, resolution: int) -> tuple[Image.Image, ...]:
    from perfusion.training.module import examples_of  # torch, which takes seconds to import

    return tuple(examples_of(concept, resolution).pictures())


class Base:
    """The base model's pictures, found by prompt and seed. Raises ScoreError: two of the same prompt and seed."""

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
