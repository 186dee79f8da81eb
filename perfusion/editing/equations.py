"""The rank-one edit of Perfusion (arXiv 2305.01644) as pure functions on tensors.

Shapes: `...` any leading dimensions (samples, or none), N tokens, d width of the text encoding, h outputs of one
projection, J concepts. A concept axis always comes first, the token axis last: `r` is (..., N), for J concepts
(J, ..., N). `factor` (d, d) is the lower Cholesky factor of the second moment, C = factor · factorᵀ; it gives the
inner product <a, b> = aᵀ C⁻¹ b, in which C is never inverted.

Every function is differentiable in every tensor that it takes. What belongs to a prompt (similarity, gate) is computed
in float32 at least, whatever the inputs: a direction C⁻¹i* is long where C is small, so r(e) is a sum of large terms
that cancel. What belongs to a layer (the edited projections) is computed in the dtype of the projection's output.
"""

import torch
from torch import Tensor


def precision_times(factor: Tensor, x: Tensor) -> Tensor:
    """C⁻¹ x, by two triangular solves.

    `factor` (d, d), `x` (..., d); returns (..., d) in the wider dtype of both, at least float32. Keep `factor` in
    float64: the relative error is about the condition number of C times the rounding of that dtype.
    """
    dtype = _at_least_float32(factor, x)
    columns = x.reshape(-1, x.shape[-1]).to(dtype).T
    return torch.cholesky_solve(columns, factor.to(dtype)).T.reshape(x.shape)


def inner_product(factor: Tensor, a: Tensor, b: Tensor) -> Tensor:
    """<a, b> = aᵀ C⁻¹ b. `a` and `b` (..., d) broadcast; returns (...), in the dtype of `precision_times`."""
    return (a * precision_times(factor, b)).sum(-1)


def similarity_direction(target_input: Tensor, factor: Tensor) -> Tensor:
    """C⁻¹ i* / ‖i*‖², the vector whose dot product with an encoding is r(e) (Perfusion, similarity in Eq. 3).

    `target_input` (..., d), not zero; returns (..., d) in the dtype of `target_input`, at least float32.
    """
    direction = precision_times(factor, target_input)
    squared_norm = (target_input * direction).sum(-1, keepdim=True)
    return (direction / squared_norm).to(_at_least_float32(target_input))


def similarity(e: Tensor, direction: Tensor) -> Tensor:
    """r(e) = <i*, e> / ‖i*‖² (Perfusion, Eq. 3), and likewise <u, e> for the direction C⁻¹u.

    `e` (..., N, d), `direction` (d,), or (J, 1, ..., 1, d) for J at once; returns (..., N) or (J, ..., N).
    """
    # Not a matrix product: under autocast, or with TF32 allowed, that would round its terms before they cancel.
    dtype = _at_least_float32(e, direction)
    return (e.to(dtype) * direction.to(dtype)).sum(-1)


def gate(r: Tensor, beta: float | Tensor, tau: float | Tensor) -> Tensor:
    """g(e) = sigmoid((r(e) − β) / τ) (Perfusion, Eq. 3).

    `r` (..., N). `beta`, `tau` > 0: a number, or a tensor without token axis that broadcasts over the tokens: (B,) is
    one value per sample for `r` (B, N), or a whole front of B values for one prompt `r` (1, N); (J, B) and (J, 1)
    likewise for `r` (J, B, N). Returns (..., N) in the dtype of `r`, at least float32.
    """
    r = r.to(_at_least_float32(r))
    return torch.sigmoid((r - _over_tokens(beta, r)) / _over_tokens(tau, r))


def edited_projection(h: Tensor, r: Tensor, g: Tensor, projected_target_input: Tensor, target_output: Tensor) -> Tensor:
    """h = W (e − r(e) i*) + g(e) o*, given W e (Perfusion, Eq. 3).

    `h` (..., N, h) is the plain projection W e; `r`, `g` (..., N); `projected_target_input` (h,) is W i*;
    `target_output` (h,) is o*. Returns (..., N, h) as `low_rank_update` does.
    """
    r, g = torch.broadcast_tensors(r, g)
    return low_rank_update(h, torch.stack((-r, g)), torch.stack((projected_target_input, target_output)))


def orthonormal_basis(target_inputs: Tensor, factor: Tensor) -> Tensor:
    """u_1 … u_J: a basis of span{i*_j} with <u_j, u_k> = δ_jk (Perfusion, Appendix B).

    `target_inputs` (J, d), `factor` (d, d); returns (J, d) in the dtype of `precision_times`. With C = A Aᵀ the
    appendix's L is A⁻ᵀ, for C⁻¹ = L Lᵀ: QR of Lᵀ[i*_1 … i*_J] = A⁻¹[i*_1 … i*_J], mapped back with L⁻ᵀ = A.
    Raises ValueError where an i*_j lies in the span of those before it: two concepts that cannot be told apart.
    """
    dtype = _at_least_float32(factor, target_inputs)
    factor = factor.to(dtype)
    whitened = torch.linalg.solve_triangular(factor, target_inputs.to(dtype).T, upper=False)  # (d, J)
    count = len(target_inputs)
    if count > len(factor):
        raise ValueError(f"target inputs: found {count} of width {len(factor)}, expected at most as many as the width")
    q, remainder = torch.linalg.qr(whitened)
    # QR hands out an arbitrary unit vector for a dependent column; removing that from e would damage every prompt.
    share = remainder.detach().diagonal().abs() / whitened.detach().norm(dim=0)
    limit = torch.finfo(dtype).eps ** 0.5
    for number, s in enumerate(share.tolist(), start=1):
        if not s > limit:
            raise ValueError(
                f"target inputs: found number {number} of {count} in the span of those before it (remaining share "
                f"{s:.1e}), expected linearly independent ones (share above {limit:.1e})"
            )
    return (factor @ q).T


def edited_projection_many(
    h: Tensor, components: Tensor, gates: Tensor, projected_basis: Tensor, target_outputs: Tensor
) -> Tensor:
    """h = W (e − Σ_j <u_j, e> u_j) + Σ_j g_j(e) o*_j, given W e (Perfusion, Eq. 4).

    `h` (..., N, h) is the plain projection W e; `components` (J, ..., N) holds <u_j, e>, that is
    `similarity(e, precision_times(factor, basis)[:, None, None])` for `e` (B, N, d); `gates` (J, ..., N) holds g_j(e),
    each from its own i*_j; `projected_basis` (J, h) holds W u_j; `target_outputs` (J, h) holds o*_j.
    Returns (..., N, h) as `low_rank_update` does.
    """
    components, gates = torch.broadcast_tensors(components, gates)
    return low_rank_update(h, torch.cat((-components, gates)), torch.cat((projected_basis, target_outputs)))


def low_rank_update(h: Tensor, coefficients: Tensor, directions: Tensor) -> Tensor:
    """h + Σ_k coefficients_k ⊗ directions_k: Eq. 3 and Eq. 4 in one fused multiply-add.

    `h` (..., N, h); `coefficients` (K, ..., N), the same for every layer, so worth stacking once per prompt: (−r, g)
    for Eq. 3, (−components, gates) for Eq. 4; `directions` (K, h), (W i*, o*) or (W u_1 … W u_J, o*_1 … o*_J).
    Leading dimensions of `h` and of `coefficients` broadcast. Returns (..., N, h) in the dtype of `h`; under autocast,
    which treats it as a linear layer, give it the linear layer's output.
    """
    coefficients, directions = coefficients.to(h.dtype), directions.to(h.dtype)
    if coefficients.shape[1:] != h.shape[:-1]:  # one prompt under many gates: h is there once
        return h + coefficients.movedim(0, -1) @ directions
    # K first and transposed here, not (..., N, K): with that layout the bfloat16 product is ten times slower on CPU.
    flat = torch.addmm(h.reshape(-1, h.shape[-1]), coefficients.flatten(1).T, directions)
    return flat.view(h.shape)


def rome_update(weight: Tensor, target_input: Tensor, target_output: Tensor, factor: Tensor) -> Tensor:
    """Ŵ = W + (o* − W i*)(C⁻¹ i*)ᵀ / ‖i*‖² (ROME, arXiv 2202.05262, Eq. 2).

    The ungated edit, as a reference: Eq. 3 with g replaced by r equals Ŵ e. `weight` (h, d), `target_input` (d,),
    `target_output` (h,), all of one dtype; returns (h, d) in that dtype, at least float32.
    """
    return weight + torch.outer(target_output - weight @ target_input, similarity_direction(target_input, factor))


def _at_least_float32(*tensors: Tensor) -> torch.dtype:
    dtype = torch.float32
    for tensor in tensors:
        dtype = torch.promote_types(dtype, tensor.dtype)
    return dtype


def _over_tokens(value: float | Tensor, r: Tensor) -> float | Tensor:
    """A number as it is; a tensor in the dtype and on the device of `r`, with a token axis of 1."""
    return value.to(r).unsqueeze(-1) if isinstance(value, Tensor) else value
