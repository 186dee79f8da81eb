"""What a run reads beside its config: a digest of every file that the config names."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from perfusion.config import TrainConfig
from perfusion.data import clipseg
from perfusion.data.captions import SUFFIX
from perfusion.data.images import find_images
from perfusion.methods.base import Method
from perfusion.methods.prior import PriorOptions
from perfusion.training.prior import KEY as PRIOR

_MODEL = (".safetensors", ".json", ".txt")  # of a folder that holds a model
_WHOLE = 64 * 2**20  # bytes up to which all of a file counts; of larger ones, their size and these samples
_SAMPLES, _SAMPLE = 256, 2**14
_BUILT_IN = ("everyday", "toyland")  # captions and scorers that are no files


def inputs_of(config: TrainConfig, method: Method) -> dict[str, dict[str, str]]:
    """For each key of the config that names files, their names below a common folder, and their digests.

    Models of the hub, and what ships with this package, are not among them.

    Raises:
        ConceptImageError: see `find_images`.
    """
    found = {key: list(files) for key, files in _files(config, method)}
    return {key: _digests(files) for key, files in found.items() if files}


def _files(config: TrainConfig, method: Method) -> Iterator[tuple[str, list[Path]]]:
    concept, backbone, options = config.concept, config.backbone, method.options
    if concept.images is not None:
        yield "concept.images", find_images(concept.images)
        if concept.masks == clipseg.SPEC:
            yield "concept.clipseg", _model(concept.clipseg)
        elif concept.masks is not None:
            yield "concept.masks", find_images(concept.masks, key="concept.masks")
        if concept.captions is not None:
            captions = (path.with_suffix(SUFFIX) for path in find_images(concept.images))
            yield "concept.captions", [caption for caption in captions if caption.is_file()]
    yield "concept.templates", _model(concept.templates)
    if isinstance(options, PriorOptions) and options.prior and concept.prior is not None:
        pictures = find_images(concept.prior, key=PRIOR)[: options.prior_images]
        captions = (picture.with_suffix(SUFFIX) for picture in pictures)
        yield PRIOR, [*pictures, *(caption for caption in captions if caption.is_file())]
    yield "backbone.path", _model(backbone.path)
    yield "backbone.layout", _model(backbone.layout)
    if method.needs_covariance:
        key = "captions" if backbone.covariance.matrix is None else "matrix"
        yield f"backbone.covariance.{key}", _model(getattr(backbone.covariance, key))
    for name, spec in config.callbacks.items():
        for key in ("scorer", "pretrained"):
            yield f"callbacks.{name}.{key}", _model(spec.get(key) if isinstance(spec, dict) else None)


def _model(value: Any) -> list[Path]:
    """The file, or the files of the model in the folder, that a setting names; none where it names something else."""
    if not isinstance(value, str) or value in _BUILT_IN:
        return []
    path = Path(value).expanduser()
    if not path.is_dir():
        return [path] if path.is_file() else []
    return sorted(file for file in path.rglob("*") if file.suffix in _MODEL and file.is_file())


def model_digests(value: Any) -> dict[str, str]:
    """Digests of the file, or of the files of the model in the folder, that a setting names, by their names; none where
    it names something else, such as a model of the hub."""
    files = _model(value)
    return _digests(files) if files else {}


def _digests(files: Sequence[Path]) -> dict[str, str]:
    places = [Path(os.path.abspath(file)) for file in files]
    root = os.path.commonpath([place.parent for place in places])
    return {place.relative_to(root).as_posix(): _digest(place) for place in places}


def _digest(path: Path) -> str:
    """Prefix of the sha256 over a file, or over its size and samples of it."""
    size = path.stat().st_size
    total = hashlib.sha256()
    with open(path, "rb") as file:
        if size <= _WHOLE:
            total = hashlib.file_digest(file, "sha256")
        else:
            total.update(f"{size}\n".encode())
            for k in range(_SAMPLES):
                file.seek((size - _SAMPLE) * k // (_SAMPLES - 1))
                total.update(file.read(_SAMPLE))
    return total.hexdigest()[:16]
