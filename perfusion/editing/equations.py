"""The rank-one edit of Perfusion (arXiv 2305.01644) as pure functions on tensors.

For encodings e of a prompt and J concepts with target inputs i*_j and target outputs o*_j, Eq. 3 (J = 1) and Eq. 4 are

    h = W (e − Σ_j <u_j, e> u_j) + Σ_j g_j(e) o*_j,    g_j(e) = sigmoid((r_j(e) − β_j) / τ_j),

with r_j(e) = <i*_j, e> / <i*_j, i*_j> and an orthonormal basis u of span{i*_j}, in the inner product <a, b> = aᵀ C⁻¹ b.
What does not depend on the layer is computed once for a prompt (`edited_encoding`):

    e' = e − Σ_j <u_j, e> u_j             what the concepts do not explain of the encoding
    g_j                                   how much of each concept is there instead
    e' + Σ_j g_j s_j                      what locked keys project: W e' + Σ_j g_j o*_j, for o*_j = W s_j

A layer then needs W e' and `low_rank_update`, or W (e' + Σ_j g_j s_j) alone.

Shapes: B samples, N tokens, d width of the text encoding, h outputs of one projection. C itself is not needed: a
concept has its direction C⁻¹i*_j, which `precision_times` gives. What belongs to a prompt is computed in float32 at
least, whatever the inputs: a direction is long where C is small, so r(e) is a sum of large terms that cancel. What
belongs to a layer is computed in the dtype of the projection's output. Every function is differentiable in every tensor
that it takes, for several concepts in all but their i*_j and directions.
"""

from typing import NamedTuple

import torch
from torch import Tensor

# Eigenvalue of the cosines between concepts, whose diagonal is 1, below which a direction between them is rounding.
_SAME = 1e-4


class EditedEncoding(NamedTuple):
    """Encodings as the edited projections read them."""

    remainder: Tensor  # e' (B, N, d)
    locked: Tensor  # e' + Σ_j g_j s_j (B, N, d)
    gates: Tensor  # g_j(e) (J, B, N), float32 at least


def edited_encoding(
    e: Tensor,
    target_inputs: Tensor,
    directions: Tensor,
    superclass_inputs: Tensor,
    beta: Tensor,
    tau: Tensor,
    kept: Tensor | None = None,
    gated: Tensor | None = None,
    counts: Tensor | None = None,
) -> EditedEncoding:
    """What Eq. 4, for one concept Eq. 3, makes of encodings `e` (B, N, d), any float dtype; encodings come in the same.

    Args:
        target_inputs: i*_j, (J, d).
        directions: C⁻¹i*_j, (J, d), each at a scale of its own.
        superclass_inputs: s_j of locked keys, (J, d).
        beta, tau: β_j and τ_j > 0 of each sample, (J, B).
        kept: (J, B) bool, which concepts the edit has in which sample; None: all in all. The others have β = inf, so
            that their gates are 0, and the sums go over those that are left; without any, e' = e.
        gated: (J,) bool, of which concepts the gate also rules what is taken out: h = W (e − g r i*) + g o* for one, so
            that an encoding whose gate is closed stays as it is. None: of none, as in the paper.
        counts: (B, N) bool, the positions that the attention looks at; the others stay as they are. None: all.
    """
    with torch.autocast(e.device.type, enabled=False):  # half precision would round terms before they cancel
        r = similarity(e, target_inputs, directions)
        g = gate(r, beta, tau)
        c = components(r, target_inputs, directions, kept)
        if gated is not None:
            c = torch.where(gated[:, None, None], g * c, c)
        if counts is not None:
            g, c = g * counts, c * counts
        remainder = low_rank_update(e.to(r.dtype), -c, target_inputs)
        locked = low_rank_update(remainder, g, superclass_inputs)
    return EditedEncoding(remainder.to(e.dtype), locked.to(e.dtype), g)


def similarity(e: Tensor, target_inputs: Tensor, directions: Tensor) -> Tensor:
    """r_j(e) = <i*_j, e> / <i*_j, i*_j> (Eq. 3) of encodings `e` (..., d): (J, ...).

    `target_inputs` (J, d); `directions` C⁻¹i*_j (J, d), at any scale.
    """
    over_concepts = (len(directions), *[1] * (e.dim() - 1), -1)
    own = _dot(target_inputs, directions).view(over_concepts[:-1])
    return _dot(e, directions.view(over_concepts)) / own


def gate(r: Tensor, beta: Tensor, tau: Tensor) -> Tensor:
    """g(e) = sigmoid((r(e) − β) / τ) (Eq. 3). `r` (J, B, N), `beta` and `tau` (J, B); returns (J, B, N)."""
    return torch.sigmoid((r - beta.to(r)[..., None]) / tau.to(r)[..., None])


def components(r: Tensor, target_inputs: Tensor, directions: Tensor, kept: Tensor | None = None) -> Tensor:
    """c_j (J, B, N) with Σ_j <u_j, e> u_j = Σ_j c_j i*_j, from r_j(e) (J, B, N), and i*_j and C⁻¹i*_j (J, d).

    Both are the part of e in span{i*_j}: what is left has r_k = 0 for all k, so Σ_j r_k(i*_j) c_j = r_k(e). The basis u
    itself would ask for C. What concepts explain together is taken out of an encoding once, also where their i*_j are
    nearly or exactly one.

    With `kept` (J, B) likewise, but in each sample for those concepts alone that it has there; 0 for the others.
    """
    if kept is not None:
        r = torch.where(kept[..., None], r, 0)
    if len(r) == 1:
        return r  # r(i*) = 1
    overlap = similarity(target_inputs, target_inputs, directions).cpu().double()  # MPS has no float64
    if kept is None:
        return (_inverse(overlap).to(r) @ r.flatten(1)).view_as(r)
    both = (kept.T[:, :, None] & kept.T[:, None, :]).cpu()  # (B, J, J)
    apart = _inverse(torch.where(both, overlap, torch.eye(len(r), dtype=overlap.dtype)))
    return torch.einsum("bjk,kbn->jbn", apart.to(r), r)


def cosines(target_inputs: Tensor, directions: Tensor) -> Tensor:
    """(J, J) float64: of the angles between the i*_j in the C⁻¹ metric."""
    overlap = similarity(target_inputs, target_inputs, directions).cpu().double()
    return overlap.sign() * (overlap * overlap.T).clamp(0, 1).sqrt()


def low_rank_update(h: Tensor, coefficients: Tensor, directions: Tensor) -> Tensor:
    """h + Σ_k coefficients_k ⊗ directions_k, in one fused multiply-add.

    `h` (B, N, h); `coefficients` (K, B, N), the same for every layer; `directions` (K, h). Returns (B, N, h) in the
    dtype of `h`; under autocast, which treats it as a linear layer, give it the linear layer's output.
    """
    coefficients, directions = coefficients.to(h.dtype), directions.to(h.dtype)
    # K first and transposed here, not (B, N, K): with that layout the bfloat16 product is ten times slower on CPU.
    flat = torch.addmm(h.reshape(-1, h.shape[-1]), coefficients.flatten(1).T, directions)
    return flat.view(h.shape)


def precision_times(factor: Tensor, x: Tensor) -> Tensor:
    """C⁻¹ x, by two triangular solves; C is never inverted.

    `factor` (d, d) is the lower Cholesky factor of the second moment, C = factor · factorᵀ; `x` (..., d); returns
    (..., d) in the wider dtype of both, at least float32. Keep `factor` in float64: the relative error is about the
    condition number of C times the rounding of that dtype.
    """
    dtype = _at_least_float32(factor, x)
    columns = x.reshape(-1, x.shape[-1]).to(dtype).T
    return torch.cholesky_solve(columns, factor.to(dtype)).T.reshape(x.shape)


def _dot(a: Tensor, b: Tensor) -> Tensor:
    """aᵀ b over the last dimension, float32 at least."""
    # Not a matrix product: under autocast, or with TF32 allowed, that would round its terms before they cancel.
    dtype = _at_least_float32(a, b)
    return (a.to(dtype) * b.to(dtype)).sum(-1)


def _inverse(overlap: Tensor) -> Tensor:
    """Of r_j(i*_k) (..., J, J), without the directions that are no more than rounding: they have the smallest
    eigenvalues, which are those of the cosines."""
    values, vectors = torch.linalg.eig(overlap)
    inverse = torch.where(values.real > _SAME, 1 / values.real, 0.0)
    return ((vectors * inverse[..., None, :]) @ torch.linalg.inv(vectors)).real


def _at_least_float32(*tensors: Tensor) -> torch.dtype:
    dtype = torch.float32
    for tensor in tensors:
        dtype = torch.promote_types(dtype, tensor.dtype)
    return dtype
