"""A concept beside what diffusers offers: offloading, LoRA, schedulers, copies of the pipeline, ...

Every way of drawing is held to the same: the concept is to be seen in it, and after `detach` it draws what it drew
before, bit by bit. docs/compatibility.md names the tests of this file.
"""

from __future__ import annotations

import math
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import DPMSolverMultistepScheduler
from peft import LoraConfig
from torch import Tensor

from perfusion.backbones import around
from perfusion.backbones.base import Backbone, TokenError
from perfusion.concept import Concept, ConceptFileError
from perfusion.editing import EditError
from perfusion.methods.base import Word
from tests.concepts import tiny_backbone, tiny_sdxl_backbone, untrained_concept
from tests.drawing import CLOSED, PLAIN, PROMPT, call
from tests.pipelines import tiny_pipeline


@pytest.fixture(scope="module")
def concept(backbone: Backbone) -> Concept:
    return untrained_concept(backbone, Word("<cat*>", "cat"), 0)


Draw = Callable[[Any, str], Tensor]


def with_embeddings(pipe: Any, prompt: str) -> Tensor:
    """What prompt-weighting libraries do: encode first, scale, then draw."""
    encoded, negative = pipe.encode_prompt(prompt, pipe.device, 1, True)
    return call(pipe, prompt_embeds=encoded * 1.01, negative_prompt_embeds=negative)


def offloaded(pipe: Any, prompt: str) -> Tensor:
    pipe.enable_model_cpu_offload(device="cpu")
    try:
        return call(pipe, prompt)
    finally:
        pipe.remove_all_hooks()


def sliced(pipe: Any, prompt: str) -> Tensor:
    pipe.enable_attention_slicing()
    try:
        return call(pipe, prompt)
    finally:
        pipe.disable_attention_slicing()


def with_another_scheduler(pipe: Any, prompt: str) -> Tensor:
    own = pipe.scheduler
    pipe.scheduler = DPMSolverMultistepScheduler.from_config(own.config)
    try:
        return call(pipe, prompt)
    finally:
        pipe.scheduler = own


def with_free_u(pipe: Any, prompt: str) -> Tensor:
    pipe.enable_freeu(s1=0.9, s2=0.2, b1=1.2, b2=1.4)
    try:
        return call(pipe, prompt)
    finally:
        pipe.disable_freeu()


WAYS: dict[str, Draw] = {
    "plain": call,
    "without guidance": lambda pipe, prompt: call(pipe, prompt, guidance_scale=1.0),
    "negative prompt": lambda pipe, prompt: call(pipe, prompt, negative_prompt="a dog"),
    "the concept in the negative prompt": lambda pipe, prompt: call(
        pipe, "a photo of the beach", negative_prompt=prompt
    ),
    "several pictures": lambda pipe, prompt: call(pipe, prompt, num_images_per_prompt=2),
    "a list of prompts": lambda pipe, prompt: call(pipe, ["a dog", prompt]),  # type: ignore[arg-type]
    "prompt_embeds": with_embeddings,
    "another scheduler": with_another_scheduler,
    "attention slicing": sliced,
    "FreeU": with_free_u,
    "model offload": offloaded,
}


@pytest.mark.parametrize("way", list(WAYS))
def test_ways_to_draw(backbone: Backbone, concept: Concept, way: str) -> None:
    draw, pipe = WAYS[way], backbone.pipe
    before = draw(pipe, PLAIN)
    with concept.attach(backbone) as attached:
        found = draw(pipe, PROMPT)
        assert torch.equal(draw(pipe, PROMPT), found)
        attached.beta = CLOSED
        assert (found - draw(pipe, PROMPT)).abs().amax() > 1e-3, "not the word alone, the edit is to be seen"
    assert torch.equal(draw(pipe, PLAIN), before)


@pytest.mark.gpu  # accelerate cannot offload to the CPU what it computes there
@pytest.mark.parametrize("offload", ["enable_model_cpu_offload", "enable_sequential_cpu_offload"])
def test_offload(tmp_path: Path, offload: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)  # the CPU's convolutions are what it is held to
    backbone = tiny_backbone(tmp_path)
    concept, pipe = untrained_concept(backbone, Word("<cat*>", "cat"), 0), backbone.pipe
    before = call(pipe, PLAIN)
    with concept.attach(backbone) as attached:
        expected = call(pipe, PROMPT)
        getattr(pipe, offload)(device="cuda")
        found = call(pipe, PROMPT)
        assert found.device.type == "cuda"
        assert next(pipe.unet.parameters()).device.type != "cuda", "it is put away again"
        torch.testing.assert_close(found.cpu(), expected, atol=1e-3, rtol=1e-3)
        attached.beta = CLOSED
        assert (call(pipe, PROMPT) - found).abs().amax() > 1e-3, "not the word alone, the edit is to be seen"
        pipe.remove_all_hooks()
    assert torch.equal(call(pipe, PLAIN), before)


@pytest.mark.gpu
def test_attaching_after_model_offload(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)
    backbone = tiny_backbone(tmp_path)
    concept, pipe = untrained_concept(backbone, Word("<cat*>", "cat"), 0), backbone.pipe
    with concept.attach(pipe):
        expected = call(pipe, PROMPT)
    pipe.enable_model_cpu_offload(device="cuda")
    with concept.attach(pipe):
        torch.testing.assert_close(call(pipe, PROMPT).cpu(), expected, atol=1e-3, rtol=1e-3)
    pipe.remove_all_hooks()


@pytest.mark.parametrize("part", ["unet", "text_encoder"])
def test_attaching_where_weights_have_been_put_away_is_an_error(tmp_path: Path, part: str) -> None:
    """As `enable_sequential_cpu_offload` leaves them, which needs a GPU."""
    backbone = tiny_backbone(tmp_path)
    concept, pipe = untrained_concept(backbone, Word("<cat*>", "cat"), 0), backbone.pipe
    getattr(pipe, part).to("meta")
    with pytest.raises(EditError, match=r"attach before it, or after pipe\.remove_all_hooks"):
        concept.attach(pipe)


@pytest.mark.parametrize("first", ["lora", "concept"])
def test_a_lora_on_the_same_projections_is_visible_beside_the_concept(
    backbone: Backbone, concept: Concept, first: str
) -> None:
    pipe = backbone.pipe
    before = call(pipe, PLAIN)
    with concept.attach(backbone):
        alone = call(pipe, PROMPT)
    if first == "lora":
        add_style(pipe)
        attached = concept.attach(around(pipe, backbone.config))
    else:
        attached = concept.attach(backbone)
        add_style(pipe)
    both = call(pipe, PROMPT)
    pipe.unet.disable_lora()
    without = call(pipe, PROMPT)
    pipe.unet.enable_lora()
    attached.beta = CLOSED
    style = call(pipe, PROMPT)
    attached.detach()
    pipe.unet.unload_lora()
    torch.testing.assert_close(without, alone)
    assert (both - alone).abs().amax() > 1e-3, "the LoRA is to be seen"
    assert (both - style).abs().amax() > 1e-3, "the concept is to be seen"
    assert torch.equal(call(pipe, PLAIN), before)


def test_a_fused_lora_is_visible_beside_the_concept(tmp_path: Path) -> None:
    """The edit is that of the fused weight, whichever of the two was there first."""
    other = tiny_backbone(tmp_path).pipe
    add_style(other)
    other.fuse_lora(components=["unet"])
    pictures = []
    for first in ("lora", "concept"):
        backbone = tiny_backbone(tmp_path)
        pipe, concept = backbone.pipe, untrained_concept(backbone, Word("<cat*>", "cat"), 0)
        with concept.attach(backbone):
            alone = call(pipe, PROMPT)
        if first == "lora":
            add_style(pipe)
            unfused = concept.attach(around(pipe, backbone.config))
            pictures.append(call(pipe, PROMPT))  # as the weight that a LoRA below changes
            unfused.detach()
        attached = concept.attach(backbone)
        if first == "concept":
            add_style(pipe)
        call(pipe, PROMPT)  # nothing of it is kept
        pipe.fuse_lora(components=["unet"])
        pictures.append(call(pipe, PROMPT))
        attached.beta = CLOSED
        style = call(pipe, PROMPT)
        fused = [weight.clone() for weight in pipe.unet.parameters()]
        attached.detach()
        assert (pictures[-1] - alone).abs().amax() > 1e-3, "the LoRA is to be seen"
        assert (pictures[-1] - style).abs().amax() > 1e-3, "the concept is to be seen"
        assert all(torch.equal(now, then) for now, then in zip(pipe.unet.parameters(), fused, strict=True))
        assert torch.equal(call(pipe, PLAIN), call(other, PLAIN)), "as though there had been no concept"
    for picture in pictures[1:]:
        torch.testing.assert_close(picture, pictures[0], rtol=1e-4, atol=1e-4)


def test_a_concept_is_refused_where_a_lora_has_been_fused_before(tmp_path: Path) -> None:
    backbone = tiny_backbone(tmp_path)
    pipe, concept = backbone.pipe, untrained_concept(backbone, Word("<cat*>", "cat"), 0)
    add_style(pipe)
    pipe.fuse_lora(components=["unet"])
    for _ in range(2):
        with pytest.raises(ConceptFileError, match=r"found projections .* a LoRA is fused into them: attach before"):
            concept.attach(pipe)
        pipe.unload_lora_weights()  # leaves what was fused


def add_style(pipe: Any) -> None:
    torch.manual_seed(0)
    settings = LoraConfig(r=2, target_modules=["to_k", "to_v"], init_lora_weights=False)
    pipe.unet.add_adapter(settings, "style")


STYLE = "a photo of a {}, <style>"


@pytest.mark.parametrize(
    ("make", "first"), [(tiny_backbone, "the concept"), (tiny_sdxl_backbone, "the textual inversion")]
)
def test_a_textual_inversion_is_visible_beside_the_concept(make: Any, first: str, tmp_path: Path) -> None:
    """Loaded by stock diffusers, of two vectors, before or after the concept."""
    pipe, other = make(tmp_path).pipe, make(tmp_path).pipe
    concept = untrained_concept(make(tmp_path), Word("<cat*>", "cat"), 0)
    suffixes = [name.removeprefix("text_encoder") for name in pipe.components if name.startswith("text_encoder")]

    def load(into: Any, how: str = "load_textual_inversion") -> None:
        for suffix in suffixes:
            encoder, tokenizer = getattr(into, f"text_encoder{suffix}"), getattr(into, f"tokenizer{suffix}")
            vectors = torch.randn(2, encoder.config.hidden_size, generator=torch.Generator().manual_seed(1))
            given = {"token": "<style>"} if how.startswith("load") else {"tokens": ["<style>", "<style>_1"]}
            arguments = (vectors,) if how.startswith("load") else ()
            getattr(into, how)(*arguments, **given, text_encoder=encoder, tokenizer=tokenizer)

    load(other)
    plain = call(other, STYLE.format("cat"))
    if first == "the textual inversion":
        load(pipe)
    with concept.attach(pipe) as attached:
        if first == "the concept":
            alone = call(pipe, PROMPT)
            load(pipe)
            assert torch.equal(call(pipe, PROMPT), alone)
        both = call(pipe, STYLE.format("<cat*>"))
        assert (both - plain).abs().amax() > 1e-3, "the concept"
        assert (both - call(pipe, PROMPT)).abs().amax() > 1e-3, "the textual inversion"
        strength, attached.beta = attached.beta, math.inf
        assert torch.equal(call(pipe, STYLE.format("<cat*>")), plain), "the base model's, with the style"
        attached.beta = strength
        assert torch.equal(call(pipe, STYLE.format("<cat*>")), both)
        if first == "the concept":
            load(pipe, "unload_textual_inversion")
            assert torch.equal(call(pipe, PROMPT), alone)
            load(pipe)
    assert torch.equal(call(pipe, STYLE.format("cat")), plain)
    assert not {"load_textual_inversion", "save_pretrained"} & {*vars(pipe)}


def test_textual_inversions_renumber_words_and_pipelines_of_the_same_parts_say_so(
    backbone: Backbone, concept: Concept
) -> None:
    pipe = tiny_pipeline()
    with concept.attach(pipe):
        copy = type(pipe)(**pipe.components)
        with pytest.raises(EditError, match="with the pipeline that the concept was attached to, or before attaching"):
            copy.load_textual_inversion(torch.randn(1, 32), token="<style>")
        pipe.load_textual_inversion(torch.randn(1, 32), token="<style>")
        with pytest.raises(TokenError, match=r"found '<cat\*>'.*make this pipeline anew"):
            call(copy, PROMPT)
        assert torch.equal(call(type(pipe)(**pipe.components), PROMPT), call(pipe, PROMPT))


@pytest.mark.parametrize("shared", ["pipeline", "parts"])
def test_two_threads_at_once_are_an_error(backbone: Backbone, concept: Concept, shared: str) -> None:
    """One would draw with what the other has set. One after the other is fine."""
    drawing, tried, found = threading.Event(), threading.Event(), []
    pipe = backbone.pipe

    def wait(*_: Any) -> dict[str, Any]:
        drawing.set()
        assert tried.wait(60)
        return {}

    with concept.attach(backbone):
        other = pipe if shared == "pipeline" else type(pipe)(**pipe.components)
        other.scheduler = type(pipe.scheduler).from_config(pipe.scheduler.config)  # of one call at a time
        expected = call(pipe, PROMPT)
        thread = threading.Thread(target=lambda: found.append(call(pipe, PROMPT, callback_on_step_end=wait)))
        thread.start()
        assert drawing.wait(60)
        try:
            with pytest.raises(EditError, match="found another thread that draws with this model"):
                call(other, PROMPT)
        finally:
            tried.set()
            thread.join()
        assert torch.equal(found[0], expected) or shared == "pipeline"
        assert torch.equal(call(other, PROMPT), expected)


def test_a_pipeline_with_a_concept_in_it_is_not_saved(backbone: Backbone, concept: Concept, tmp_path: Path) -> None:
    """Stock diffusers could not load it, or would draw noise."""
    pipe = tiny_pipeline()
    expected = call(pipe, PLAIN)
    second = untrained_concept(backbone, Word("<dog*>", "dog"), 1)
    attached = [one.attach(pipe) for one in (concept, second)]
    for left in (2, 1):
        for part in (pipe, pipe.unet, pipe.text_encoder):
            with pytest.raises(EditError, match=r"save_pretrained: a concept is attached.*detach\(\) first"):
                part.save_pretrained(tmp_path / "saved")
        attached.pop(0).detach()
        assert len(attached) == left - 1
    assert not (tmp_path / "saved").exists()
    pipe.save_pretrained(tmp_path / "saved")
    torch.testing.assert_close(call(type(pipe).from_pretrained(tmp_path / "saved"), PLAIN), expected, atol=1e-4, rtol=0)


def test_what_can_be_trained_of_a_pipeline_can_be_trained_after_a_concept_was_there(concept: Concept) -> None:
    pipe = tiny_pipeline()
    pipe.unet.requires_grad_(True)
    pipe.text_encoder.requires_grad_(False)
    pipe.text_encoder.get_input_embeddings().requires_grad_(True)
    before = [p.requires_grad for part in (pipe.unet, pipe.vae, pipe.text_encoder) for p in part.parameters()]
    with concept.attach(pipe):
        call(pipe, PROMPT)
    assert [p.requires_grad for part in (pipe.unet, pipe.vae, pipe.text_encoder) for p in part.parameters()] == before


def test_a_copy_of_the_pipeline_has_the_concept_too_or_says_that_it_has_not(
    backbone: Backbone, concept: Concept
) -> None:
    before = copied(backbone.pipe)
    with concept.attach(backbone):
        assert torch.equal(call(copied(backbone.pipe), PROMPT), call(backbone.pipe, PROMPT))
        with pytest.raises(TokenError, match="found '<cat\\*>' spelled out, expected it as a token"):
            call(before, PROMPT)
        assert call(before, PLAIN).isfinite().all()


def test_a_pipeline_of_the_same_parts_refuses_a_concept_that_they_have_already(
    backbone: Backbone, concept: Concept
) -> None:
    before = copied(backbone.pipe)
    encoder = backbone.pipe.text_encoder
    table = encoder.get_input_embeddings()
    with concept.attach(backbone) as attached:
        expected = call(backbone.pipe, PROMPT)
        with pytest.raises(TokenError, match=r"'<cat\*>' is attached already, to another pipeline that shares"):
            concept.attach(before)
        assert torch.equal(call(backbone.pipe, PROMPT), expected)
        attached.detach()
        with concept.attach(before):
            assert torch.equal(call(before, PROMPT), expected)
    assert encoder.get_input_embeddings() is table


def test_what_is_detached_is_gone_from_pipelines_of_the_same_parts_and_the_rest_stays(
    backbone: Backbone, concept: Concept
) -> None:
    teddy = untrained_concept(backbone, Word("<teddy*>", "teddy bear"), 1)
    with teddy.attach(backbone):
        expected = call(backbone.pipe, "a <teddy*> on the beach")
    first = concept.attach(backbone)
    with teddy.attach(backbone):
        other = copied(backbone.pipe)
        first.detach()
        for pipe in (backbone.pipe, other):
            assert torch.equal(call(pipe, "a <teddy*> on the beach"), expected)
        with pytest.raises(TokenError, match=r"found '<cat\*>', which was detached through another pipeline"):
            call(other, PROMPT)
        with concept.attach(backbone):  # a new word, though it has the old one's name and place
            assert call(backbone.pipe, PROMPT).isfinite().all()
            with pytest.raises(TokenError, match="which was detached"):
                call(other, PROMPT)
    with pytest.raises(TokenError, match=r"found '<teddy\*>', which was detached"):
        call(other, "a <teddy*> on the beach")
    assert torch.equal(call(other, PLAIN), call(backbone.pipe, PLAIN))


def copied(pipe: Any) -> Any:
    copy = type(pipe)(**pipe.components, requires_safety_checker=False)
    copy.set_progress_bar_config(disable=True)
    return copy


@pytest.mark.slow
@pytest.mark.parametrize("key_lock", ["local", "global"])
@pytest.mark.parametrize("first", ["concept", "compile"])
def test_a_unet_that_is_compiled_whole_draws_the_same(tmp_path: Path, key_lock: str, first: str) -> None:
    """As users do it: the edit's hooks are within what is compiled."""
    backbone = tiny_backbone(tmp_path)
    pipe, plain = backbone.pipe, backbone.pipe.unet
    concept = untrained_concept(backbone, Word("<cat*>", "cat"), 0)
    before = call(pipe, PLAIN)
    with concept.attach(backbone, key_lock=key_lock) as attached:
        expected = call(pipe, PROMPT)
        attached.beta = CLOSED
        closed = call(pipe, PROMPT)
    assert (expected - closed).abs().amax() > 1e-3
    if first == "compile":
        pipe.unet = torch.compile(plain, backend="eager", fullgraph=True)
        torch.testing.assert_close(call(pipe, PLAIN), before)
    with concept.attach(pipe, key_lock=key_lock) as attached:
        if first == "concept":
            pipe.unet = torch.compile(plain, backend="eager", fullgraph=True)
        torch.testing.assert_close(call(pipe, PROMPT), expected)
        attached.beta = CLOSED
        torch.testing.assert_close(call(pipe, PROMPT), closed)
    torch.testing.assert_close(call(pipe, PLAIN), before)


@pytest.mark.slow
@pytest.mark.parametrize("key_lock", ["local", "global"])
@pytest.mark.parametrize("concepts", [1, 2])
def test_a_compiled_unet_draws_the_same(tmp_path: Path, key_lock: str, concepts: int) -> None:
    backbone = tiny_backbone(tmp_path)
    words = [Word("<cat*>", "cat"), Word("<dog*>", "dog")][:concepts]
    made = [untrained_concept(backbone, word, seed) for seed, word in enumerate(words)]
    prompt = " and ".join(word.placeholder for word in words)
    pipe: Any = backbone.pipe
    attached = [concept.attach(backbone, key_lock=key_lock) for concept in made]
    expected = call(pipe, prompt)
    pipe.unet.forward = torch.compile(pipe.unet.forward, backend="eager", fullgraph=True)
    torch.testing.assert_close(call(pipe, prompt), expected)
    attached[0].beta = 0.9
    weaker = call(pipe, prompt)
    assert (weaker - expected).abs().amax() > 1e-3, "a change of strength is seen by the compiled graph"
