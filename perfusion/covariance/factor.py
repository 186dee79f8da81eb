"""C with a ridge: checked, and factorised for the metric <a, b> = aᵀ C⁻¹ b."""

import torch
from torch import Tensor

from perfusion.covariance.moment import CovarianceError, check_matrix

CONDITION_LIMIT = 1e8
SYMMETRY_TOLERANCE = 1e-6  # of the largest entry: what a float32 product may leave


def factorise(C: Tensor, ridge: float, dimension: int | None = None) -> Tensor:
    """The lower Cholesky factor (d, d), float64 on the CPU, of C + ridge · mean(diag C) · I.

    `C` (d, d), any float dtype; `ridge` ≥ 0 in units of the mean diagonal, so that it means the same for every text
    encoder; `dimension` is the width that the edited projections read, where known.
    Raises CovarianceError for a wrong shape, NaN or infinity, asymmetry, a matrix that is not positive definite with
    this ridge, or a condition number above CONDITION_LIMIT: beyond it, similarities in float32 lose their digits.
    """
    check_matrix(C)
    if dimension is not None and C.shape[0] != dimension:
        raise CovarianceError(f"second moment: found width {C.shape[0]}, expected {dimension} as the projections read")
    if not ridge >= 0 or ridge == float("inf"):
        raise CovarianceError(f"ridge: found {ridge}, expected a finite number of at least 0")
    C = C.detach().cpu().double()
    asymmetry = float((C - C.T).abs().max() / C.abs().max().clamp_min(torch.finfo(C.dtype).tiny))
    if asymmetry > SYMMETRY_TOLERANCE:
        raise CovarianceError(
            f"second moment: found an asymmetry of {asymmetry:.1e} of its largest entry, expected a symmetric matrix "
            f"(at most {SYMMETRY_TOLERANCE:.0e})"
        )
    C = (C + C.T) / 2
    regular = C + ridge * C.diagonal().mean() * torch.eye(len(C), dtype=C.dtype)
    smallest, largest = extreme_eigenvalues(regular)
    factor, failed = torch.linalg.cholesky_ex(regular)
    if smallest <= 0 or failed:
        raise CovarianceError(
            f"second moment: found smallest eigenvalue {smallest:.1e} (largest {largest:.1e}) with ridge {ridge:g}, "
            "expected a positive definite matrix; use more captions or a larger ridge"
        )
    condition = largest / smallest
    if condition > CONDITION_LIMIT:
        raise CovarianceError(
            f"second moment: found condition number {condition:.1e} with ridge {ridge:g}, expected at most "
            f"{CONDITION_LIMIT:.1e}; use more captions or a larger ridge"
        )
    return factor


def extreme_eigenvalues(C: Tensor) -> tuple[float, float]:
    """The smallest and the largest of a symmetric matrix; their ratio is its condition number."""
    eigenvalues = torch.linalg.eigvalsh(C)  # ascending
    return float(eigenvalues[0]), float(eigenvalues[-1])
