"""The builder's command, from nothing to weights that stock libraries load."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from perfusion.cli import run_cli
from perfusion.toyland.build import __main__ as build
from perfusion.toyland.build.measure import autoencoder_error, reader_accuracy, retrieval
from perfusion.toyland.build.shipped import Toyland


def test_stages_are_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run_cli(build.main, ["only=everything", f"folder={tmp_path / 'build'}"]) != 0
    said = capsys.readouterr().err
    assert (
        "only: found 'everything', expected one of autoencoder, words, diffusion, decoder, scorer, reader, assemble"
        in said
    )
    assert not (tmp_path / "build").exists()


@pytest.mark.slow
@pytest.mark.timeout(1500)  # six minutes are training; then there are latents, reconstructions and readings
def test_six_minutes_build_a_toyland_that_has_learned_something(tmp_path: Path) -> None:
    folder, out = tmp_path / "build", tmp_path / "out"
    words = ["minutes=6", "scenes=600", f"folder={folder}", f"out={out}"]
    assert run_cli(build.main, words) == 0
    report = json.loads((out / "report.json").read_text())
    assert list(report["training"]) == ["autoencoder", "words", "diffusion", "decoder", "scorer", "reader"]
    spent = sum(stage["elapsed"] for stage in report["training"].values())
    assert 360 <= spent < 390
    assert (out / "README.md").read_text().count("| autoencoder |") == 1

    toyland = Toyland(out)
    pipe = toyland.pipe
    assert autoencoder_error(pipe.vae, 32) < 0.25  # a constant gray leaves about 0.4
    assert retrieval(toyland.scorer, batches=5) > 0.025  # guessing: 0.01, with a standard error of 0.0045
    on_renders, _ = reader_accuracy(toyland, 200)
    assert on_renders["place"] > 0.3 and on_renders["style"] > 0.6  # guessing: 0.11, 0.33
    image = pipe("a photo of a cat", num_inference_steps=2, generator=torch.Generator().manual_seed(0)).images[0]
    assert image.size == (64, 64)
    before = (out / "pipeline" / "unet" / "diffusion_pytorch_model.safetensors").read_bytes()
    assert run_cli(build.main, words) == 0  # the time is spent: nothing is trained again
    assert (out / "pipeline" / "unet" / "diffusion_pytorch_model.safetensors").read_bytes() == before
