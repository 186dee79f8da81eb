"""The whole job of each architecture, small and with random weights: from pictures to a concept file to pictures, by
the commands that a user calls."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import Any

import pytest
import torch

import perfusion
from perfusion import generate, train
from perfusion.cli import run_cli
from perfusion.concept import Concept
from perfusion.inspect import main as inspect_main
from tests.backbone_kinds import KINDS
from tests.concepts import Snapshot
from tests.drawing import CLOSED, call
from tests.training import given

BEAR = "a photo of <bear*> on the beach"
PLAIN = "a photo of teddy bear on the beach"
OPEN = 0.4
# kind -> what its scheduler says the UNet predicts, width of each text encoder
SHAPES: dict[str, tuple[str, dict[str, int]]] = {
    "sd15": ("epsilon", {"text_encoder": 32}),
    "sd21": ("v_prediction", {"text_encoder": 32}),
    "sdxl": ("epsilon", {"text_encoder": 32, "text_encoder_2": 48}),
}


def run(main: Any, *words: str) -> int:
    return run_cli(main, shlex.split(" ".join(words)))


def learned(concept: Concept, pipe: Any, encoder: str) -> torch.Tensor:
    """How far the word's vector (1, d_e) has come from its start."""
    tokenizer = getattr(pipe, encoder.replace("text_encoder", "tokenizer"))
    ids = torch.tensor(tokenizer("teddy bear", add_special_tokens=False).input_ids)
    with torch.no_grad():
        start = getattr(pipe, encoder).get_input_embeddings()(ids).mean(0, keepdim=True)
    return concept.tensors[f"embedding.{encoder}"].float() - start


@pytest.mark.parametrize("kind", list(SHAPES))
def test_from_pictures_to_pictures(kind: str, here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (family, build), (prediction, widths) = KINDS[kind], SHAPES[kind]
    folder = build(here)
    words = [
        f"backbone={kind} backbone.path={folder} backbone.device=cpu backbone.resolution=64 backbone.steps=1",
        f"backbone.covariance.count=60 backbone.covariance.cache={here}/cache callbacks=none",
        "method=perfusion method.steps=3 method.batch_size=2 trainer.enable_progress_bar=false run.dir=run",
        f"concept=photos concept.images={given()}/photos",
        "concept.superclass='teddy bear' concept.placeholder='<bear*>'",
    ]
    assert run(train.main, *words) == 0, capsys.readouterr().err
    file = here / "run" / "concept.safetensors"
    concept = Concept.load(file)
    assert concept.fingerprint.keys() == {"family", *widths, "projections", "prompts"}
    assert concept.fingerprint["family"] == family

    pipe: Any = perfusion.load(kind, str(folder), device="cpu")
    assert pipe.scheduler.config.prediction_type == prediction
    for encoder, width in widths.items():
        change = learned(concept, pipe, encoder)
        assert change.shape == (1, width) and change.abs().max() > 1e-3, encoder
    untouched = call(pipe, PLAIN)
    before = Snapshot(pipe)  # transformers hooks its own layers at the first call
    states = {name: value.clone() for name, value in pipe.unet.state_dict().items()}
    with concept.attach(pipe) as attached:
        attached.beta = OPEN
        drawn = call(pipe, BEAR)
        assert drawn.isfinite().all() and (drawn - untouched).abs().max() > 1e-3
        attached.beta = CLOSED
        assert (call(pipe, BEAR) - drawn).abs().max() > 1e-3, "not the word alone, the edit is to be seen"
    assert before.differences() == [] and torch.equal(call(pipe, PLAIN), untouched)
    assert all(torch.equal(value, states[name]) for name, value in pipe.unet.state_dict().items())

    options = f"path={folder} device=cpu prompt='{BEAR}'"
    command = f"concept={file} {options} beta={OPEN},{CLOSED:g},inf num=1 steps=2 out=drawn"
    assert run(generate.main, command) == 0, capsys.readouterr().err
    pictures = {path.read_bytes() for path in (here / "drawn").glob("*-0000-beta-*.png")}
    assert len(pictures) == 3, "the concept, its word without the edit, the base model"
    capsys.readouterr()
    assert run(inspect_main, f"{file} {options}") == 0, capsys.readouterr().err
    assert "<bear*>" in capsys.readouterr().out
