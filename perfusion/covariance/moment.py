"""The second moment C = E[e eᵀ] of text encodings as a sum that grows."""

from dataclasses import dataclass

import torch
from torch import Tensor


class CovarianceError(ValueError):
    """A second moment that cannot be used; the message says what was found and what was expected."""


def check_matrix(C: Tensor) -> None:
    """Raise CovarianceError unless `C` is a square matrix (d, d) of finite values."""
    if C.dim() != 2 or C.shape[0] != C.shape[1] or not len(C):
        raise CovarianceError(f"second moment: found shape {tuple(C.shape)}, expected a square matrix (d, d)")
    if bad := int((~C.isfinite()).sum()):
        raise CovarianceError(f"second moment: found {bad} entries of NaN or infinity, expected finite values")


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

    def update(self, encodings: Tensor) -> None:
        """Add every position of `encodings` (B, N, d), any float dtype and device. Raises CovarianceError."""
        rows = encodings.detach().flatten(0, -2)
        rows = (rows.cpu() if rows.device.type == "mps" else rows).double()  # MPS has no float64
        product = (rows.T @ rows).cpu()
        if not product.isfinite().all():
            raise CovarianceError(
                f"encodings: found NaN or infinity in a batch of shape {tuple(encodings.shape)}, expected finite values"
            )
        self.total += product
        self.count += len(rows)

    def value(self) -> Tensor:
        """C (d, d), float64, exactly symmetric. Raises CovarianceError when nothing was added."""
        if self.count == 0:
            raise CovarianceError("second moment: found no encodings, expected at least one")
        return (self.total + self.total.T) / (2 * self.count)
