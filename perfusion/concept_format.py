"""Reading and writing concept files: safetensors with flat metadata, checked as far as a file can be by itself."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from perfusion.files import PathLike, atomic_path

FORMAT_VERSION = 1


class ConceptFileError(ValueError):
    """A concept file that cannot be used; names the file, what was found and what was expected."""


def write(path: PathLike, tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> None:
    """Write a concept file atomically, making its folder where there is none.

    `metadata` gets the `format_version` added. Raises ConceptFileError for NaN or infinity in a tensor; nothing is
    written then.
    """
    _check_finite(path, tensors)
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    with atomic_path(path) as temporary:
        contiguous = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
        save_file(contiguous, temporary, {"format_version": str(FORMAT_VERSION), **metadata})


def read(path: PathLike) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Tensors, on the CPU, and metadata of a concept file.

    Raises:
        ConceptFileError: no such file, not safetensors, truncated, a name that stands twice in its header, no concept,
            another format version, or NaN or infinity in a tensor.
    """
    if not Path(path).is_file():
        raise ConceptFileError(f"{path}: found no such file, expected a concept")
    try:
        with safe_open(path, framework="pt") as file:
            _check_names(path)
            metadata = file.metadata() or {}
            _check_version(path, metadata)
            # Memory of their own: a view of the file would change, or crash, when the file does.
            tensors = {name: file.get_tensor(name).clone() for name in file.keys()}  # noqa: SIM118 (not a dict)
    except (SafetensorError, OSError) as error:
        raise ConceptFileError(f"{path}: found no readable safetensors file ({error}), expected a concept") from error
    _check_finite(path, tensors)
    return tensors, metadata


def _check_names(path: PathLike) -> None:
    """Safetensors itself takes the last of two tensors, or two entries, of one name."""

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        names = [name for name, _ in pairs]
        if twice := sorted({name for name in names if names.count(name) > 1}):
            raise ConceptFileError(f"{path}: found {twice[0]!r} twice in the header, expected every name once")
        return dict(pairs)

    with open(path, "rb") as file:
        size = int.from_bytes(file.read(8), "little")
        json.loads(file.read(size), object_pairs_hook=unique)


def _check_version(path: PathLike, metadata: Mapping[str, str]) -> None:
    found = metadata.get("format_version")
    if found is None:
        raise ConceptFileError(f"{path}: found a safetensors file without 'format_version', expected a concept")
    if found != str(FORMAT_VERSION):
        raise ConceptFileError(
            f"{path}: found format version {found}, expected {FORMAT_VERSION}; another version of perfusion wrote it"
        )


def _check_finite(path: PathLike, tensors: Mapping[str, Tensor]) -> None:
    for name, tensor in tensors.items():
        if bad := int((~torch.isfinite(tensor)).sum()):
            kind = str(tensor.dtype).removeprefix("torch.")
            raise ConceptFileError(
                f"{path}: tensor {name!r}: found {bad} of {tensor.numel()} values NaN or infinite in {kind}, expected "
                "finite ones"
            )
