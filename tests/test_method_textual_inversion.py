"""Textual Inversion: where the word starts, what is trained, and its files in stock pipelines."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from perfusion.backbones.base import Backbone
from perfusion.backbones.toyland import WEIGHTS
from perfusion.concept import Concept
from perfusion.config import ConfigError
from perfusion.methods.base import Word, build
from perfusion.methods.textual_inversion import TextualInversion
from tests.concepts import random_concept, tiny_sdxl_backbone, toyland_backbone, untrained_concept
from tests.drawing import BEAR, draw, stock
from tests.pipelines import tiny_sdxl

WORD = Word("<bear*>", "teddy bear")


def textual_inversion(**options: Any) -> TextualInversion:
    method = build({"name": "textual_inversion", **options}, WORD)
    assert isinstance(method, TextualInversion)
    return method


@pytest.mark.parametrize("vectors", [1, 3])
def test_the_word_starts_at_its_superclass(backbone: Backbone, vectors: int) -> None:
    pipe: Any = backbone.pipe
    ids = pipe.tokenizer("teddy bear", add_special_tokens=False, return_tensors="pt").input_ids[0]
    start = pipe.text_encoder.get_input_embeddings()(ids).mean(0)
    method = textual_inversion(vectors=vectors)
    method.attach(backbone)
    (found,) = method.state().values()
    method.detach()
    assert len(ids) == 2 and torch.equal(found, start.expand(vectors, -1))


@pytest.mark.parametrize("vectors", [1, 2])
def test_stock_diffusers_draws_the_same_picture_from_the_exported_file(tmp_path: Path, vectors: int) -> None:
    """To the bit, on Toyland's own weights."""
    backbone = toyland_backbone(WEIGHTS, tmp_path)
    concept = random_concept(backbone, Word("<cat*>", "cat"), 0, name="textual_inversion", vectors=vectors)
    prompt = "a photo of a <cat*> on the beach"
    with concept.attach(backbone) as attached:
        expected = draw(backbone.pipe, prompt)
        (file,) = attached.method.export(tmp_path / "new" / "folder")
    assert file == tmp_path / "new" / "folder" / "learned_embeds.safetensors"
    assert os.listdir(file.parent) == [file.name], "nothing else is left there"
    assert {name: value.shape[0] for name, value in load_file(file).items()} == {"<cat*>": vectors}

    pipe = stock(WEIGHTS)
    plain = draw(pipe, prompt.replace("<cat*>", "cat"))
    pipe.load_textual_inversion(str(file.parent), use_safetensors=True)
    assert torch.equal(draw(pipe, prompt), expected)
    assert (expected - plain).abs().max() > 0.01


def test_the_files_of_both_encoders_of_sdxl(tmp_path: Path) -> None:
    """The contexts are the stock ones to the bit; the pooled text is that of the superclass (backbones/sdxl.py)."""
    backbone = tiny_sdxl_backbone(tmp_path)
    concept = random_concept(backbone, WORD, 0, name="textual_inversion")
    with concept.attach(backbone) as attached:
        expected = draw(backbone.pipe)
        files = attached.method.export(tmp_path)
        with torch.no_grad():
            context = backbone.encode([BEAR], WORD.placeholder).context
            pooled = backbone.pipe.encode_prompt(BEAR, device="cpu", do_classifier_free_guidance=False)[2]
    assert [file.name for file in files] == ["learned_embeds.safetensors", "learned_embeds_2.safetensors"]
    pipe: Any = tiny_sdxl()
    for file, suffix in zip(files, ("", "_2"), strict=True):
        parts = {part: getattr(pipe, f"{part}{suffix}") for part in ("text_encoder", "tokenizer")}
        pipe.load_textual_inversion(str(tmp_path), weight_name=file.name, use_safetensors=True, **parts)
    with torch.no_grad():
        encoded, negative, _, negative_pooled = pipe.encode_prompt(BEAR, device="cpu")
    assert torch.equal(encoded, context)
    given = {"prompt_embeds": encoded, "pooled_prompt_embeds": pooled}
    given |= {"negative_prompt_embeds": negative, "negative_pooled_prompt_embeds": negative_pooled}
    assert torch.equal(draw(pipe, None, **given), expected)  # type: ignore[arg-type]


def test_it_needs_no_covariance_and_goes_beside_a_concept_with_one(backbone: Backbone) -> None:
    concept = random_concept(backbone, WORD, 0, name="textual_inversion")
    assert concept.covariance == "" and concept.dials == {}
    other = untrained_concept(backbone, Word("<cat*>", "cat"), 1)
    assert other.covariance
    before = draw(backbone.pipe, "a cat")
    with other.attach(backbone):
        alone = draw(backbone.pipe, "a <cat*>")
        with concept.attach(backbone):
            both = draw(backbone.pipe, "a <cat*> and a <bear*>")
        assert torch.equal(draw(backbone.pipe, "a <cat*>"), alone)
    with concept.attach(backbone), other.attach(backbone):
        torch.testing.assert_close(draw(backbone.pipe, "a <cat*> and a <bear*>"), both)
    assert torch.equal(draw(backbone.pipe, "a cat"), before)


def test_a_word_of_several_vectors_that_stock_pipelines_would_read_as_one() -> None:
    options = {"name": "textual_inversion", "vectors": 2}
    with pytest.raises(ConfigError, match=r"placeholder: found '<Cat\*>' and method.vectors=2.*such as '<cat\*>'"):
        build(options, Word("<Cat*>", "cat"))
    build({**options, "vectors": 1}, Word("<Cat*>", "cat"))


def test_a_concept_without_a_gate_refuses_its_settings(backbone: Backbone) -> None:
    concept: Concept = random_concept(backbone, WORD, 0, name="textual_inversion")
    table = backbone.pipe.text_encoder.get_input_embeddings()
    for name, value in {"beta": 0.5, "tau": 0.1, "key_lock": "global", "scale": 0.5}.items():
        message = f"^{name}: found a concept of the method 'textual_inversion', which has no {name}; its strength"
        with pytest.raises(ConfigError, match=message):
            concept.attach(backbone, **{name: value})  # type: ignore[arg-type]
        assert backbone.pipe.text_encoder.get_input_embeddings() is table
    with concept.attach(backbone) as attached, pytest.raises(ConfigError, match="which has no beta"):
        attached.beta = 0.5
