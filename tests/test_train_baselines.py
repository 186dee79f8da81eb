"""`python -m perfusion.train` with DreamBooth and Custom Diffusion, from the command line to the folder."""

import json
import os
import shlex
import signal
from pathlib import Path
from typing import Any

import pytest
from PIL import Image
from safetensors import safe_open

from perfusion import train
from perfusion.backbones.stable_diffusion import StableDiffusionBackbone
from perfusion.cli import run_cli
from perfusion.concept import Concept
from perfusion.training.module import PersonalizationModule
from tests.pipelines import tiny_pipeline_folder

STEPS = 3


@pytest.fixture(scope="module")
def pipeline(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_pipeline_folder(tmp_path_factory.mktemp("backbone"))


@pytest.fixture
def words(pipeline: Path, here: Path) -> list[str]:
    """A command line that trains in seconds, but for the method."""
    return [
        f"backbone=sd15 backbone.path={pipeline} backbone.device=cpu backbone.resolution=64 backbone.steps=1",
        f"backbone.covariance.cache={here}/covariance concept.prior_cache={here}/prior",
        f"method.steps={STEPS} method.batch_size=1 method.prior_images=2 method.prior_steps=1",
        "callbacks=none callbacks.checkpoint.every=1",
    ]


def run(*words: str) -> int:
    return run_cli(train.main, shlex.split(" ".join(words)))


def columns(folder: str) -> tuple[set[str], int]:
    header, *rows = (Path(folder) / "metrics.csv").read_text().splitlines()
    return {*header.split(",")}, len(rows)


def test_dreambooth_is_resumed_exactly_and_draws_its_prior_once(
    words: list[str], monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    words = ["method=dreambooth_toyland", *words]
    step = PersonalizationModule.training_step

    def stopping(self: PersonalizationModule, *args: Any) -> Any:
        if self.global_step == 2:
            os.kill(os.getpid(), signal.SIGTERM)
        return step(self, *args)

    with monkeypatch.context() as patch:
        patch.setattr(PersonalizationModule, "training_step", stopping)
        assert run(*words, "run.dir=stopped") == 130
    shown = capfd.readouterr()
    assert "drawing 8 pictures of 'a photo of a cat', once" in shown.out
    assert shown.err.splitlines()[-1] == "stopped at step 2; the same command goes on at step 2"
    assert run(*words, "run.dir=stopped") == 0
    assert run(*words, "run.dir=whole", "concept.prior_cache=./prior") == 0
    assert "drawing" not in capfd.readouterr().out
    assert Concept.load("stopped/concept.safetensors").hash == Concept.load("whole/concept.safetensors").hash
    assert Path("stopped/metrics.csv").read_text() == Path("whole/metrics.csv").read_text()
    assert columns("whole") == ({"step", "loss", "loss/denoising", "loss/prior"}, STEPS)
    assert json.loads(Path("whole/diffusers/model_index.json").read_text())["_class_name"] == "StableDiffusionPipeline"
    with safe_open("whole/diffusers/unet/diffusion_pytorch_model.safetensors", framework="pt") as unet:
        assert (
            unet.get_tensor("conv_out.weight").dtype
            == Concept.load("whole/concept.safetensors").tensors["denoiser.conv_out.weight"].dtype
        )
    assert {"DONE", "samples.png"} <= {*os.listdir("whole")}


def test_custom_diffusion_with_real_pictures(words: list[str], capfd: pytest.CaptureFixture[str]) -> None:
    Path("cats").mkdir()
    for k in range(3):
        Image.new("RGB", (80, 90), (80 * k, 0, 0)).save(f"cats/{k}.png")
    Path("cats/1.txt").write_text("sleeping")
    assert run("method=custom_diffusion_toyland", *words, "run.dir=run concept.prior=cats") == 0
    assert "drawing" not in capfd.readouterr().out and not Path("prior").exists()
    assert columns("run") == ({"step", "loss", "loss/denoising", "loss/prior"}, STEPS)
    assert Concept.load("run/concept.safetensors").method == "custom_diffusion"
    assert {"DONE", "samples.png"} <= {*os.listdir("run")} and not Path("run/diffusers").exists()


@pytest.mark.parametrize(
    ("extra", "parts"),
    [
        ("concept.prior=no/cats", ["concept.prior", "no/cats"]),
        ("method.prior_images=-1", ["method.prior_images", "-1", "at least 0"]),
    ],
)
def test_mistakes_are_answered_before_a_model_is_loaded(
    extra: str,
    parts: list[str],
    words: list[str],
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    def load(*args: Any) -> None:
        raise AssertionError("a model was loaded")

    monkeypatch.setattr(StableDiffusionBackbone, "load", load)
    assert run("method=dreambooth_toyland", *words, extra) == 2
    shown = capfd.readouterr()
    assert shown.err.startswith("error: ") and all(part in shown.err for part in parts), shown.err
    assert not Path("runs").exists()
