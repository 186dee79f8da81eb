"""Other forms of the paper's equations, to hold against what runs; float64."""

import torch
from torch import Tensor

from perfusion.editing.equations import precision_times


def inner_product(factor: Tensor, a: Tensor, b: Tensor) -> Tensor:
    """<a, b> = aᵀ C⁻¹ b. `a` and `b` (..., d) broadcast; returns (...)."""
    return (a * precision_times(factor, b)).sum(-1)


def orthonormal_basis(target_inputs: Tensor, factor: Tensor) -> Tensor:
    """u_1 … u_J: a basis of span{i*_j} with <u_j, u_k> = δ_jk (Perfusion, Appendix B).

    `target_inputs` (J, d), `factor` (d, d); returns (J, d). With C = A Aᵀ the appendix's L is A⁻ᵀ, for C⁻¹ = L Lᵀ: QR
    of Lᵀ[i*_1 … i*_J] = A⁻¹[i*_1 … i*_J], mapped back with L⁻ᵀ = A.
    """
    whitened = torch.linalg.solve_triangular(factor, target_inputs.T, upper=False)  # (d, J)
    return (factor @ torch.linalg.qr(whitened)[0]).T


def rome_update(weight: Tensor, target_input: Tensor, target_output: Tensor, inverse: Tensor) -> Tensor:
    """Ŵ = W + (o* − W i*)(C⁻¹ i*)ᵀ / ‖i*‖² (ROME, arXiv 2202.05262, Eq. 2), given C⁻¹.

    The ungated edit: Eq. 3 with g replaced by r equals Ŵ e.
    """
    direction = inverse @ target_input
    return weight + torch.outer(target_output - weight @ target_input, direction) / (target_input @ direction)
