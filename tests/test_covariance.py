"""Second moment: streaming, factorisation and its errors, and the cache on disk."""

import json
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors import safe_open
from torch import Tensor

from perfusion import files
from perfusion.covariance import cache
from perfusion.covariance.cache import PartialSum, cached_second_moment
from perfusion.covariance.factor import factorise
from perfusion.covariance.moment import CovarianceError, SecondMoment
from perfusion.covariance.stream import accumulate

D = 6
CAPTIONS = [f"caption {k}" for k in range(11)]
KEY = {"text_encoder": "ab12", "tokenizer": "cd34", "captions": "ef56", "tokens": "all", "dtype": "float32"}


def encode(captions: list[str]) -> Tensor:
    """(B, 4, D): a fixed random encoding for each caption."""
    seeds = [int(caption.split()[1]) for caption in captions]
    return torch.stack([torch.randn(4, D, generator=torch.Generator().manual_seed(seed)) + 0.5 for seed in seeds])


def one_shot() -> Tensor:
    rows = encode(CAPTIONS).double().reshape(-1, D)
    return torch.einsum("nd,ne->de", rows, rows) / len(rows)


def assert_near(found: Tensor, expected: Tensor) -> None:
    np.testing.assert_allclose(found.numpy(), expected.numpy(), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("batch_size", [1, 3, 11, 100])
def test_streaming_equals_the_value_in_one_go(batch_size: int) -> None:
    moment = accumulate(iter(CAPTIONS), encode, batch_size)
    assert moment.count == 4 * len(CAPTIONS)
    assert_near(moment.value(), one_shot())
    assert torch.equal(moment.value(), moment.value().T)


def test_small_terms_are_not_lost_in_a_large_sum() -> None:
    moment = SecondMoment.empty(1)
    moment.update(torch.full((1, 1, 1), 1e4))
    for _ in range(100):
        moment.update(torch.full((1, 1, 1), 1.0, dtype=torch.bfloat16))  # float32 would drop every one of these
    assert moment.total.item() == 1e8 + 100


def test_accumulation_runs_in_batches_without_gradients() -> None:
    sizes: list[int] = []

    def watched(captions: list[str]) -> Tensor:
        sizes.append(len(captions))
        assert not torch.is_grad_enabled()
        return encode(captions)

    accumulate(CAPTIONS, watched, 4)
    assert sizes == [4, 4, 3]


def test_what_cannot_be_accumulated_is_refused() -> None:
    with pytest.raises(CovarianceError, match="captions: found none"):
        accumulate([], encode, 4)
    with pytest.raises(CovarianceError, match="no encodings"):
        SecondMoment.empty(D).value()
    spoilt = encode(CAPTIONS)
    spoilt[3, 1, 2] = float("inf")
    with pytest.raises(CovarianceError, match="NaN or infinity"):
        SecondMoment.empty(D).update(spoilt)


@pytest.mark.parametrize("ridge", [0.0, 1e-2])
def test_the_factor_is_that_of_the_ridged_matrix(ridge: float) -> None:
    C = one_shot()
    factor = factorise(C, ridge, dimension=D)
    expected = C + ridge * C.trace() / D * torch.eye(D, dtype=torch.float64)
    assert_near(factor @ factor.T, expected)
    assert torch.equal(factor, factor.tril()) and factor.dtype == torch.float64


def spoilt(row: int, column: int, value: float) -> Tensor:
    C = one_shot()
    C[row, column] = value
    return C


@pytest.mark.parametrize(
    ("C", "options", "message"),
    [
        (torch.eye(3)[:2], {}, r"found shape \(2, 3\), expected a square matrix"),
        (torch.ones(3), {}, r"found shape \(3,\), expected a square matrix"),
        (torch.eye(0), {}, r"found shape \(0, 0\), expected a square matrix"),
        (torch.eye(3), {"dimension": 4}, "found width 3, expected 4"),
        (torch.eye(3), {"ridge": -0.1}, "ridge: found -0.1, expected"),
        (torch.eye(3), {"ridge": float("nan")}, "ridge: found nan, expected"),
        (spoilt(1, 1, float("nan")), {}, "found 1 entries of NaN or infinity"),
        (spoilt(0, 2, float("inf")), {}, "found 1 entries of NaN or infinity"),
        (spoilt(0, 2, 9.0), {}, "asymmetry .* expected a symmetric matrix"),
        (torch.diag(torch.tensor([1.0, 2.0, -1.0])), {}, "smallest eigenvalue -1.0e.00 .* positive definite"),
        (torch.zeros(3, 3), {"ridge": 0.1}, "expected a positive definite"),
        (torch.diag(torch.tensor([1.0, 1e-9])), {}, r"condition number 1.0e\+09 .* at most 1.0e\+08"),
    ],
)
def test_a_matrix_that_cannot_be_used_is_refused(C: Tensor, options: dict[str, Any], message: str) -> None:
    with pytest.raises(CovarianceError, match=message):
        factorise(C, **{"ridge": 0.0, **options})


class Counted:
    """A `compute` that counts its calls."""

    def __init__(self) -> None:
        self.calls = 0

    def __call__(self) -> SecondMoment:
        self.calls += 1
        return accumulate(CAPTIONS, encode, 4)


def the_file(folder: Path) -> Path:
    (path,) = folder.iterdir()
    return path


def test_a_cache_hit_does_not_compute(tmp_path: Path) -> None:
    compute = Counted()
    first = cached_second_moment(KEY, compute, tmp_path / "deep" / "cache")
    again = cached_second_moment(dict(reversed(KEY.items())), compute, tmp_path / "deep" / "cache")
    assert compute.calls == 1
    assert torch.equal(first.total, again.total) and first.count == again.count == 44


@pytest.mark.parametrize("name", [*KEY, "one more"])
def test_any_other_key_input_computes(name: str, tmp_path: Path) -> None:
    compute = Counted()
    cached_second_moment(KEY, compute, tmp_path)
    cached_second_moment({**KEY, name: "other"}, compute, tmp_path)
    assert compute.calls == 2 and len(list(tmp_path.iterdir())) == 2


def test_another_version_of_the_format_computes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    compute = Counted()
    cached_second_moment(KEY, compute, tmp_path)
    monkeypatch.setattr(cache, "CACHE_FORMAT", cache.CACHE_FORMAT + 1)
    cached_second_moment(KEY, compute, tmp_path)
    assert compute.calls == 2


def test_the_file_tells_what_it_was_made_of(tmp_path: Path) -> None:
    cached_second_moment(KEY, Counted(), tmp_path)
    path = the_file(tmp_path)
    with safe_open(path, framework="pt") as file:
        metadata = file.metadata()
    assert json.loads(metadata["inputs"])["inputs"] == KEY and metadata["count"] == "44"
    assert path.suffix == ".safetensors" and len(path.stem) == 16


def without_the_end(content: bytes) -> bytes:
    return content[:-40]


def with_a_bit_flipped(content: bytes) -> bytes:
    return content[:-3] + bytes([content[-3] ^ 1]) + content[-2:]


def with_other_text(old: bytes, new: bytes) -> Callable[[bytes], bytes]:
    def changed(content: bytes) -> bytes:
        assert content.count(old) == 1
        return content.replace(old, new)

    return changed


def damaged(path: Path, change: Callable[[bytes], bytes]) -> bytes:
    """What `path` holds from now on."""
    path.write_bytes(change(path.read_bytes()))
    return path.read_bytes()


@pytest.mark.parametrize(
    "change",
    [
        *(without_the_end, lambda content: b"", with_a_bit_flipped),
        *(with_other_text(b'"count":"44"', b'"count":"45"'), with_other_text(b"ab12", b"zz99")),
    ],
)
def test_a_damaged_file_is_computed_anew(change: Any, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    compute = Counted()
    first = cached_second_moment(KEY, compute, tmp_path)
    path = the_file(tmp_path)
    damaged(path, change)
    with caplog.at_level(logging.WARNING):
        again = cached_second_moment(KEY, compute, tmp_path)
    assert compute.calls == 2 and torch.equal(first.total, again.total)
    assert path.name in caplog.text and "computing it anew" in caplog.text
    cached_second_moment(KEY, compute, tmp_path)
    assert compute.calls == 2 and the_file(tmp_path) == path  # mended, and nothing left beside it


def test_a_write_that_fails_leaves_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cached_second_moment(KEY, Counted(), tmp_path)
    path = the_file(tmp_path)
    before = damaged(path, without_the_end)

    def full(_: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(files.os, "fsync", full)
    assert cached_second_moment(KEY, Counted(), tmp_path).count == 44
    assert the_file(tmp_path) == path and path.read_bytes() == before


# --- a sum that was interrupted --------------------------------------------------------------------------------------


@pytest.fixture
def every_batch(monkeypatch: pytest.MonkeyPatch) -> None:
    """States are written after every batch."""
    monkeypatch.setattr(cache, "SAVE_EVERY_S", 0.0)


def interrupted_after(batches: int, folder: Path) -> PartialSum:
    """The sum over CAPTIONS in batches of 3, stopped by Ctrl-C after some of them."""
    partial = PartialSum(KEY, folder)
    seen: list[str] = []

    def stopping(captions: list[str]) -> Tensor:
        if len(seen) == 3 * batches:
            raise KeyboardInterrupt
        seen.extend(captions)
        return encode(captions)

    with pytest.raises(KeyboardInterrupt, match=f"the same command goes on after caption {3 * batches}"):
        accumulate(CAPTIONS, stopping, 3, partial=partial)
    return partial


@pytest.mark.usefixtures("every_batch")
@pytest.mark.parametrize("batches", [0, 1, 3])
def test_an_interrupted_sum_goes_on_and_ends_in_the_same_bits(batches: int, tmp_path: Path) -> None:
    whole = accumulate(CAPTIONS, encode, 3)
    interrupted_after(batches, tmp_path / "new")
    seen: list[str] = []

    def watched(captions: list[str]) -> Tensor:
        seen.extend(captions)
        return encode(captions)

    def compute() -> SecondMoment:
        return accumulate(iter(CAPTIONS), watched, 3, partial=PartialSum(KEY, tmp_path / "new"))

    again = cached_second_moment(KEY, compute, tmp_path / "new")
    assert seen == CAPTIONS[3 * batches :], "what was summed before is not encoded again"
    assert torch.equal(again.total, whole.total) and again.count == whole.count
    assert the_file(tmp_path / "new") == cache.cache_path(KEY, tmp_path / "new"), "the unfinished sum is gone"


def test_states_are_written_every_so_often_only(tmp_path: Path) -> None:
    accumulate(CAPTIONS, encode, 3, partial=PartialSum(KEY, tmp_path))
    assert not list(tmp_path.iterdir())
    assert cache.SAVE_EVERY_S <= 30, "what a killed process loses"


@pytest.mark.usefixtures("every_batch")
@pytest.mark.parametrize(
    "change",
    [
        *(with_other_text(b'"batch_size":"3"', b'"batch_size":"4"'), with_other_text(b"ef56", b"zz99")),
        *(without_the_end, with_a_bit_flipped),
    ],
)
def test_a_state_that_does_not_fit_is_left(change: Any, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    partial = interrupted_after(2, tmp_path)
    damaged(partial.path, change)
    with caplog.at_level(logging.WARNING):
        again = accumulate(CAPTIONS, encode, 3, partial=PartialSum(KEY, tmp_path))
    assert torch.equal(again.total, accumulate(CAPTIONS, encode, 3).total)
    assert partial.path.name in caplog.text and "starting anew" in caplog.text


@pytest.mark.usefixtures("every_batch")
def test_a_folder_that_cannot_be_written_costs_only_the_cache(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    (tmp_path / "cache").write_text("a file where the folder should be")
    partial = PartialSum(KEY, tmp_path / "cache")
    with caplog.at_level(logging.WARNING):
        moment = cached_second_moment(KEY, lambda: accumulate(CAPTIONS, encode, 3, partial=partial), tmp_path / "cache")
    assert moment.count == 44 and "not saved" in caplog.text and "not cached" in caplog.text


@pytest.mark.usefixtures("every_batch")
def test_a_finished_sum_removes_those_that_it_supersedes(tmp_path: Path) -> None:
    def abandoned(**inputs: object) -> Path:
        partial = PartialSum({**KEY, **inputs}, tmp_path)
        partial.save(accumulate(CAPTIONS[:3], encode, 3), 3, 3)
        assert partial.path.is_file()
        return partial.path

    gone = [abandoned(count=5), abandoned(count=11)]
    stay = [abandoned(count=12), abandoned(count=5, captions="other"), abandoned(), tmp_path / "0.partial.safetensors"]
    stay[-1].write_bytes(b"no safetensors file")
    cached_second_moment({**KEY, "count": 11}, lambda: accumulate(CAPTIONS, encode, 3), tmp_path)
    assert not any(path.exists() for path in gone)
    assert all(path.exists() for path in stay), "a longer sum, or one of something else, may go on"
