"""What is reckoned from a model's weights once: digests, and how a text encoder reads a superclass."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig
from torch import Tensor

from perfusion.backbones import around
from perfusion.backbones.base import Backbone
from perfusion.backbones.fingerprint import forget
from tests.concepts import tiny_backbone, tiny_sdxl_backbone

PROMPTS = ["a photo of a cat", "a cat on the beach", "the cat"]


@pytest.fixture(params=[tiny_backbone, tiny_sdxl_backbone])
def backbone(request: pytest.FixtureRequest, tmp_path: Path) -> Backbone:
    return request.param(tmp_path)


@pytest.fixture
def reads(backbone: Backbone) -> Iterator[list[object]]:
    """One entry for each call of the first text encoder."""
    calls: list[object] = []
    encoder: Any = backbone.pipe.text_encoder  # type: ignore[attr-defined]
    hook = encoder.register_forward_hook(lambda *call: calls.append(call))
    yield calls
    hook.remove()


def expected(backbone: Backbone, word: str = "cat", prompts: list[str] = PROMPTS) -> Tensor:
    with torch.no_grad():
        return backbone.encode(prompts, word, padded=False).mean_at_word()


def test_a_superclass_is_read_once_also_by_another_wrapper(backbone: Backbone, reads: list[object]) -> None:
    first = backbone.mean_encoding(PROMPTS, "cat")
    assert len(reads) == 1 and torch.equal(first, expected(backbone))
    reads.clear()
    first.zero_()  # it is the caller's own
    again = around(backbone.pipe, backbone.config).mean_encoding(PROMPTS, "cat")
    assert not reads and torch.equal(again, expected(backbone))
    forget(backbone.pipe.text_encoder)  # type: ignore[attr-defined]
    reads.clear()
    assert torch.equal(backbone.mean_encoding(PROMPTS, "cat"), again) and len(reads) == 1


def test_another_word_or_other_prompts_are_read(backbone: Backbone) -> None:
    cat = backbone.mean_encoding(PROMPTS, "cat")
    dogs = [prompt.replace("cat", "dog") for prompt in PROMPTS]
    assert torch.equal(backbone.mean_encoding(dogs, "dog"), expected(backbone, "dog", dogs))
    assert torch.equal(backbone.mean_encoding(PROMPTS[:1], "cat"), expected(backbone, prompts=PROMPTS[:1]))
    assert torch.equal(backbone.mean_encoding(PROMPTS, "cat"), cat)


def scale_a_layer(backbone: Backbone) -> None:
    with torch.no_grad():
        a_layer(backbone).weight.mul_(1.5)


def scale_past_autograd(backbone: Backbone) -> None:
    a_layer(backbone).weight.data *= 1.5


def add_lora(backbone: Backbone) -> None:
    encoder: Any = backbone.pipe.text_encoder  # type: ignore[attr-defined]
    torch.manual_seed(0)
    encoder.add_adapter(LoraConfig(r=2, target_modules=["q_proj", "v_proj"], init_lora_weights=False))


def to_half(backbone: Backbone) -> None:
    for encoder in backbone.text_encoders().values():
        encoder.to(torch.bfloat16)


def a_layer(backbone: Backbone) -> Any:
    encoder: Any = backbone.pipe.text_encoder  # type: ignore[attr-defined]
    return next(module for name, module in encoder.named_modules() if name.endswith("layers.0.mlp.fc1"))


@pytest.mark.parametrize("change", [scale_a_layer, scale_past_autograd, add_lora, to_half])
def test_other_weights_read_it_anew(backbone: Backbone, change: Callable[[Backbone], None]) -> None:
    before = backbone.mean_encoding(PROMPTS, "cat")
    change(backbone)
    found = backbone.mean_encoding(PROMPTS, "cat")
    assert torch.equal(found, expected(backbone)) and not torch.equal(found, before)


def test_an_added_word_is_read_as_its_vectors_are_now(backbone: Backbone) -> None:
    token = backbone.add_token("<dog*>", "dog")
    prompts = [prompt.replace("cat", "<dog*>") for prompt in PROMPTS]
    before = backbone.mean_encoding(prompts, "<dog*>")
    with torch.no_grad():
        for vectors in token.embeddings().values():
            vectors.mul_(3)
    found = backbone.mean_encoding(prompts, "<dog*>")
    assert torch.equal(found, expected(backbone, "<dog*>", prompts)) and not torch.equal(found, before)
    assert torch.equal(backbone.mean_encoding(PROMPTS, "cat"), expected(backbone)), "beside it"
    token.remove()
