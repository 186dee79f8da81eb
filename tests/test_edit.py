"""`edit` on a small UNet: against Eq. 3 and Eq. 4 written out in float64, its gradients, its settings, its going."""

import copy

import pytest
import torch
from torch import Tensor

from perfusion.editing import EditError
from perfusion.editing.gate import edited_encoding
from tests.benches import BETA, TAU, Bench, Counter, snapshot


@pytest.fixture
def bench() -> Bench:
    return Bench()


@pytest.mark.parametrize("trained_keys", [False, True])
@pytest.mark.parametrize("count", range(1, 9))
@torch.no_grad()
def test_every_projection_of_the_unet_equals_the_equation_in_float64(count: int, trained_keys: bool) -> None:
    bench = Bench(count, torch.float64, trained_keys)
    plain = bench.projections()
    bench.attach()
    found = bench.projections()
    gates = bench.encoding().gates
    assert gates.min() < 0.1 and gates.max() > 0.8
    assert len(found) == len(bench.sites) == 8 and {site.kind for site in bench.sites} == {"k", "v"}
    for site in bench.sites:
        expected = bench.closed_form(site)
        torch.testing.assert_close(found[site.name], expected, rtol=1e-10, atol=1e-10)
        assert (found[site.name] - plain[site.name]).abs().max() > 0.1


def test_directions_given_as_a_function_are_computed_once_and_only_when_needed(bench: Bench) -> None:
    calls: list[Tensor] = []

    def directions(target_inputs: Tensor) -> Tensor:
        calls.append(target_inputs)
        return known

    known, expected = bench.gate.directions.clone(), bench.encoding().gates
    bench.gate.move(bench.gate.target_inputs, directions)
    assert not calls
    assert torch.equal(bench.encoding().gates, expected)
    bench.gate.settle()
    assert len(calls) == 1 and torch.equal(calls[0], bench.gate.target_inputs)
    bench.gate.move(bench.gate.target_inputs, directions)
    bench.gate.move(bench.gate.target_inputs, known)
    assert torch.equal(bench.encoding().gates, expected) and len(calls) == 1


# --- gradients --------------------------------------------------------------------------------------------------------


def gradients(bench: Bench) -> dict[str, Tensor]:
    context = bench.context.clone().requires_grad_()
    wanted = {"context": context, **{name: o for name, o in bench.outputs.items() if o is not None}}
    return dict(zip(wanted, torch.autograd.grad(bench(context).square().sum(), list(wanted.values())), strict=True))


def test_the_loss_reaches_encodings_and_outputs_and_nothing_else(bench: Bench) -> None:
    bench.attach()
    found = gradients(bench)
    assert len(found) == 5 and all(gradient.abs().sum() > 0 for gradient in found.values())
    context = bench.context.clone().requires_grad_()
    bench(context).sum().backward()
    assert all(parameter.grad is None for parameter in bench.unet.parameters())


def test_gradients_equal_finite_differences() -> None:
    bench = Bench(dtype=torch.float64)
    bench.attach()
    site = next(site for site in bench.sites if site.kind == "v")
    own = bench.outputs[site.name]
    assert own is not None
    found = gradients(bench)
    with torch.no_grad():
        for tensor, gradient in ((own, found[site.name]), (bench.context, found["context"])):
            ahead, step = torch.randn_like(tensor), 1e-6
            tensor.add_(step * ahead)
            high = bench(bench.context.clone()).square().sum()
            tensor.sub_(2 * step * ahead)
            slope = (high - bench(bench.context.clone()).square().sum()) / (2 * step)
            tensor.add_(step * ahead)
            torch.testing.assert_close((gradient * ahead).sum(), slope, rtol=1e-5, atol=1e-8)


def test_a_gate_can_be_copied_after_a_training_step(bench: Bench) -> None:
    bench.attach()
    bench(bench.context.clone().requires_grad_()).sum().backward()
    twin = copy.deepcopy(bench.gate)
    assert torch.equal(edited_encoding([twin], bench.context).locked, bench.encoding().locked)


# --- settings ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("guidance", [False, True])
@torch.no_grad()
def test_a_front_of_settings_in_one_batch_equals_one_setting_at_a_time(guidance: bool) -> None:
    bench = Bench(dtype=torch.float64)
    bench.attach()
    betas, taus = torch.tensor([[0.2, 0.9], [0.1, 0.3]], dtype=torch.float64)
    if guidance:  # the empty prompts, then the prompts
        bench.context, bench.noisy = bench.context.repeat(2, 1, 1), bench.noisy.repeat(2, 1, 1, 1)
    bench.gate.beta, bench.gate.tau = betas, taus
    together = bench()
    for k, (beta, tau) in enumerate(zip(betas.tolist(), taus.tolist(), strict=True)):
        bench.gate.beta, bench.gate.tau = beta, tau
        torch.testing.assert_close(together[k::2], bench()[k::2], rtol=1e-10, atol=1e-10)
    assert (bench()[0] - together[0]).abs().max() > 1e-4


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("tau", 0.0, "tau: found 0.0, expected finite values above 0"),
        ("tau", torch.tensor([0.1, -0.1]), "tau: found"),
        ("beta", float("nan"), "beta: found nan, expected finite values"),
        ("beta", torch.tensor([0.1, float("nan")]), "beta: found"),
        ("beta", torch.zeros(3, 2), r"beta: found shape \(3, 2\), expected a number, or \(S,\)"),
        ("beta", torch.zeros(1, 1, 1), r"beta: found shape \(1, 1, 1\)"),
    ],
)
def test_an_impossible_setting_is_refused_and_changes_nothing(
    bench: Bench, name: str, value: float | Tensor, message: str
) -> None:
    with pytest.raises(EditError, match=message):
        setattr(bench.gate, name, value)
    assert (bench.gate.beta, bench.gate.tau) == (BETA, TAU)


# --- attaching and detaching ------------------------------------------------------------------------------------------


def test_the_unets_own_state_has_nothing_of_the_concept(bench: Bench) -> None:
    _, state, _ = snapshot(bench.unet)
    bench.attach()
    after = bench.unet.state_dict()
    assert {name.replace(".base_layer", ""): tensor.shape for name, tensor in after.items()} == {
        name: tensor.shape for name, tensor in state.items()
    }
    assert not any(module.training for module in bench.unet.modules())


@torch.no_grad()
def test_the_context_may_be_positional(bench: Bench) -> None:
    bench.attach()
    expected = bench()
    counter = Counter(bench)
    assert torch.equal(bench.unet(bench.noisy, 3, bench.context).sample, expected)
    assert counter.calls == 0


HALVES = pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])


@HALVES
@pytest.mark.parametrize("count", [1, 3])
@torch.no_grad()
def test_half_precision_keeps_the_similarity_exact(count: int, dtype: torch.dtype) -> None:
    bench = Bench(count)
    context = bench.context.to(dtype)
    expected = bench.encoding(context.float())
    with torch.autocast("cpu", dtype):
        found = bench.encoding(context.float())
    half = bench.encoding(context)
    assert torch.equal(found.gates, expected.gates) and torch.equal(half.gates, expected.gates)
    for name in ("remainder", "locked"):
        exact = getattr(expected, name)
        assert torch.equal(getattr(found, name), exact) and torch.equal(getattr(half, name), exact.to(dtype)), name


@HALVES
@pytest.mark.parametrize("count", [1, 3])
@torch.no_grad()
def test_projections_in_half_precision_are_the_equation_but_for_rounding(count: int, dtype: torch.dtype) -> None:
    """Seen: 0.92 of the dtype's epsilon, times the largest output; one factor for both dtypes and any number."""
    bench = Bench(count)
    bench.attach()
    expected = {site.name: bench.closed_form(site) for site in bench.sites}
    bench.unet.to(dtype)
    bench.context, bench.noisy = bench.context.to(dtype), bench.noisy.to(dtype)
    for name, found in bench.projections().items():
        bound = 1.5 * torch.finfo(dtype).eps * expected[name].abs().max()
        assert found.dtype == dtype and (found.double() - expected[name]).abs().max() < bound, name
