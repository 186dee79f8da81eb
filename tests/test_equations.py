"""`equations` against float64 closed forms written out here with an explicit inverse of C."""

import numpy as np
import pytest
import torch
from torch import Tensor

from perfusion.editing import equations

B, N, D, H = 3, 7, 12, 5
BETA, TAU = 0.7, 0.15


class World:
    """A random well-conditioned C, one projection and `count` concepts, in float64, with the formulas spelt out."""

    def __init__(self, count: int = 1, seed: int = 0) -> None:
        draw = torch.Generator().manual_seed(seed)

        def normal(*shape: int) -> Tensor:
            return torch.randn(*shape, generator=draw, dtype=torch.float64)

        samples = normal(200, D) @ normal(D, D) + normal(D)  # correlated and uncentred
        self.C = samples.T @ samples / len(samples)
        self.inverse = torch.linalg.inv(self.C)
        self.factor = torch.linalg.cholesky(self.C)
        self.e, self.W = normal(B, N, D), normal(H, D)
        self.i, self.o = normal(count, D), normal(count, H)

    def r(self, j: int = 0) -> Tensor:
        i = self.i[j]
        return self.e @ self.inverse @ i / (i @ self.inverse @ i)

    def g(self, j: int = 0) -> Tensor:
        return 1 / (1 + torch.exp(-(self.r(j) - BETA) / TAU))

    def closed_form(self) -> Tensor:
        """Eq. 4 without a basis: the C⁻¹-orthogonal projection onto the span, by its normal equations."""
        gram = self.i @ self.inverse @ self.i.T
        inside = self.e @ self.inverse @ self.i.T @ torch.linalg.inv(gram) @ self.i
        gated = sum(self.g(j)[..., None] * self.o[j] for j in range(len(self.i)))
        return (self.e - inside) @ self.W.T + gated

    def edited(self, e: Tensor | None = None, beta: float | Tensor = BETA, tau: float | Tensor = TAU) -> Tensor:
        e = self.e if e is None else e
        r = equations.similarity(e, equations.similarity_direction(self.i[0], self.factor))
        g = equations.gate(r, beta, tau)
        return equations.edited_projection(e @ self.W.T, r, g, self.W @ self.i[0], self.o[0])

    def edited_many(self, basis: Tensor | None = None, order: list[int] | None = None) -> Tensor:
        i, o = (self.i, self.o) if order is None else (self.i[order], self.o[order])
        basis = equations.orthonormal_basis(i, self.factor) if basis is None else basis
        components = equations.similarity(self.e, equations.precision_times(self.factor, basis)[:, None, None])
        directions = equations.similarity_direction(i, self.factor)[:, None, None]
        gates = equations.gate(equations.similarity(self.e, directions), BETA, TAU)
        return equations.edited_projection_many(self.e @ self.W.T, components, gates, basis @ self.W.T, o)


def assert_near(found: Tensor, expected: Tensor, tolerance: float) -> None:
    assert found.dtype == expected.dtype and found.shape == expected.shape
    np.testing.assert_allclose(found.numpy(), expected.numpy(), rtol=tolerance, atol=tolerance)


def test_precision_and_inner_product_equal_the_explicit_inverse() -> None:
    w = World(2)
    assert_near(equations.precision_times(w.factor, w.e), w.e @ w.inverse, 1e-10)
    assert_near(equations.precision_times(w.factor, w.i[0]), w.inverse @ w.i[0], 1e-10)
    assert_near(equations.inner_product(w.factor, w.i[0], w.e), w.e @ w.inverse @ w.i[0], 1e-10)


def test_similarity_and_gate_equal_their_formulas() -> None:
    w = World()
    r = equations.similarity(w.e, equations.similarity_direction(w.i[0], w.factor))
    assert_near(r, w.r(), 1e-10)
    assert_near(equations.gate(r, BETA, TAU), w.g(), 1e-10)
    assert equations.similarity(w.i[0], equations.similarity_direction(w.i[0], w.factor)).item() == pytest.approx(1)


@pytest.mark.parametrize("seed", range(3))
def test_equation_3_equals_the_closed_form(seed: int) -> None:
    w = World(seed=seed)
    expected = (w.e - w.r()[..., None] * w.i[0]) @ w.W.T + w.g()[..., None] * w.o[0]
    assert_near(w.edited(), expected, 1e-10)


def test_ungated_equation_3_is_rome() -> None:
    w = World()
    updated = w.W + torch.outer(w.o[0] - w.W @ w.i[0], w.inverse @ w.i[0]) / (w.i[0] @ w.inverse @ w.i[0])
    assert_near(equations.rome_update(w.W, w.i[0], w.o[0], w.factor), updated, 1e-10)
    ungated = equations.edited_projection(w.e @ w.W.T, w.r(), w.r(), w.W @ w.i[0], w.o[0])
    assert_near(ungated, w.e @ updated.T, 1e-10)


def test_the_target_input_gives_the_target_output() -> None:
    w = World()
    assert_near(w.edited(w.i[0].expand(1, 1, D), beta=0.75, tau=1e-3), w.o[0].expand(1, 1, H), 1e-10)


@pytest.mark.parametrize(("beta", "tau"), [(0.75, 0.1), (0.4, 0.15)])
def test_an_orthogonal_encoding_changes_by_no_more_than_the_closed_gate(beta: float, tau: float) -> None:
    w = World()
    orthogonal = w.e - w.r()[..., None] * w.i[0]
    change = (w.edited(orthogonal, beta, tau) - orthogonal @ w.W.T).norm(dim=-1)
    bound = torch.sigmoid(torch.tensor(-beta / tau, dtype=torch.float64)) * w.o[0].norm()
    assert (change <= bound * (1 + 1e-9)).all()
    assert (change >= bound * (1 - 1e-9)).all()  # it is exactly that, so a function that does nothing fails here


@pytest.mark.parametrize("count", range(1, 9))
def test_equation_4_equals_the_closed_form(count: int) -> None:
    w = World(count)
    basis = equations.orthonormal_basis(w.i, w.factor)
    assert_near(basis @ w.inverse @ basis.T, torch.eye(count, dtype=torch.float64), 1e-9)
    assert_near(w.edited_many(), w.closed_form(), 1e-9)


def test_equation_4_for_one_concept_is_equation_3() -> None:
    w = World(1)
    assert_near(w.edited_many(), w.edited(), 1e-10)


def test_equation_4_does_not_depend_on_order_or_basis() -> None:
    w = World(4)
    assert_near(w.edited_many(order=[2, 0, 3, 1]), w.edited_many(), 1e-9)
    rotation = torch.linalg.qr(torch.randn(4, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(1)))[0]
    rotated = rotation @ equations.orthonormal_basis(w.i, w.factor)
    assert_near(w.edited_many(basis=rotated), w.edited_many(), 1e-9)


def test_concepts_that_cannot_be_told_apart_are_refused() -> None:
    w = World(3)
    twice = torch.stack((w.i[0], w.i[1], 2 * w.i[0] - w.i[1]))
    with pytest.raises(ValueError, match="number 3 of 3 in the span"):
        equations.orthonormal_basis(twice, w.factor)
    with pytest.raises(ValueError, match=f"found {D + 1} of width {D}"):
        equations.orthonormal_basis(torch.randn(D + 1, D), w.factor)


def test_gradients_of_equation_3() -> None:
    w = World()

    def output(e: Tensor, i: Tensor, o: Tensor, weight: Tensor, beta: Tensor, tau: Tensor) -> Tensor:
        r = equations.similarity(e, equations.similarity_direction(i, w.factor))
        return equations.edited_projection(e @ weight.T, r, equations.gate(r, beta, tau), weight @ i, o)

    beta = torch.tensor([0.5, 0.7, 0.9], dtype=torch.float64)
    inputs = (w.e, w.i[0], w.o[0], w.W, beta, torch.tensor(0.4, dtype=torch.float64))
    assert torch.autograd.gradcheck(output, [x.clone().requires_grad_() for x in inputs])


def test_gradients_of_equation_4() -> None:
    w = World(3)

    def output(e: Tensor, i: Tensor, o: Tensor) -> Tensor:
        basis = equations.orthonormal_basis(i, w.factor)
        components = equations.similarity(e, equations.precision_times(w.factor, basis)[:, None, None])
        directions = equations.similarity_direction(i, w.factor)[:, None, None]
        gates = equations.gate(equations.similarity(e, directions), 0.5, 0.4)
        return equations.edited_projection_many(e @ w.W.T, components, gates, basis @ w.W.T, o)

    assert torch.autograd.gradcheck(output, [x.clone().requires_grad_() for x in (w.e, w.i, w.o)])


def test_gates_per_sample_equal_separate_calls() -> None:
    w = World()
    betas, taus = torch.tensor([0.2, 0.5, 0.8]).double(), torch.tensor([0.1, 0.15, 0.3]).double()
    separate = torch.cat([w.edited(w.e[[k]], float(betas[k]), float(taus[k])) for k in range(B)])
    assert_near(w.edited(beta=betas, tau=taus), separate, 1e-12)


def test_a_front_of_gates_for_one_prompt_equals_separate_calls() -> None:
    w = World()
    betas = torch.linspace(0.1, 0.9, 5).double()
    separate = torch.cat([w.edited(w.e[:1], beta=float(beta)) for beta in betas])
    assert_near(w.edited(w.e[:1], beta=betas), separate, 1e-12)


def test_one_encoding_without_sample_axis() -> None:
    w = World()
    assert_near(w.edited(w.e[0]), w.edited()[0], 1e-12)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_rounding_stays_within_two_units_of_the_terms(dtype: torch.dtype) -> None:
    """|found − exact| ≤ 2 eps (|W e| + |r W i*| + |g o*|), for inputs that are the rounded ones in both."""
    w = World()
    w.e, w.W, w.i, w.o = (x.to(dtype) for x in (w.e, w.W, w.i, w.o))
    h, projected = w.e @ w.W.T, w.W @ w.i[0]
    r = equations.similarity(w.e, equations.similarity_direction(w.i[0], w.factor))
    found = equations.edited_projection(h, r, equations.gate(r, BETA, TAU), projected, w.o[0])
    assert r.dtype == torch.float32 and found.dtype == dtype

    w.e, w.W, w.i, w.o = (x.double() for x in (w.e, w.W, w.i, w.o))
    assert_near(r.double(), w.r(), 1e-5)  # half inputs, single-precision similarity
    terms = h.double(), -w.r()[..., None] * projected.double(), w.g()[..., None] * w.o[0]
    bound = 2 * torch.finfo(dtype).eps * sum(term.abs() for term in terms)
    assert ((found.double() - sum(terms)).abs() <= bound + 1e-5 * (dtype == torch.float32)).all()


def test_similarity_and_gate_are_not_rounded_by_autocast() -> None:
    w = World()
    e, direction = w.e.float(), equations.similarity_direction(w.i[0], w.factor).float()
    with torch.autocast("cpu", torch.bfloat16):
        r = equations.similarity(e, direction)
        g = equations.gate(r.bfloat16(), BETA, TAU)
    assert_near(r, w.r().float(), 1e-5)
    assert g.dtype == torch.float32
