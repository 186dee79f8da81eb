"""The README's pictures: which rows they have, and that a row is drawn with what it says."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from experiments import pictures
from experiments.pictures import BETAS, CAT, PICTURES, SCENES, TEDDY, TRAINED_KEYS, Studio, watched
from perfusion.cli import run_cli
from perfusion.concept import Concept
from perfusion.config import TrainConfig
from perfusion.editing.layer import EditedProjection
from perfusion.methods.base import Word
from perfusion.training import composition
from tests.concepts import toyland_backbone, untrained_concept
from tests.pipelines import toyland_folder


@pytest.fixture
def studio(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Studio:
    """Concepts that are not trained, in one step of the sampler."""
    backbone: Any = toyland_backbone(toyland_folder(tmp_path), tmp_path / "cache")
    backbone.config = dataclasses.replace(backbone.config, steps=1, resolution=16)
    known: dict[str, Concept] = {}

    def concept(self: Studio, words: Sequence[str]) -> Concept:
        (config,) = composed(words)
        name = f"{config.concept.name} {config.method['key_lock']}"
        if name not in known:
            word = Word(config.concept.placeholder, config.concept.superclass)
            known[name] = untrained_concept(backbone, word, len(known), key_lock=config.method["key_lock"])
        return known[name]

    monkeypatch.setattr(Studio, "concept", concept)
    return Studio(backbone, str(tmp_path), 0)


def composed(words: Sequence[str]) -> list[TrainConfig]:
    configs: list[TrainConfig] = []
    composition.run([*words], configs.append)
    return configs


def test_what_is_trained() -> None:
    cat, unlocked, teddy = (composed(words)[0] for words in (CAT, TRAINED_KEYS, TEDDY))
    assert (cat.concept.superclass, cat.method["key_lock"]) == ("cat", "local")
    assert unlocked.method["key_lock"] == "none" and unlocked.concept == cat.concept
    assert (teddy.concept.superclass, teddy.concept.placeholder) == ("teddy", "<teddy*>")


@pytest.mark.parametrize(("name", "rows"), [("strengths", 1 + len(BETAS)), ("locks", 3), ("two", 4), ("attention", 6)])
def test_rows_differ(name: str, rows: int, studio: Studio) -> None:
    drawn = PICTURES[name](studio)
    assert len(drawn) == rows and all(len(row) == len(SCENES) for _, row in drawn)
    seen = [b"".join(picture.tobytes() for picture in row) for _, row in drawn]
    assert len({*seen}) == rows
    assert not isinstance(studio.backbone.edit_sites()[0].projection, EditedProjection), "all is detached"


def test_the_command_writes_one_picture(
    studio: Studio, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys
) -> None:
    monkeypatch.setattr(pictures, "Studio", lambda *_: studio)
    assert run_cli(pictures.main, ["only=locks", f"out={tmp_path / 'images'}"]) == 0
    assert [file.name for file in (tmp_path / "images").iterdir()] == ["locks.png"]
    with Image.open(tmp_path / "images" / "locks.png") as picture:
        assert picture.width > 6 * 150
    assert run_cli(pictures.main, ["only=lock"]) != 0
    assert "only: found 'lock', expected one of strengths, locks, two, attention" in capsys.readouterr().err


def test_attention_to_a_word_is_that_of_its_position_and_nothing_stays(studio: Studio) -> None:
    """The attention to all positions is 1 at every place; layers and processors are the stock ones afterwards."""
    unet: Any = studio.backbone.denoiser
    layers = [module for name, module in unet.named_modules() if name.endswith("attn2")]
    before = [(layer.processor, dict(vars(layer))) for layer in layers]
    total = []
    for position in range(studio.backbone.pipe.tokenizer.model_max_length):  # type: ignore[attr-defined]
        with watched(unet, position) as maps:
            studio.draw(["a photo of a cat"])
        total.append(maps)
    assert len(total[0]) == len(layers) * studio.backbone.config.steps
    for of_one_call in zip(*total, strict=True):
        assert torch.allclose(torch.stack(of_one_call).sum(0), torch.ones_like(of_one_call[0]), atol=1e-4)
    assert [(layer.processor, dict(vars(layer))) for layer in layers] == before
