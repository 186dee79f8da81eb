"""The second moment C = E[e eᵀ] of text encodings as a sum that grows, and its checks and factor."""

from dataclasses import dataclass

import torch
from torch import Tensor

CONDITION_LIMIT = 1e8
SYMMETRY_TOLERANCE = 1e-6  # of the largest entry: what a float32 product may leave


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
