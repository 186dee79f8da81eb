"""`python -m perfusion.covariance`: what it measures is what training finds."""

import dataclasses
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import perfusion
from perfusion import backbones
from perfusion.backbones import backbone_config, default_config
from perfusion.backbones.base import BackboneError
from perfusion.backbones.stable_diffusion import StableDiffusionBackbone
from perfusion.cli import run_cli
from perfusion.config import BackboneConfig
from perfusion.covariance import cache, configured
from perfusion.covariance.__main__ import CovarianceCommand, main, measure, next_command
from perfusion.covariance.matrix import load_matrix
from perfusion.training import composition
from tests.pipelines import toyland_folder

ROOT = Path(__file__).resolve().parents[1]
CAPTIONS = ["a red cat", "a photo of a blue dog on the beach", "two birds in the snow"]


@pytest.fixture(scope="module")
def pipeline(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return toyland_folder(tmp_path_factory.mktemp("pipeline"))


def no_encoding(*_: Any, **__: Any) -> Tensor:
    raise AssertionError("the captions were encoded again")


def config_of(line: str) -> BackboneConfig:
    """The backbone's config of the training that the command names at its end."""
    assert line.startswith("next: python -m perfusion.train ")
    configs: list[Any] = []
    composition.run(shlex.split(line)[4:], configs.append)
    return configs[0].backbone


def test_the_real_command_on_the_shipped_toyland(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    captions, out = tmp_path / "three.txt", tmp_path / "deep" / "C.safetensors"
    captions.write_text("\n".join(CAPTIONS))
    words = ["backbone=toyland", f"captions={captions}", f"cache={tmp_path}/cache", f"out={out}", "device=cpu"]
    command = [sys.executable, "-m", "perfusion.covariance", *words]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=280)
    assert done.returncode == 0, done.stderr
    assert "3/3" in done.stderr and "Traceback" not in done.stderr

    pipe = perfusion.load("toyland", device="cpu")
    e = pipe.encode_prompt(CAPTIONS, "cpu", 1, False)[0].double().flatten(0, 1)
    found = load_matrix(out)
    torch.testing.assert_close(found.C, e.T @ e / len(e), rtol=1e-6, atol=1e-6)
    assert found.count == len(e) == 3 * pipe.tokenizer.model_max_length
    said = done.stdout.splitlines()
    assert said[0].startswith("C of three.txt@") and f"{len(e)} vectors of width {len(found.C)}" in said[0]
    assert f"written: {out}" in done.stdout

    # Training finds it in the file, and without the file in the cache.
    monkeypatch.setattr(StableDiffusionBackbone, "_encode_captions", no_encoding)
    config = dataclasses.replace(config_of(said[-1]), device="cpu")
    assert config.covariance.matrix == str(out)
    assert torch.equal(backbones.around(pipe, config).moment().C, found.C)
    config.covariance.matrix, config.covariance.captions = None, str(captions)
    config.covariance.cache = f"{tmp_path}/cache"
    assert torch.equal(backbones.around(pipe, config).moment().C, found.C)


def test_an_interrupted_command_goes_on(
    pipeline: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def run(folder: str) -> int:
        words = f"path={pipeline} device=cpu count=50 positions=words cache={tmp_path / folder}"
        return run_cli(main, [*words.split(), f"out={tmp_path / folder}.safetensors"])

    monkeypatch.setattr(cache, "SAVE_EVERY_S", 0.0)
    monkeypatch.setattr("perfusion.bars.SECONDS", 0)  # between two lines
    monkeypatch.setattr(configured, "CAPTION_BATCH", 8)
    encode, seen = StableDiffusionBackbone._encode_captions, []

    def stopping(self: Any, batch: list[str]) -> Tensor:
        if len(seen) == 3:
            raise KeyboardInterrupt
        seen.append(batch)
        return encode(self, batch)

    with monkeypatch.context() as patch:
        patch.setattr(StableDiffusionBackbone, "_encode_captions", stopping)
        assert run("parts") == 130
    assert capsys.readouterr().err.endswith("stopped; the same command goes on after caption 24\n")
    assert not (tmp_path / "parts.safetensors").exists()
    assert run("parts") == 0
    shown = capsys.readouterr()
    assert "24/50" in shown.err and shown.out.startswith("C of toyland:50:0.01:words ")
    assert run("whole") == 0
    assert (tmp_path / "parts.safetensors").read_bytes() == (tmp_path / "whole.safetensors").read_bytes()

    monkeypatch.setattr(StableDiffusionBackbone, "_encode_captions", no_encoding)
    assert run("whole") == 0, "it is in the cache"


def test_without_a_file_the_next_command_finds_the_cache(
    pipeline: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    words = (
        f"backbone.path={pipeline} device=cpu backbone.covariance.count=9 positions=words cache={tmp_path} ridge=0.5"
    )
    assert run_cli(main, [*words.split(), "progress=false"]) == 0
    shown = capsys.readouterr()
    assert "caption/s" not in shown.err and "with ridge 0.5" in shown.out
    config = config_of(shown.out.splitlines()[-1])
    settings = config.covariance
    assert (settings.count, settings.positions, settings.cache, settings.ridge) == (9, "words", str(tmp_path), 0.5)
    monkeypatch.setattr(StableDiffusionBackbone, "_encode_captions", no_encoding)
    backbones.backbone_class(config.name).load(dataclasses.replace(config, device="cpu")).second_moment()


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("backbone=sd16", "backbone: no backbone 'sd16'"),
        ("captoins=x", "captoins: unknown key; did you mean 'captions'?"),
        ("matrix=C.npy", "matrix: unknown key"),
        ("captions=no/such.txt", "backbone.covariance.captions: found no file 'no/such.txt'"),
        ("count=0", "backbone.covariance.count: found 0, expected at least 1"),
        ("count=many", "count: "),
        ("positions=some", "backbone.covariance.positions: found 'some', expected all or words"),
        ("out=C.npy", "out: found 'C.npy', expected the name of a .safetensors file"),
        ("out=file/C.safetensors", "out: cannot make the folder file: "),
        ("path=no/such/folder", "backbone.path: no folder no/such/folder"),
    ],
)
def test_mistakes_are_answered_before_a_model_is_loaded(
    words: str, message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("file").write_text("")
    monkeypatch.setattr("diffusers.StableDiffusionPipeline.from_pretrained", no_encoding)
    assert run_cli(main, words.split()) == 2
    assert message in capsys.readouterr().err


def test_a_layout_is_used_and_handed_on(tmp_path: Path) -> None:
    command = CovarianceCommand(backbone="toyland", layout="sd21_base", out=str(tmp_path / "C.safetensors"))
    with pytest.raises(BackboneError, match=r"backbone\.layout: found 'sd21_base'"):
        measure(command)
    assert "backbone.layout=sd21_base" in next_command(
        command, dataclasses.replace(default_config("toyland"), layout="sd21_base"), None
    )


@pytest.mark.parametrize("name", ["sd15", "sd21", "sdxl", "stable_diffusion"])
def test_the_next_command_trains_on_the_users_pictures(name: str, tmp_path: Path) -> None:
    command = CovarianceCommand(backbone=name, path="/models/a b", out=str(tmp_path / "C.safetensors"))
    config = backbone_config(name, command.path, command.dtype, "cpu", None)
    configs: list[Any] = []
    composition.run(shlex.split(next_command(command, config, tmp_path / "C.safetensors"))[3:], configs.append)
    (found,) = configs
    assert found.backbone.path == "/models/a b" and found.backbone.covariance.matrix == command.out
    assert found.concept.images == "photos/" and found.method["name"] == "perfusion" and found.method["steps"] == 400
