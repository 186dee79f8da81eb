"""LoRA: its arithmetic, the words that its placeholder stands for, its strength, its company, and its stock file."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from safetensors.torch import load_file
from torch import Tensor

from perfusion.backbones.base import Backbone
from perfusion.backbones.toyland import WEIGHTS
from perfusion.concept import Concept
from perfusion.config import ConfigError
from perfusion.editing import EditError
from perfusion.methods.base import Word, build
from perfusion.methods.lora import LoRA
from tests.concepts import random_concept, tiny_backbone, tiny_sdxl_backbone, toyland_backbone, untrained_concept
from tests.drawing import BEAR, draw, stock
from tests.pipelines import tiny_sdxl

WORD = Word("<bear*>", "teddy bear")
WRITTEN = "a photo of a sks teddy bear on the beach"  # what BEAR reads as
pytestmark = pytest.mark.usefixtures("untouched")


@pytest.fixture(scope="module")
def concept(backbone: Backbone) -> Concept:
    return random_concept(backbone, WORD, 0, name="lora")


def lora(word: Word = WORD, **options: Any) -> LoRA:
    method = build({"name": "lora", **options}, word)
    assert isinstance(method, LoRA)
    return method


def test_a_layer_adds_its_product_of_two_factors(backbone: Backbone) -> None:
    """W x + b + s α/r B A x, and at the end the layer that was there before."""
    unet: Any = backbone.denoiser
    parent = unet.mid_block.attentions[0].transformer_blocks[0].attn1
    plain = parent.to_out[0]
    method = lora(rank=3, alpha=6.0)
    method.attach(backbone)
    x = torch.randn(5, plain.in_features, generator=torch.Generator().manual_seed(0))
    assert torch.equal(parent.to_out[0](x), plain(x)), "B starts at 0"
    method.load_state({name: torch.full_like(value, 0.1) for name, value in method.state().items()})
    state = method.state()
    name = "mid_block.attentions.0.transformer_blocks.0.attn1.to_out.0"
    a, b = state[f"{name}.lora_A.weight"], state[f"{name}.lora_B.weight"]
    assert a.shape == (3, plain.in_features) and b.shape == (plain.out_features, 3)
    for scale in (1.0, 0.25):
        method.scale = scale
        torch.testing.assert_close(parent.to_out[0](x), plain(x) + scale * 2.0 * x @ a.T @ b.T)
    method.detach()
    assert parent.to_out[0] is plain


def test_the_placeholder_reads_as_identifier_and_superclass(backbone: Backbone) -> None:
    """So before training, and at scale 0 ever after, it draws what the base model draws for these words."""
    expected = draw(backbone.pipe, WRITTEN)
    with torch.no_grad():
        context = backbone.encode([WRITTEN], "sks teddy bear")
    method = lora().eval()
    method.attach(backbone)
    with torch.no_grad():
        found = backbone.encode([BEAR], WORD.placeholder)
    assert torch.equal(found.context, context.context) and torch.equal(found.concept, context.concept)
    assert torch.equal(draw(backbone.pipe), expected)
    method.load_state({name: value + 0.1 for name, value in method.state().items()})
    assert not torch.equal(draw(backbone.pipe), expected)
    method.scale = 0.0
    assert torch.equal(draw(backbone.pipe), expected)
    method.detach()


def test_the_start_follows_from_the_global_seed_and_leaves_it(backbone: Backbone) -> None:
    def start(seed: int) -> dict[str, Tensor]:
        torch.manual_seed(seed)
        before = torch.get_rng_state()
        method = lora()
        method.attach(backbone)
        state = method.state()
        method.detach()
        assert torch.equal(torch.get_rng_state(), before)
        return state

    one, same, other = start(1), start(1), start(2)
    assert all(torch.equal(one[name], same[name]) for name in one)
    assert all(torch.equal(one[name], other[name]) == name.endswith("lora_B.weight") for name in one)


def test_the_scale_is_one_in_training_and_the_options_in_pictures(backbone: Backbone, concept: Concept) -> None:
    method = lora(scale=0.5).train()
    method.attach(backbone)
    assert method.scale == 1.0 and method.eval().scale == 0.5
    method.scale = 2.0
    assert method.train().scale == 1.0
    method.detach()
    with concept.attach(backbone) as attached:
        whole = draw(backbone.pipe)
        attached.scale = 0.5
        half = draw(backbone.pipe)
        assert attached.scale == 0.5 and not torch.equal(half, whole)
        with pytest.raises(EditError, match="scale of <bear\\*>: found nan"):
            attached.scale = float("nan")
    with concept.attach(backbone, scale=0.5):
        assert torch.equal(draw(backbone.pipe), half)


@pytest.mark.parametrize("alpha", [4.0, 1.0])
def test_stock_diffusers_draws_the_same_picture_from_the_exported_file(tmp_path: Path, alpha: float) -> None:
    """To the bit, on Toyland's own weights; and at other scales, too."""
    backbone = toyland_backbone(WEIGHTS, tmp_path)
    concept = random_concept(backbone, Word("<cat*>", "cat"), 0, name="lora", alpha=alpha)
    prompt, written = "a photo of a <cat*> on the beach", "a photo of a sks cat on the beach"
    with concept.attach(backbone) as attached:
        expected = draw(backbone.pipe, prompt)
        attached.scale = 0.5
        half = draw(backbone.pipe, prompt)
        (file,) = attached.method.export(tmp_path / "new" / "folder")
    assert file == tmp_path / "new" / "folder" / "pytorch_lora_weights.safetensors"
    assert os.listdir(file.parent) == [file.name], "nothing else is left there"
    assert all(value.dtype == torch.float32 for value in load_file(file).values())

    pipe = stock(WEIGHTS)
    plain = draw(pipe, written)
    pipe.load_lora_weights(str(file.parent), adapter_name="cat")
    assert torch.equal(draw(pipe, written), expected)
    assert (expected - plain).abs().max() > 0.01
    pipe.set_adapters(["cat"], adapter_weights=[0.5])
    assert torch.equal(draw(pipe, written), half)


def test_sdxl_with_its_pooled_text(tmp_path: Path) -> None:
    backbone = tiny_sdxl_backbone(tmp_path)
    concept = random_concept(backbone, WORD, 0, name="lora")
    with concept.attach(backbone) as attached:
        expected = draw(backbone.pipe)
        attached.method.export(tmp_path)
    pipe: Any = tiny_sdxl()
    pipe.load_lora_weights(str(tmp_path))
    assert torch.equal(draw(pipe, WRITTEN), expected)


def test_only_the_targets_get_layers(backbone: Backbone) -> None:
    shapes = lora(targets=["attn2.to_v"]).state_shapes(backbone)
    sites = [site for site in backbone.edit_sites() if site.kind == "v"]
    assert [*shapes] == [f"{site.name}.lora_{factor}.weight" for site in sites for factor in "AB"]
    with pytest.raises(ConfigError, match=r"method\.targets: found 'to_x', expected the end of the name"):
        lora(targets=["to_q", "to_x"]).attach(backbone)


@pytest.mark.parametrize("first", ["lora", "perfusion"])
def test_beside_a_rank_one_edit_in_any_order(backbone: Backbone, concept: Concept, first: str) -> None:
    """The LoRA acts on what the edit gives, or the other way round; either may leave first."""
    other = untrained_concept(backbone, Word("<cat*>", "cat"), 1)
    prompt, before = "a <bear*> and a <cat*>", draw(backbone.pipe, "a cat")
    with concept.attach(backbone):
        alone = draw(backbone.pipe)
    order = [concept, other] if first == "lora" else [other, concept]
    attached = [c.attach(backbone) for c in order]
    both = draw(backbone.pipe, prompt)
    gated = next(a for a in attached if a.concept is other)
    gated.beta = 10.0
    assert not torch.equal(draw(backbone.pipe, prompt), both)
    gated.detach()
    assert torch.equal(draw(backbone.pipe), alone)
    for a in attached:
        a.detach()
    attached = [c.attach(backbone) for c in order]
    next(a for a in attached if a.concept is concept).detach()
    assert draw(backbone.pipe, "a <cat*>").isfinite().all()
    for a in attached:
        a.detach()
    assert torch.equal(draw(backbone.pipe, "a cat"), before)


def test_two_loras_act_together_and_leave_in_any_order(backbone: Backbone, concept: Concept) -> None:
    other = random_concept(backbone, Word("<cat*>", "cat"), 1, name="lora")
    with other.attach(backbone):
        expected = draw(backbone.pipe, "a <cat*>")
    one = concept.attach(backbone)
    with other.attach(backbone):
        both = draw(backbone.pipe, "a <cat*>")
        assert not torch.equal(both, expected)
        one.scale = 0.0
        torch.testing.assert_close(draw(backbone.pipe, "a <cat*>"), expected)
        one.detach()
        assert torch.equal(draw(backbone.pipe, "a <cat*>"), expected)


SILENCED: dict[str, tuple[Callable[[Any], object], str]] = {
    "unload": (lambda pipe: pipe.unload_lora_weights(), "taken out"),
    "fuse": (lambda pipe: pipe.unet.fuse_qkv_projections(), "bypassed"),
    "merge": (lambda pipe: [layer.merge() for layer in tuner_layers(pipe)], "merged"),
    "disable": (lambda pipe: [layer.enable_adapters(False) for layer in tuner_layers(pipe)], "switched off"),
}


def tuner_layers(pipe: Any) -> list[BaseTunerLayer]:
    return [module for module in pipe.unet.modules() if isinstance(module, BaseTunerLayer)]


@pytest.mark.parametrize("way", list(SILENCED))
def test_a_lora_that_would_not_act_is_an_error(tmp_path: Path, concept: Concept, way: str) -> None:
    own = tiny_backbone(tmp_path)
    silence, said = SILENCED[way]
    attached = concept.attach(own)
    silence(own.pipe)
    with pytest.raises(EditError, match=rf"found the LoRA of <bear\*> {said}"):
        draw(own.pipe)
    attached.detach()


def test_lora_weights_that_are_loaded_later_stay(tmp_path: Path, concept: Concept, backbone: Backbone) -> None:
    """They switch the concept off, which is an error; detached, it leaves them as they would be without it."""
    own, alone = tiny_backbone(tmp_path), tiny_backbone(tmp_path)
    style = random_concept(own, Word("<style*>", "cat"), 5, name="lora")
    with style.attach(own) as attached:
        (file,) = attached.method.export(tmp_path / "style")
    alone.pipe.load_lora_weights(str(file.parent))
    expected = draw(alone.pipe, "a cat")
    attached = concept.attach(own)
    own.pipe.load_lora_weights(str(file.parent))
    with pytest.raises(EditError, match="switched off"):
        draw(own.pipe)
    attached.detach()
    assert torch.equal(draw(own.pipe, "a cat"), expected)
    with concept.attach(backbone):
        without = draw(backbone.pipe, "a cat")
    with concept.attach(own):
        both = draw(own.pipe, "a cat")
    assert not torch.equal(both, expected) and not torch.equal(both, without), "each is to be seen"
    assert torch.equal(draw(own.pipe, "a cat"), expected)
