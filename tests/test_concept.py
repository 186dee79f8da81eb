"""Concepts in a stock pipeline: attached, set, drawn and taken out again."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from perfusion.backbones.base import Backbone, TokenError
from perfusion.concept import Concept, save_concept
from perfusion.editing import EditError
from perfusion.methods.base import Word
from tests.concepts import things, untrained_concept

WORD = Word("<bear*>", "teddy bear")
PROMPT = "a photo of a <bear*> on the beach"


@pytest.fixture(scope="module")
def concept(backbone: Backbone) -> Concept:
    return untrained_concept(backbone, WORD, seed=7)


@pytest.fixture
def path(concept: Concept, tmp_path: Path) -> Path:
    save_concept(tmp_path / "bear.safetensors", concept)
    return tmp_path / "bear.safetensors"


@pytest.fixture(autouse=True)
def untouched(backbone: Backbone) -> Iterator[None]:
    """No test leaves a trace on the pipeline, least of all one in which attaching fails."""
    before = things(backbone)
    yield
    assert things(backbone) == before


def draw_image(backbone: Backbone, prompts: list[str], **settings: Any) -> Tensor:
    pipe: Any = backbone.pipe
    generators = [torch.Generator().manual_seed(0) for _ in prompts]
    settings = {"num_inference_steps": 2, "output_type": "latent"} | settings
    return pipe(prompts, generator=generators, **settings).images


@torch.no_grad()
def test_a_stock_pipeline_draws_the_concept_in_three_lines(backbone: Backbone, path: Path) -> None:
    pipe: Any = backbone.pipe
    base = draw_image(backbone, ["a photo of a teddy bear on the beach"])
    attached = Concept.load(path).attach(pipe)
    drawn = draw_image(backbone, [PROMPT])
    assert attached.backbone.pipe is pipe and attached.concept.placeholder == "<bear*>"
    assert not attached.method.training and not any(p.requires_grad for p in attached.method.parameters())
    assert (attached.beta, attached.tau) == (0.4, 0.15)
    attached.detach()
    attached.detach()
    assert (drawn - base).abs().max() > 1e-3
    assert torch.equal(draw_image(backbone, ["a photo of a teddy bear on the beach"]), base)


def test_the_concept_stays_when_the_handle_is_dropped(backbone: Backbone, path: Path) -> None:
    attached = Concept.load(path).attach(backbone)
    detach, expected = attached.detach, draw_image(backbone, [PROMPT])
    del attached
    assert torch.equal(draw_image(backbone, [PROMPT]), expected)
    detach()


def test_the_edit_is_computed_once_per_picture_and_not_per_step(backbone: Backbone, path: Path) -> None:
    calls: list[nn.Module] = []
    with Concept.load(path).attach(backbone):
        layers: list[Any] = [site.projection for site in backbone.edit_sites()]
        hooks = [layer.base_layer.register_forward_hook(lambda m, a, o: calls.append(m)) for layer in layers]
        draw_image(backbone, [PROMPT], num_inference_steps=4)
        for hook in hooks:
            hook.remove()
    assert len(calls) == len(layers) == 32


def test_strength_can_be_given_and_changed(backbone: Backbone, path: Path) -> None:
    concept = Concept.load(path)
    with concept.attach(backbone, beta=0.9, tau=0.3) as attached:
        assert (attached.beta, attached.tau) == (0.9, 0.3)
        weak = draw_image(backbone, [PROMPT])
        attached.beta = 0.1
        strong = draw_image(backbone, [PROMPT])
        attached.beta = torch.tensor([0.9, 0.1])
        both = draw_image(backbone, [PROMPT, PROMPT])
        assert (weak - strong).abs().max() > 1e-3
        torch.testing.assert_close(both, torch.cat((weak, strong)), rtol=1e-3, atol=1e-3)
        attached.tau = 3.0
        assert not torch.equal(draw_image(backbone, [PROMPT, PROMPT]), both)
        with pytest.raises(EditError, match="tau: found 0"):
            attached.tau = 0.0


def test_an_impossible_strength_attaches_nothing(backbone: Backbone, path: Path) -> None:
    with pytest.raises(EditError, match="tau: found -1"):
        Concept.load(path).attach(backbone, tau=-1.0)


def test_an_exception_inside_the_block_detaches(backbone: Backbone, path: Path) -> None:
    with pytest.raises(KeyError), Concept.load(path).attach(backbone):
        raise KeyError


def test_the_same_word_is_refused_and_the_first_stays(backbone: Backbone, path: Path) -> None:
    concept = Concept.load(path)
    with concept.attach(backbone):
        expected, before = draw_image(backbone, [PROMPT]), things(backbone)
        with pytest.raises(TokenError, match=r"'<bear\*>' is already a word"):
            concept.attach(backbone.pipe)
        assert things(backbone) == before
        assert torch.equal(draw_image(backbone, [PROMPT]), expected)
