"""What pictures of a concept are held against: reference pictures and, for a toy of Toyland, what it looks like."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from PIL import Image

from eval.folders import ImageFolder, parts
from eval.record import ScoreError
from perfusion.config import ConceptConfig, ToylandConcept, TrainConfig
from perfusion.data.images import find_images, read_image
from perfusion.manifest import JOINED, ImageRecord
from perfusion.training.module import examples_of
from perfusion.training.run_folder import read_config

DRAWN = 5  # renders of a toy, as training draws them: the first is what a training on one picture sees
_TOYLAND_SIDE = 64


@dataclass(frozen=True)
class Target:
    """What pictures of one concept are held against.

    Attributes:
        images: reference pictures, at least one.
        instance: the toy's seed, if it is one that Toyland draws.
        digest: the same for the same pictures.
    """

    images: tuple[Image.Image, ...]
    instance: int | None
    digest: str


class References:
    """Finds what pictures of a concept are held against, in this order.

    Pictures: `references` (a mapping from concepts to pictures; a folder with a sub-folder for each concept; else
    pictures of the one concept that all is about); else, of a known toy, DRAWN renders; else the pictures that the run
    was trained on which the generated pictures lie in. A toy's seed: the manifest's; else `instance` (a number, or a
    mapping from concepts to numbers); else that of the run.

    Raises:
        ScoreError: `instance` or `references` is neither of these.
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
        self._runs: dict[Path, TrainConfig] = {}
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
        run = self._run(folder, alone=JOINED not in (record.concept or ""), concept=concept)
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
            images, digest = self._once(
                f"trained {folder.run_config}", lambda: _pictures(run.concept, run.backbone.resolution)
            )
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

    def _run(self, folder: ImageFolder, alone: bool, concept: str) -> TrainConfig | None:
        """The training run that the folder lies in, if it is one of this concept."""
        path = folder.run_config
        if path is None:
            return None
        if path not in self._runs:
            self._runs[path] = read_config(path)
        run = self._runs[path]
        return run if alone or run.concept.name == concept else None

    def _once(self, name: str, make: Callable[[], tuple[Image.Image, ...]]) -> tuple[tuple[Image.Image, ...], str]:
        if name not in self._read:
            images = make()
            digest = hashlib.sha256()
            for image in images:
                digest.update(f"{image.size}".encode() + image.tobytes())
            self._read[name] = images, digest.hexdigest()[:16]
        return self._read[name]


def _pictures(concept: ConceptConfig, resolution: int) -> tuple[Image.Image, ...]:
    return tuple(examples_of(concept, resolution).pictures())
