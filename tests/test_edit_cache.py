"""What an edit computes once per prompt, and when it computes it anew."""

from collections.abc import Callable
from contextlib import ExitStack
from typing import Any

import pytest
import torch

from perfusion.backbones.base import Backbone
from perfusion.concept import Concept
from perfusion.editing.layer import gates_at, unedited
from perfusion.methods.base import Word
from tests.benches import Bench, Counter
from tests.concepts import tiny_backbone, untrained_concept


@pytest.fixture
def bench() -> Bench:
    return Bench()


@torch.no_grad()
def test_outputs_are_computed_once_per_prompt_and_reused_bit_for_bit(bench: Bench) -> None:
    bench.attach()
    counter = Counter(bench)
    first = bench()
    assert counter.calls == 8
    second = bench()
    assert counter.calls == 8 and torch.equal(first, second)
    uncached = bench(bench.context.clone())
    assert counter.calls == 16 and torch.equal(first, uncached)
    bench.gate.forget()
    assert torch.equal(bench(), first) and counter.calls == 24


@pytest.mark.parametrize("key_lock", ["local", "global"])
@pytest.mark.parametrize("count", [1, 2])
def test_a_picture_of_several_steps_is_the_same_with_and_without_what_was_kept(
    backbone: Backbone, concepts: list[Concept], count: int, key_lock: str
) -> None:
    pipe: Any = backbone.pipe
    calls: list[object] = []
    with ExitStack() as stack:
        for concept in concepts[:count]:
            stack.enter_context(concept.attach(backbone, key_lock=key_lock))
        sites = backbone.edit_sites()
        for site in sites:
            hook = unedited(site.projection).register_forward_hook(lambda *_: calls.append(None))
            stack.callback(hook.remove)

        def forget(pipe: Any, step: int, time: Any, tensors: dict[str, Any]) -> dict[str, Any]:
            for gate in gates_at(sites[0]):
                gate.forget()
            return tensors

        pictures = []
        for callback in (None, forget, None):
            forget(pipe, 0, None, {})
            calls.clear()
            settings = {"num_inference_steps": 4, "output_type": "pt", "callback_on_step_end": callback}
            generator = torch.Generator().manual_seed(0)
            prompt = "a photo of a <bear*> and a <mug*> on the beach"
            pictures.append(pipe(prompt, generator=generator, **settings).images)
            assert len(calls) == len(sites) * (pipe.num_timesteps if callback else 1)
    assert all(torch.equal(picture, pictures[0]) for picture in pictures[1:])


@pytest.fixture(scope="module")
def backbone(tmp_path_factory: pytest.TempPathFactory) -> Backbone:
    return tiny_backbone(tmp_path_factory.mktemp("covariance"))


@pytest.fixture(scope="module")
def concepts(backbone: Backbone) -> list[Concept]:
    words = (Word("<bear*>", "teddy bear"), Word("<mug*>", "mug"))
    return [untrained_concept(backbone, word, seed) for seed, word in enumerate(words)]


def test_layers_share_one_computation_of_the_gate(bench: Bench) -> None:
    bench.attach()
    calls: list[object] = []
    bench.gate.register_forward_hook(lambda *_: calls.append(None))
    with torch.no_grad():
        bench(), bench()
    assert len(calls) == 1
    for count in (2, 3):  # a graph of its own for every call, also after the same prompt without gradients
        bench()
        assert len(calls) == count


@pytest.mark.parametrize("inference", [False, True])
def test_nothing_stale_is_reused(bench: Bench, inference: bool) -> None:
    value_site = next(site for site in bench.sites if site.kind == "v")
    projection, own = value_site.projection, bench.outputs[value_site.name]
    assert own is not None
    checkpoint = {name: tensor * 1.1 for name, tensor in bench.gate.state_dict().items()}
    changes: dict[str, Callable[[], object]] = {
        "beta": lambda: setattr(bench.gate, "beta", 0.2),
        "beta per sample": lambda: setattr(bench.gate, "beta", torch.tensor([0.1, 0.9])),
        "beta in place": lambda: bench.gate.beta.add_(0.3),  # type: ignore[union-attr]
        "tau": lambda: setattr(bench.gate, "tau", 0.6),
        "target inputs": lambda: bench.gate.move(bench.gate.target_inputs * 1.5, bench.gate.directions),
        "a checkpoint": lambda: bench.gate.load_state_dict(checkpoint),
        "target outputs": lambda: own.data.mul_(2) if inference else own.mul_(2),
        "the weight": lambda: projection.weight.mul_(1.5),
        "the context": lambda: bench.context.add_(0.5),
    }
    bench.attach()
    with torch.inference_mode() if inference else torch.no_grad():
        bench.context = bench.context.clone()  # in inference mode: without a version to compare
        before = bench()
        for name, change in changes.items():
            if inference and name != "the context":
                continue
            change()
            after = bench()
            assert not torch.equal(before, after), name
            bench.gate.forget()
            assert torch.equal(bench(), after), name
            before = after


def test_nothing_is_reused_while_gradients_are_enabled(bench: Bench) -> None:
    bench.attach()
    with torch.no_grad():
        bench()  # what this keeps has no graph
    context = bench.context.requires_grad_()
    for _ in range(2):
        (gradient,) = torch.autograd.grad(bench().square().sum(), context)
        assert gradient.abs().sum() > 0
    with torch.no_grad():
        bench()
    projection = next(site for site in bench.sites if site.kind == "v").projection
    assert torch.autograd.grad(projection(context).sum(), context)[0].abs().sum() > 0


@torch.no_grad()
def test_a_layer_that_is_called_by_itself_equals_the_layer_inside_the_unet(bench: Bench) -> None:
    bench.attach()
    inside = bench.projections()
    bench.gate.forget()
    for site in bench.sites:
        assert torch.equal(site.projection(bench.context.clone()), inside[site.name])
        assert torch.equal(site.projection(bench.context), inside[site.name])


@torch.no_grad()
def test_autocast_has_outputs_of_its_own(bench: Bench) -> None:
    bench.attach()
    exact = bench()
    with torch.autocast("cpu", torch.bfloat16):
        assert all(output.dtype == torch.bfloat16 for output in bench.projections().values())
    assert torch.equal(bench(), exact)
