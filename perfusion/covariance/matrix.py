"""C as a file of its own, to hand on: written with what it was made of, read from .safetensors or .npy."""

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from perfusion.covariance.moment import CovarianceError, check_matrix
from perfusion.files import atomic_write_bytes

MATRIX_FORMAT = 1
SUFFIXES = (".safetensors", ".npy")
NAME, ABOUT = "second_moment", "perfusion.second_moment"  # of the tensor and the metadata in a file of this project


@dataclass(frozen=True)
class Matrix:
    """C as a file held it.

    `C` (d, d) float64 on the CPU; `count` the positions behind it, None where the file does not say; `origin` what it
    was made of, empty unless this project wrote the file and nothing in it was changed since.
    """

    C: Tensor
    count: int | None = None
    origin: Mapping[str, object] = field(default_factory=dict)

    @property
    def digest(self) -> str:
        """12 hexadecimal digits of the sha256 over the values in float64, whatever file they came from."""
        return _sha256(self.C)[:12]


def save_matrix(path: Path, matrix: Matrix) -> None:
    """Write `matrix` to a .safetensors file, atomically; the same matrix gives the same bytes. OSError where it cannot
    be written."""
    about = {"format": MATRIX_FORMAT, "count": matrix.count, "origin": dict(matrix.origin), "sha256": _sha256(matrix.C)}
    # One entry, since safetensors writes several in any order.
    metadata = {ABOUT: json.dumps(about, sort_keys=True)}
    atomic_write_bytes(path, save({NAME: matrix.C.contiguous()}, metadata))


def load_matrix(path: Path) -> Matrix:
    """The matrix in a .npy file, or the one tensor in a .safetensors file, of any float dtype; no pickle is read.

    Raises CovarianceError that begins with the path: no such file, one that cannot be read, anything but one square
    matrix of finite floats. `factorise` checks the rest.
    """
    try:
        if path.suffix == ".npy":
            matrix = Matrix(_read_npy(path))
        elif path.suffix == ".safetensors":
            matrix = _read_safetensors(path)
        else:
            raise CovarianceError(f"found a {path.suffix or 'nameless'} file, expected {' or '.join(SUFFIXES)}")
        check_matrix(matrix.C)
    except OSError as error:
        raise CovarianceError(f"{path}: found {error.strerror or error}, expected a readable file") from error
    except (SafetensorError, ValueError) as error:
        raise CovarianceError(f"{path}: {error}") from error
    except (KeyError, TypeError) as error:
        raise CovarianceError(f"{path}: found incomplete metadata {ABOUT!r} ({error!r})") from error
    return matrix


def _read_npy(path: Path) -> Tensor:
    with path.open("rb") as file:
        try:
            values = np.lib.format.read_array(file, allow_pickle=False)
        except ValueError as error:
            raise CovarianceError(f"found no whole .npy array of numbers ({error}), expected one") from error
    if values.dtype.kind != "f":
        raise CovarianceError(f"found values of type {values.dtype}, expected floats")
    return torch.from_numpy(np.ascontiguousarray(values, dtype=np.float64))


def _read_safetensors(path: Path) -> Matrix:
    with path.open("rb"):  # safetensors itself does not say why a file cannot be opened
        pass
    with safe_open(path, framework="pt") as file:
        metadata, names = file.metadata() or {}, list(file.keys())
        if len(names) != 1:
            raise CovarianceError(f"found the tensors {', '.join(names) or 'none'}, expected one alone")
        values: Tensor = file.get_tensor(names[0])
    if not values.is_floating_point():
        raise CovarianceError(f"found values of type {str(values.dtype).removeprefix('torch.')}, expected floats")
    C = values.to(torch.float64, copy=True)  # own memory, not a view of the file
    if ABOUT not in metadata:
        return Matrix(C)
    about = json.loads(metadata[ABOUT])
    if about["format"] != MATRIX_FORMAT:
        raise CovarianceError(f"found version {about['format']} of the file format, expected {MATRIX_FORMAT}")
    if about["sha256"] != _sha256(C):
        raise CovarianceError("found contents that differ from their checksum")
    return Matrix(C, about["count"], about["origin"])


def _sha256(C: Tensor) -> str:
    return hashlib.sha256(f"{tuple(C.shape)} ".encode() + C.double().contiguous().numpy().tobytes()).hexdigest()
