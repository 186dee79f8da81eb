"""What an edit computes once per prompt, and when it computes it anew."""

import gc
import weakref
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig

from perfusion.backbones.base import Backbone
from perfusion.concept import Concept
from perfusion.editing.equations import EditedEncoding
from perfusion.editing.gate import edited_encoding
from perfusion.editing.layer import gates_at, unedited
from perfusion.methods.base import Word
from tests.benches import Bench, Counter
from tests.concepts import tiny_backbone, tiny_sdxl_backbone, untrained_concept


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
def concepts(backbone: Backbone) -> list[Concept]:
    words = (Word("<bear*>", "teddy bear"), Word("<mug*>", "mug"))
    return [untrained_concept(backbone, word, seed) for seed, word in enumerate(words)]


def test_layers_share_one_computation_of_the_gate(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    bench.attach()
    calls: list[object] = []

    def counted(*args: Any) -> EditedEncoding:
        calls.append(None)
        return edited_encoding(*args)

    monkeypatch.setattr("perfusion.editing.layer.edited_encoding", counted)
    with torch.no_grad():
        bench(), bench()
    assert len(calls) == 1
    for count in (2, 3):  # a graph of its own for every call, also after the same prompt without gradients
        bench()
        assert len(calls) == count


@pytest.mark.parametrize("inference", [False, True])
def test_what_is_set_or_written_to_the_context_is_seen_in_the_next_call_with_it(bench: Bench, inference: bool) -> None:
    checkpoint = {name: tensor * 1.1 for name, tensor in bench.gate.state_dict().items()}
    changes: dict[str, Callable[[], object]] = {
        "beta": lambda: setattr(bench.gate, "beta", 0.2),
        "beta per sample": lambda: setattr(bench.gate, "beta", torch.tensor([0.1, 0.9])),
        "tau": lambda: setattr(bench.gate, "tau", 0.6),
        "target inputs": lambda: bench.gate.move(bench.gate.target_inputs * 1.5, bench.gate.directions),
        "a checkpoint, at the next context": lambda: (
            bench.gate.load_state_dict(checkpoint),
            setattr(bench, "context", bench.context.clone()),
        ),
        "the context": lambda: bench.context.add_(0.5),
    }
    bench.attach()
    with torch.inference_mode() if inference else torch.no_grad():
        bench.context = bench.context.clone()  # in inference mode: without a version to compare
        before = bench()
        for name, change in changes.items():
            change()
            after = bench()
            assert not torch.equal(before, after), name
            bench.gate.forget()
            assert torch.equal(bench(), after), f"{name}: as it is without anything kept"
            before = after


@torch.no_grad()
def test_what_is_kept_of_a_context_is_of_that_very_object(bench: Bench) -> None:
    """It lives as long as what was kept of it, so that no other tensor can come to lie in its place."""
    edit = bench.attach()
    context = bench.context.clone()
    alive = weakref.ref(context)
    first = bench(context)
    del context
    gc.collect()
    assert alive() is not None
    other = bench(bench.context * 2)
    gc.collect()
    assert alive() is None and not torch.equal(first, other)
    assert torch.equal(bench(bench.context.clone()), first)
    edit.detach()
    assert bench.gate.forget() is None  # there is no one left whom a change concerns


def load_style(pipe: Any) -> None:
    torch.manual_seed(0)
    settings = LoraConfig(r=2, target_modules=["to_k", "to_v"], init_lora_weights=False)
    pipe.unet.add_adapter(settings, "style")


def load_other_weights(pipe: Any) -> None:
    state = pipe.unet.state_dict()
    own = {name: value * 1.1 for name, value in state.items() if "attn2.to_" in name and "lora" not in name}
    pipe.unet.load_state_dict({**state, **own})


@pytest.mark.parametrize(("family", "first"), [("sd", "lora"), ("sdxl", "concept")])
def test_nothing_stale_is_drawn_from_the_same_prompt_embeds(tmp_path: Path, family: str, first: str) -> None:
    """Of the same encodings, without guidance, so that the pipeline might give them to the denoiser as they are."""
    backbone = tiny_backbone(tmp_path) if family == "sd" else tiny_sdxl_backbone(tmp_path)
    pipe: Any = backbone.pipe
    given: dict[str, Any] = {"num_inference_steps": 2, "guidance_scale": 1.0, "output_type": "latent"}
    concept = untrained_concept(backbone, Word("<bear*>", "teddy bear"), 0)
    mug = untrained_concept(backbone, Word("<mug*>", "mug"), 1)
    if first == "lora":
        load_style(pipe)
    attached = concept.attach(backbone)
    if first == "concept":
        load_style(pipe)
    encoded, _, *pooled = pipe.encode_prompt(
        "a <bear*>", device="cpu", num_images_per_prompt=1, do_classifier_free_guidance=False
    )
    given |= {"prompt_embeds": encoded} | ({"pooled_prompt_embeds": pooled[0]} if pooled else {})

    def draw(**more: Any) -> torch.Tensor:
        return pipe(generator=torch.Generator().manual_seed(0), **given, **more).images

    method: Any = attached.method
    state = method.state()
    others: list[Any] = []
    changes: dict[str, Callable[[], object]] = {
        "beta": lambda: setattr(attached, "beta", torch.tensor([0.2])),
        "beta in place": lambda: attached.beta.add_(0.1),  # type: ignore[union-attr]
        "tau": lambda: setattr(attached, "tau", 0.3),
        "a LoRA scaled": lambda: pipe.unet.set_adapters("style", 0.5),
        "a LoRA off": pipe.unet.disable_lora,
        "a LoRA on": pipe.unet.enable_lora,
        "a LoRA fused": pipe.unet.fuse_lora,
        "a LoRA no longer fused": pipe.unet.unfuse_lora,
        "the concept's state": lambda: method.load_state({**state, "values": state["values"] * 2}),
        "outputs in place": lambda: [value.data.mul_(0.5) for value in method.values],
        "weights loaded": lambda: load_other_weights(pipe),
        "another concept": lambda: others.append(mug.attach(backbone)),
        "its beta": lambda: setattr(others[0], "beta", 0.1),
        "it goes": lambda: others[0].detach(),
        "the encodings in place": lambda: encoded.mul_(1.1),
    }
    before = draw()
    for name, change in changes.items():
        change()
        after = draw()
        assert not torch.equal(before, after), name
        for gate in gates_at(backbone.edit_sites()[0]):
            gate.forget()
        assert torch.equal(draw(), after), name
        before = after
    kept = draw(cross_attention_kwargs={"scale": 0.3})  # of one call
    assert not torch.equal(kept, before) and torch.equal(draw(), before)


@pytest.mark.parametrize("what", ["beta", "in place", "another"])
def test_what_is_changed_between_two_steps_of_a_call_is_seen_at_the_next(
    backbone: Backbone, concepts: list[Concept], what: str
) -> None:
    pipe: Any = backbone.pipe

    def draw(change: bool, forget: bool) -> torch.Tensor:
        def after(pipe: Any, step: int, time: Any, tensors: dict[str, Any]) -> dict[str, Any]:
            if change and step == 1:
                if what == "beta":
                    attached.beta = 0.9
                elif what == "in place":
                    tensors["prompt_embeds"].mul_(0.9)
                else:
                    return {"prompt_embeds": tensors["prompt_embeds"] * 0.9}
            if forget:
                gates_at(backbone.edit_sites()[0])[0].forget()
            return {}

        settings: dict[str, Any] = {"num_inference_steps": 4, "output_type": "latent", "callback_on_step_end": after}
        settings["callback_on_step_end_tensor_inputs"] = ["prompt_embeds"]
        attached.beta = 0.4
        return pipe("a photo of a <bear*>", generator=torch.Generator().manual_seed(0), **settings).images

    with concepts[0].attach(backbone) as attached:
        found = draw(change=True, forget=False)
        assert torch.equal(found, draw(change=True, forget=True))
        assert not torch.equal(found, draw(change=False, forget=False))


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
