"""The second moment C = E[e eᵀ] of text encodings: streamed, cached, factorised (DESIGN sections 1 and 7).

C is uncentred, and covers every position that the cross-attention sees: beginning, words, end and padding. Without the
padding the similarity at padding positions is far from zero, and the edit damages every prompt.
"""

import hashlib
import json
import logging
from collections.abc import Callable, Iterable, Iterator, Mapping, Sized
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor
from tqdm.auto import tqdm

from perfusion.files import atomic_write_bytes

CACHE_FORMAT = 1
CONDITION_LIMIT = 1e8
SYMMETRY_TOLERANCE = 1e-6  # of the largest entry: what a float32 product may leave

_log = logging.getLogger(__name__)


class CovarianceError(ValueError):
    """A second moment that cannot be used; the message says what was found and what was expected."""


@dataclass
class SecondMoment:
    """A running Σ e eᵀ over encodings, exact to float64 whatever their dtype.

    `total` (d, d) float64 on the CPU; `count` is the number of positions in it.
    """

    total: Tensor
    count: int = 0

    @classmethod
    def empty(cls, dimension: int) -> "SecondMoment":
        """No encodings yet, of width `dimension`."""
        return cls(torch.zeros(dimension, dimension, dtype=torch.float64))

    @property
    def dimension(self) -> int:
        return self.total.shape[0]

    def update(self, encodings: Tensor) -> None:
        """Add every position of `encodings` (B, N, d), any float dtype and device. Raises CovarianceError."""
        if encodings.shape[-1] != self.dimension:
            raise CovarianceError(f"encodings: found width {encodings.shape[-1]}, expected {self.dimension}")
        rows = encodings.detach().flatten(0, -2)
        rows = (rows.cpu() if rows.device.type == "mps" else rows).double()  # MPS has no float64
        product = (rows.T @ rows).cpu()
        if not product.isfinite().all():
            raise CovarianceError(
                f"encodings: found NaN or infinity in a batch of shape {tuple(encodings.shape)}, expected finite values"
            )
        self.total += product
        self.count += len(rows)

    def merge(self, other: "SecondMoment") -> None:
        """Add what another accumulator saw, as though its encodings had come here. Raises CovarianceError."""
        if other.dimension != self.dimension:
            raise CovarianceError(f"merged second moment: found width {other.dimension}, expected {self.dimension}")
        self.total += other.total
        self.count += other.count

    def value(self) -> Tensor:
        """C (d, d), float64, exactly symmetric. Raises CovarianceError when nothing was added."""
        if self.count == 0:
            raise CovarianceError("second moment: found no encodings, expected at least one")
        return (self.total + self.total.T) / (2 * self.count)


@dataclass(frozen=True)
class Factorised:
    """C + ridge · mean(diag C) · I, ready for `rank_one`.

    `factor` (d, d) float64 on the CPU, lower, with factor · factorᵀ equal to that matrix; `condition` its condition
    number (largest over smallest eigenvalue); `ridge` as given; `count` the positions behind C, None where not told.
    """

    factor: Tensor
    condition: float
    ridge: float
    count: int | None = None

    @property
    def dimension(self) -> int:
        return self.factor.shape[0]


def factorise(
    C: Tensor,
    ridge: float,
    *,
    dimension: int | None = None,
    count: int | None = None,
    condition_limit: float = CONDITION_LIMIT,
) -> Factorised:
    """Check C and take the Cholesky factor of C + ridge · mean(diag C) · I.

    `C` (d, d), any float dtype; `ridge` ≥ 0 in units of the mean diagonal, so that it means the same for every text
    encoder; `dimension` is the width that the edited projections read, where known; `count` is only passed on.
    Raises CovarianceError for a wrong shape, NaN or infinity, asymmetry, a matrix that is not positive definite with
    this ridge, or a condition number above `condition_limit`: beyond it, similarities in float32 lose their digits.
    """
    if C.dim() != 2 or C.shape[0] != C.shape[1] or not len(C):
        raise CovarianceError(f"second moment: found shape {tuple(C.shape)}, expected a square matrix (d, d)")
    if dimension is not None and C.shape[0] != dimension:
        raise CovarianceError(f"second moment: found width {C.shape[0]}, expected {dimension} as the projections read")
    if not ridge >= 0 or ridge == float("inf"):
        raise CovarianceError(f"ridge: found {ridge}, expected a finite number of at least 0")
    C = C.detach().cpu().double()
    if bad := int((~C.isfinite()).sum()):
        raise CovarianceError(f"second moment: found {bad} entries of NaN or infinity, expected finite values")
    asymmetry = float((C - C.T).abs().max() / C.abs().max().clamp_min(torch.finfo(C.dtype).tiny))
    if asymmetry > SYMMETRY_TOLERANCE:
        raise CovarianceError(
            f"second moment: found an asymmetry of {asymmetry:.1e} of its largest entry, expected a symmetric matrix "
            f"(at most {SYMMETRY_TOLERANCE:.0e})"
        )
    C = (C + C.T) / 2
    regular = C + ridge * C.diagonal().mean() * torch.eye(len(C), dtype=C.dtype)
    eigenvalues = torch.linalg.eigvalsh(regular)  # ascending
    smallest, largest = float(eigenvalues[0]), float(eigenvalues[-1])
    factor, failed = torch.linalg.cholesky_ex(regular)
    if smallest <= 0 or failed:
        raise CovarianceError(
            f"second moment: found smallest eigenvalue {smallest:.1e} (largest {largest:.1e}) with ridge {ridge:g}, "
            "expected a positive definite matrix; use more captions or a larger ridge"
        )
    condition = largest / smallest
    if condition > condition_limit:
        raise CovarianceError(
            f"second moment: found condition number {condition:.1e} with ridge {ridge:g}, expected at most "
            f"{condition_limit:.1e}; use more captions or a larger ridge"
        )
    return Factorised(factor, condition, ridge, count)


def accumulate(
    captions: Iterable[str],
    encode: Callable[[list[str]], Tensor],
    batch_size: int,
    progress: bool = False,
) -> SecondMoment:
    """Second moment of the encodings of `captions`, one batch in memory at a time.

    `encode` takes a list of B captions and returns (B, N, d), all positions, as the cross-attention sees them;
    it runs without gradients. `progress` shows a bar. Raises CovarianceError for no captions or a batch size below 1.
    """
    if batch_size < 1:
        raise CovarianceError(f"batch size of captions: found {batch_size}, expected at least 1")
    moment = None
    size = len(captions) if isinstance(captions, Sized) else None
    with torch.no_grad(), tqdm(total=size, desc="second moment", unit="caption", disable=not progress) as bar:
        for batch in _batches(captions, batch_size):
            encodings = encode(batch)
            assert encodings.dim() == 3 and len(encodings) == len(batch), (
                f"encode gave {tuple(encodings.shape)} for {len(batch)} captions, expected (B, N, d)"
            )
            if moment is None:
                moment = SecondMoment.empty(encodings.shape[-1])
            moment.update(encodings)
            bar.update(len(batch))
    if moment is None:
        raise CovarianceError("captions: found none, expected at least one")
    return moment


def cached_second_moment(
    key_inputs: Mapping[str, object], compute: Callable[[], SecondMoment], folder: Path
) -> SecondMoment:
    """`compute()`, or what an earlier call with the same `key_inputs` computed.

    `key_inputs` names everything that the result depends on (fingerprints of text encoder and tokenizer, hash of the
    captions, selection of tokens, dtype, ...) in JSON values; their order does not matter. The file is
    `<folder>/<first 16 hex digits of the key>.safetensors`, and its metadata holds them all. A file that is damaged or
    belongs to other inputs is logged as a warning and computed anew; so is a folder that cannot be written to.
    Raises CovarianceError for a key input that JSON cannot hold.
    """
    inputs = _canonical(key_inputs)
    path = folder / f"{hashlib.sha256(inputs.encode()).hexdigest()[:16]}.safetensors"
    try:
        return _read(path, inputs)
    except FileNotFoundError:
        pass
    except (OSError, SafetensorError, ValueError) as error:
        _log.warning("%s: cached second moment not usable (%s); computing it anew", path, error)
    moment = compute()
    metadata = {"inputs": inputs, "count": str(moment.count), "sha256": _digest(moment)}
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        atomic_write_bytes(path, save({"total": moment.total.contiguous()}, metadata))
    except OSError as error:  # a lost cache costs time, not the run
        _log.warning("%s: second moment not cached (%s)", path, error)
    return moment


def _canonical(key_inputs: Mapping[str, object]) -> str:
    """One text for equal inputs: sorted keys, no spaces, and the version of the file format."""
    for name, value in key_inputs.items():
        try:
            json.dumps(value, sort_keys=True, allow_nan=False)
        except (TypeError, ValueError) as error:
            raise CovarianceError(
                f"cache key input '{name}': found {type(value).__name__} {value!r}, expected a JSON value"
            ) from error
    content = {"format": CACHE_FORMAT, "inputs": dict(key_inputs)}
    return json.dumps(content, sort_keys=True, separators=(",", ":"), allow_nan=False)


def _read(path: Path, inputs: str) -> SecondMoment:
    """The moment in `path`; OSError, SafetensorError or ValueError unless it is whole and belongs to `inputs`."""
    with safe_open(path, framework="pt") as file:
        metadata = file.metadata() or {}
        if metadata.get("inputs") != inputs:
            raise CovarianceError(f"found key inputs {metadata.get('inputs')}, expected {inputs}")
        if list(file.keys()) != ["total"]:
            raise CovarianceError(f"found tensors {list(file.keys())}, expected ['total']")
        total = file.get_tensor("total").clone()  # own memory, not a view of the file
    if total.dtype != torch.float64 or total.dim() != 2 or total.shape[0] != total.shape[1]:
        raise CovarianceError(f"found {total.dtype} of shape {tuple(total.shape)}, expected float64 (d, d)")
    moment = SecondMoment(total, int(metadata.get("count", "")))
    if metadata.get("sha256") != _digest(moment):  # safetensors itself accepts flipped bits
        raise CovarianceError("found contents that differ from their checksum")
    return moment


def _digest(moment: SecondMoment) -> str:
    return hashlib.sha256(f"{moment.count} ".encode() + moment.total.numpy().tobytes()).hexdigest()


def _batches(captions: Iterable[str], size: int) -> Iterator[list[str]]:
    iterator = iter(captions)
    while batch := list(islice(iterator, size)):
        yield batch
