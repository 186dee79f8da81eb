"""C as a file: what is written comes back, .npy and .safetensors are read alike, and nothing else is taken."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from perfusion.covariance.matrix import Matrix, load_matrix, save_matrix
from perfusion.covariance.moment import CovarianceError

D = 5
ORIGIN = {"name": "everyday", "count": 30, "positions": "all", "text_encoder": "ab12"}


def some_matrix() -> Tensor:
    rows = torch.randn(40, D, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    return rows.T @ rows / 40


def test_what_is_written_comes_back(tmp_path: Path) -> None:
    C = some_matrix()
    save_matrix(tmp_path / "C.safetensors", Matrix(C, 40, ORIGIN))
    found = load_matrix(tmp_path / "C.safetensors")
    assert torch.equal(found.C, C) and found.C.dtype == torch.float64
    assert (found.count, found.origin) == (40, ORIGIN)
    with safe_open(tmp_path / "C.safetensors", framework="pt") as file:
        assert list(file.keys()) == ["second_moment"] and file.metadata().keys() == {"perfusion.second_moment"}
    before = (tmp_path / "C.safetensors").read_bytes()
    save_matrix(tmp_path / "C.safetensors", found)
    assert (tmp_path / "C.safetensors").read_bytes() == before
    assert [path.name for path in tmp_path.iterdir()] == ["C.safetensors"]


@pytest.mark.parametrize("dtype", [np.float64, np.float32, np.float16, ">f8"])
@pytest.mark.parametrize("order", ["C", "F"])
def test_matrices_of_numpy(dtype: Any, order: Any, tmp_path: Path) -> None:
    values = np.asarray(some_matrix().numpy(), dtype=dtype, order=order)
    np.save(tmp_path / "C.npy", values)
    found = load_matrix(tmp_path / "C.npy")
    assert np.array_equal(found.C.numpy(), values.astype(np.float64)) and found.C.dtype == torch.float64
    assert found.count is None and not found.origin


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_any_one_tensor_of_floats(dtype: torch.dtype, tmp_path: Path) -> None:
    C = some_matrix().to(dtype)
    save_file({"mom2": C}, tmp_path / "C.safetensors")
    found = load_matrix(tmp_path / "C.safetensors")
    assert torch.equal(found.C, C.double()) and found.count is None and not found.origin


def test_the_digest_is_that_of_the_values_alone(tmp_path: Path) -> None:
    C = some_matrix()
    np.save(tmp_path / "C.npy", C.numpy())
    save_matrix(tmp_path / "C.safetensors", Matrix(C, 40, ORIGIN))
    digest = load_matrix(tmp_path / "C.npy").digest
    assert len(digest) == 12 and digest == load_matrix(tmp_path / "C.safetensors").digest == Matrix(C).digest
    C[0, 0] *= 1 + 1e-15
    assert Matrix(C).digest != digest


def ours(change: Callable[[bytes], bytes]) -> Callable[[Path], None]:
    """Writes what this project would, changed."""

    def write(path: Path) -> None:
        save_matrix(path, Matrix(some_matrix(), 40, {}))
        path.write_bytes(change(path.read_bytes()))

    return write


def cut(path: Path) -> None:
    np.save(path, some_matrix().numpy())
    path.write_bytes(path.read_bytes()[:-8])


@pytest.mark.parametrize(
    ("name", "write", "message"),
    [
        ("C.npy", lambda path: None, "found No such file or directory, expected a readable file"),
        ("C.safetensors", lambda path: None, "found No such file or directory, expected a readable file"),
        ("C.npy", lambda path: path.mkdir(), "found Is a directory"),
        ("C.safetensors", lambda path: path.mkdir(), "found Is a directory"),
        ("C.pt", lambda path: path.write_text(""), "found a .pt file, expected .safetensors or .npy"),
        ("C", lambda path: path.write_text(""), "found a nameless file, expected .safetensors or .npy"),
        ("C.npy", lambda path: path.write_text("no array"), "found no whole .npy array of numbers .*magic string"),
        ("C.safetensors", lambda path: path.write_text("no tensors"), "C.safetensors: "),
        ("C.npy", lambda path: np.save(path, np.array([{}], dtype=object)), "Object arrays cannot be loaded"),
        ("C.npy", cut, "found no whole .npy array of numbers"),
        ("C.npy", lambda path: np.save(path, np.eye(3, dtype=int)), "found values of type int64, expected floats"),
        ("C.npy", lambda path: np.save(path, np.eye(3, dtype=complex)), "found values of type complex128, expected"),
        ("C.safetensors", lambda path: save_file({"a": torch.eye(3).int()}, path), "found values of type int32"),
        (
            "C.safetensors",
            lambda path: save_file({"a": torch.eye(2), "b": torch.eye(2)}, path),
            "found the tensors a, b, ",
        ),
        ("C.npy", lambda path: np.save(path, np.ones((3, 2))), r"found shape \(3, 2\), expected a square matrix"),
        ("C.npy", lambda path: np.save(path, np.ones(3)), r"found shape \(3,\), expected a square matrix"),
        ("C.npy", lambda path: np.save(path, np.diag([1.0, np.nan])), "found 1 entries of NaN or infinity"),
        ("C.safetensors", ours(lambda data: data.replace(b"count", b"cuont", 1)), "found incomplete metadata"),
        (
            "C.safetensors",
            ours(lambda data: data.replace(b'format\\": 1', b'format\\": 9')),
            "found version 9 .* expected 1",
        ),
        (
            "C.safetensors",
            ours(lambda data: data[:-3] + bytes([data[-3] ^ 1]) + data[-2:]),
            "differ from their checksum",
        ),
    ],
)
def test_what_is_no_matrix_is_refused(name: str, write: Any, message: str, tmp_path: Path) -> None:
    path = tmp_path / name
    write(path)
    with pytest.raises(CovarianceError, match=message) as caught:
        load_matrix(path)
    assert str(caught.value).startswith(f"{path}: ")
