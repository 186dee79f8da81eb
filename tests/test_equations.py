"""`equations` against float64 closed forms written out here with an explicit inverse of C."""

import numpy as np
import pytest
import torch
from torch import Tensor

from perfusion.editing.equations import (
    EditedEncoding,
    cosines,
    edited_encoding,
    gate,
    low_rank_update,
    precision_times,
    similarity,
)
from tests.references import orthonormal_basis, rome_update

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
        self.i, self.o, self.s = normal(count, D), normal(count, H), normal(count, D)

    def r(self, j: int = 0) -> Tensor:
        i = self.i[j]
        return self.e @ self.inverse @ i / (i @ self.inverse @ i)

    def g(self, j: int = 0) -> Tensor:
        return 1 / (1 + torch.exp(-(self.r(j) - BETA) / TAU))

    def closed_form(self, among: list[int] | None = None) -> Tensor:
        """Eq. 4 without a basis: the C⁻¹-orthogonal projection onto the span, by its normal equations."""
        among = [*range(len(self.i))] if among is None else among
        i = self.i[among]
        inside = self.e @ self.inverse @ i.T @ torch.linalg.inv(i @ self.inverse @ i.T) @ i
        gated = sum(self.g(j)[..., None] * self.o[j] for j in among)
        return (self.e - inside) @ self.W.T + gated

    def encoding(
        self,
        e: Tensor | None = None,
        beta: float | Tensor = BETA,
        tau: float | Tensor = TAU,
        order: list[int] | None = None,
        kept: Tensor | None = None,
        gated: Tensor | None = None,
    ) -> EditedEncoding:
        e = self.e if e is None else e
        i, s = (self.i, self.s) if order is None else (self.i[order], self.s[order])
        beta, tau = (torch.as_tensor(value, dtype=torch.float64).expand(len(i), len(e)) for value in (beta, tau))
        directions = precision_times(self.factor, i).to(torch.promote_types(i.dtype, torch.float32))
        return edited_encoding(e, i, directions, s, beta, tau, kept, gated)

    def edited(self, *args: object, order: list[int] | None = None, **settings: object) -> Tensor:
        """What the edit makes of the projection W e."""
        found = self.encoding(*args, order=order, **settings)  # type: ignore[arg-type]
        return low_rank_update(found.remainder @ self.W.T, found.gates, self.o if order is None else self.o[order])


def assert_near(found: Tensor, expected: Tensor, tolerance: float) -> None:
    assert found.dtype == expected.dtype and found.shape == expected.shape
    np.testing.assert_allclose(found.numpy(), expected.numpy(), rtol=tolerance, atol=tolerance)


def test_precision_equals_the_explicit_inverse() -> None:
    w = World(2)
    assert_near(precision_times(w.factor, w.e), w.e @ w.inverse, 1e-10)
    assert_near(precision_times(w.factor, w.i[0]), w.inverse @ w.i[0], 1e-10)


@pytest.mark.parametrize("scale", [1.0, 1e-4, 3e3])
def test_similarity_and_gate_equal_their_formulas(scale: float) -> None:
    """At any scale of the directions."""
    w = World(2)
    directions = scale * precision_times(w.factor, w.i)
    r = similarity(w.e, w.i, directions)
    assert_near(r, torch.stack([w.r(0), w.r(1)]), 1e-10)
    settings = torch.tensor([BETA, TAU], dtype=torch.float64)[:, None, None].expand(2, 2, B)
    assert_near(gate(r, *settings), torch.stack([w.g(0), w.g(1)]), 1e-10)
    assert_near(similarity(w.i, w.i, directions).diagonal(), torch.ones(2).double(), 1e-12)


@pytest.mark.parametrize("seed", range(3))
def test_equation_3_equals_the_closed_form(seed: int) -> None:
    w = World(seed=seed)
    expected = (w.e - w.r()[..., None] * w.i[0]) @ w.W.T + w.g()[..., None] * w.o[0]
    assert_near(w.edited(), expected, 1e-10)


def test_locked_keys_are_the_projection_of_the_locked_encoding() -> None:
    w = World(3)
    w.o = w.s @ w.W.T
    assert_near(w.encoding().locked @ w.W.T, w.edited(), 1e-10)


def test_ungated_equation_3_is_rome() -> None:
    w = World()
    ungated = low_rank_update(w.encoding().remainder @ w.W.T, w.r()[None], w.o)
    assert_near(ungated, w.e @ rome_update(w.W, w.i[0], w.o[0], w.inverse).T, 1e-10)


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
    assert_near(w.edited(), w.closed_form(), 1e-9)


@pytest.mark.parametrize("count", range(1, 9))
def test_equation_4_equals_the_one_with_the_orthonormal_basis_of_appendix_b(count: int) -> None:
    w = World(count)
    basis = orthonormal_basis(w.i, w.factor)
    assert_near(basis @ w.inverse @ basis.T, torch.eye(count, dtype=torch.float64), 1e-9)
    components = w.e @ w.inverse @ basis.T  # <u_j, e>
    gated = sum(w.g(j)[..., None] * w.o[j] for j in range(count))
    assert_near(w.edited(), (w.e - components @ basis) @ w.W.T + gated, 1e-9)


def test_equation_4_does_not_depend_on_order() -> None:
    w = World(4)
    assert_near(w.edited(order=[2, 0, 3, 1]), w.edited(), 1e-9)


def test_concepts_that_are_left_out_are_as_though_they_were_not_there() -> None:
    w = World(3)
    kept = torch.tensor([[True, False, False], [True, True, False], [False, True, False]])
    beta = torch.full((3, B), torch.inf, dtype=torch.float64).masked_fill(kept, BETA)
    found = w.edited(beta=beta, kept=kept)
    for row, among in enumerate(([0, 1], [1, 2])):
        assert_near(found[row], w.closed_form(among)[row], 1e-9)
    assert torch.equal(w.encoding(beta=beta, kept=kept).remainder[2], w.e[2])
    assert torch.equal(found[2], w.e[2] @ w.W.T)


@pytest.mark.parametrize("gated", [[True], [True, True], [True, False, True]])
def test_a_gate_may_rule_what_is_taken_out_as_well(gated: list[bool]) -> None:
    w = World(len(gated))
    part = w.e @ w.inverse @ w.i.T @ torch.linalg.inv(w.i @ w.inverse @ w.i.T)  # (B, N, J), of the i*_j in e
    expected = w.e @ w.W.T
    for j, ruled in enumerate(gated):
        g = w.g(j)[..., None]
        expected = expected - (g if ruled else 1) * part[..., j : j + 1] * (w.W @ w.i[j]) + g * w.o[j]
    assert_near(w.edited(gated=torch.tensor(gated)), expected, 1e-9)
    closed = w.encoding(beta=1e4, gated=torch.tensor([True] * len(gated)))
    assert torch.equal(closed.remainder, w.e) and torch.equal(closed.locked, w.e), "where no gate is open"


def test_cosines_are_those_of_the_angles_in_the_metric_of_c() -> None:
    w = World(3)
    gram = w.i @ w.inverse @ w.i.T
    norms = gram.diagonal().sqrt()
    assert_near(cosines(w.i, precision_times(w.factor, w.i)), gram / norms / norms[:, None], 1e-9)


def test_gradients_of_equation_3() -> None:
    w = World()

    def output(e: Tensor, i: Tensor, s: Tensor, o: Tensor, weight: Tensor, beta: Tensor, tau: Tensor) -> Tensor:
        found = edited_encoding(e, i, precision_times(w.factor, i), s, beta[None], tau.expand(1, B))
        return low_rank_update(found.remainder @ weight.T, found.gates, o) + found.locked @ weight.T

    beta = torch.tensor([0.5, 0.7, 0.9], dtype=torch.float64)
    inputs = (w.e, w.i, w.s, w.o, w.W, beta, torch.tensor(0.4, dtype=torch.float64))
    assert torch.autograd.gradcheck(output, [x.clone().requires_grad_() for x in inputs])


def test_gradients_of_equation_4() -> None:
    w = World(3)
    directions, half = precision_times(w.factor, w.i), torch.full((3, B), 0.5, dtype=torch.float64)

    def output(e: Tensor, s: Tensor, o: Tensor) -> Tensor:
        found = edited_encoding(e, w.i, directions, s, half, half)
        return low_rank_update(found.remainder @ w.W.T, found.gates, o) + found.locked @ w.W.T

    assert torch.autograd.gradcheck(output, [x.clone().requires_grad_() for x in (w.e, w.s, w.o)])


def test_gates_per_sample_equal_separate_calls() -> None:
    w = World()
    betas, taus = torch.tensor([0.2, 0.5, 0.8]).double(), torch.tensor([0.1, 0.15, 0.3]).double()
    separate = torch.cat([w.edited(w.e[[k]], float(betas[k]), float(taus[k])) for k in range(B)])
    assert_near(w.edited(beta=betas, tau=taus), separate, 1e-12)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_rounding_stays_within_two_units_of_the_terms(dtype: torch.dtype) -> None:
    """|found − exact| ≤ 2 eps (|W e'| + |g o*|), for inputs that are the rounded ones in both; and e' likewise."""
    w = World()
    w.e, w.W, w.i, w.o = (x.to(dtype) for x in (w.e, w.W, w.i, w.o))
    encoding = w.encoding()
    h = encoding.remainder @ w.W.T
    found = low_rank_update(h, encoding.gates, w.o)
    assert encoding.gates.dtype == torch.float32 and encoding.remainder.dtype == found.dtype == dtype

    w.e, w.W, w.i, w.o = (x.double() for x in (w.e, w.W, w.i, w.o))
    assert_near(encoding.gates[0].double(), w.g(), 1e-4)  # half inputs, single-precision similarity
    slack = 1e-5 * (dtype == torch.float32)
    for value, terms in (
        (found, (h.double(), w.g()[..., None] * w.o[0])),
        (encoding.remainder, (w.e, -w.r()[..., None] * w.i[0])),
    ):
        bound = 2 * torch.finfo(dtype).eps * sum(term.abs() for term in terms)
        assert ((value.double() - sum(terms)).abs() <= bound + slack).all()


def test_nothing_of_a_prompt_is_rounded_by_autocast() -> None:
    w = World()
    exact_r = w.r().float()
    w.e, w.i, w.s = w.e.float(), w.i.float(), w.s.float()
    expected = w.encoding()
    with torch.autocast("cpu", torch.bfloat16):
        found = w.encoding()
        r = similarity(w.e, w.i, precision_times(w.factor, w.i).float())
    assert_near(r[0], exact_r, 1e-5)
    assert all(torch.equal(part, exact) for part, exact in zip(found, expected, strict=True))
