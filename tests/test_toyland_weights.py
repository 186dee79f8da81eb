"""The weights that ship with the project: of this world, within their size, and described by their own report."""

from __future__ import annotations

import json
from typing import Any

import pytest
from safetensors.torch import load_file
from torch import nn
from transformers import CLIPTokenizer

from perfusion.toyland.build.card import FILE_NAME, card
from perfusion.toyland.build.report import BARS, REPORT, WEIGHTS
from perfusion.toyland.captions import vocabulary
from perfusion.toyland.models import TEXT_POSITIONS, autoencoder, text_encoder, unet
from perfusion.toyland.reader import Reader
from perfusion.toyland.tokenizer import build_tokenizer
from perfusion.toyland.world import WORLD_VERSION


@pytest.fixture(scope="module")
def report() -> dict[str, Any]:
    return json.loads((WEIGHTS / REPORT).read_text())


def test_they_know_the_words_of_this_world() -> None:
    words = build_tokenizer(vocabulary(), TEXT_POSITIONS)
    for folder in ("pipeline/tokenizer", "scorer"):
        assert CLIPTokenizer.from_pretrained(WEIGHTS / folder).get_vocab() == words.get_vocab(), folder


def test_they_are_of_the_builder_s_architectures() -> None:
    words = text_encoder(build_tokenizer(vocabulary(), TEXT_POSITIONS))
    parts: dict[str, nn.Module] = {"unet": unet(), "vae": autoencoder(), "text_encoder": words}
    for name, model in parts.items():
        (file,) = (WEIGHTS / "pipeline" / name).glob("*.safetensors")
        found = {key: value.shape for key, value in load_file(file).items()}
        assert found == {key: value.shape for key, value in model.named_parameters()}, name


def test_the_reader_is_of_this_world() -> None:
    assert not Reader.load(WEIGHTS / "reader").training


def test_they_are_small() -> None:
    assert sum(file.stat().st_size for file in WEIGHTS.rglob("*.safetensors")) <= 30e6


def test_the_card_says_what_the_report_says(report: dict[str, Any]) -> None:
    assert report["world_version"] == WORLD_VERSION
    assert {row["name"]: row["bar"] for row in report["bars"] if row["bar"] is not None} == BARS
    assert (WEIGHTS / FILE_NAME).read_text() == card(report)
