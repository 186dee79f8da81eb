"""`python -m perfusion.train`, from a command line to a finished folder."""

import json
import os
import shlex
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from perfusion import generate
from perfusion.cli import run_cli
from perfusion.concept import Concept
from perfusion.config import CONF, ConfigError
from perfusion.covariance.matrix import Matrix
from perfusion.training import loggers
from perfusion.training.trainer import check_keywords
from tests.segmenters import clipseg_folder
from tests.training import STEPS, given, run, validated


def test_the_command_makes_every_file(words: list[str], tmp_path: Path) -> None:
    asked = shlex.split(" ".join([*words, validated(tmp_path), f"run.root={tmp_path}"]))
    command = [sys.executable, "-m", "perfusion.train", *asked]
    done = subprocess.run(command, cwd=Path(__file__).parents[1], capture_output=True, text=True, timeout=280)
    assert done.returncode == 0, done.stderr
    (folder,) = (tmp_path / "default").iterdir()
    assert folder.name.startswith("photos-perfusion-")
    assert sorted(os.listdir(folder)) == [
        *("DONE", "concept.safetensors", "config.yaml", "inputs.json", "metrics.csv", "metrics.json", "progress"),
        "samples.png",
    ]
    concept = Concept.load(folder / "concept.safetensors")
    assert (concept.superclass, concept.placeholder, concept.settings["steps"]) == ("teddy bear", "<bear*>", STEPS)
    metrics = json.loads((folder / "metrics.json").read_text())
    assert metrics["step_kept"] in (2, 4, STEPS) and set(metrics["scores"]) == {"clip_i", "clip_t", "harmonic"}
    assert metrics["images"] == ["a.jpg", "b.png"] and metrics["masks"] is True and metrics["steps"] == STEPS
    assert 0 < metrics["seconds"]["training"] < metrics["seconds"]["total"] and metrics["resumed_at_step"] == 0
    assert metrics["peak_memory_bytes"] > 1e8 and "torch" in metrics["provenance"]["versions"]
    with Image.open(folder / "samples.png") as sheet:
        sheet.load()
        assert sheet.width > 1000 and sheet.height > 300
    rows = (folder / "metrics.csv").read_text().splitlines()
    assert len(rows) == 1 + STEPS and set(rows[0].split(",")) == {"step", "loss", "clip_i", "clip_t", "harmonic"}
    assert str(folder / "samples.png") in done.stdout
    assert (
        f"python -m perfusion.generate concept={folder}/concept.safetensors prompt='a photo of a <bear*>" in done.stdout
    )
    bar = [line for line in done.stdout.replace("\r", "\n").splitlines() if line.startswith("Training: 100%")][-1]
    assert all(part in bar for part in (f"{STEPS}/{STEPS} steps", "s/step", "left", "loss=")), bar
    for noise in ("GPU", "TPU", "Tip", "workers", "Traceback", "Warning", "deprecated"):
        assert noise not in done.stdout + done.stderr, done.stdout + done.stderr


def test_gradient_checkpointing_trains_the_same_concept(
    words: list[str], here: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """With samples drawn between its steps; and it is the same run, so its folder is the same."""
    calls: list[bool] = []
    checkpoint = torch.utils.checkpoint.checkpoint

    def noted(*args: Any, **keywords: Any) -> Any:
        calls.append(torch.is_grad_enabled())
        return checkpoint(*args, **keywords)

    monkeypatch.setattr(torch.utils.checkpoint, "checkpoint", noted)
    words += [validated(here)]
    assert run(*words, "run.dir=plain") == 0 and not calls
    assert run(*words, "run.dir=less", "backbone.gradient_checkpointing=true") == 0
    assert len(calls) >= STEPS and all(calls), "in training alone"
    assert Concept.load("less/concept.safetensors").hash == Concept.load("plain/concept.safetensors").hash
    for name in ("metrics.csv", "samples.png"):
        assert Path("less", name).read_bytes() == Path("plain", name).read_bytes()
    assert "gradient_checkpointing: true" in Path("less/config.yaml").read_text()
    capfd.readouterr()
    assert run(*words, "run.dir=plain", "backbone.gradient_checkpointing=true") == 0
    assert capfd.readouterr().out.startswith("finished already: plain")


def test_masks_that_do_not_count_are_said(words: list[str], here: Path, capfd: pytest.CaptureFixture[str]) -> None:
    assert run(*words, "method=textual_inversion method.steps=1 run.dir=run") == 0
    assert "concept.masks: they do not count, since method.masked_loss is false" in capfd.readouterr().out
    assert json.loads(Path("run/metrics.json").read_text())["masks"] is False


def test_a_run_with_drawn_masks_and_a_ready_matrix(words: list[str], here: Path) -> None:
    np.save("C.npy", np.eye(32))
    words = [*words, "method.steps=1", "run.dir=run", "backbone.covariance.matrix=C.npy"]
    assert run(*words, f"concept.masks=clipseg concept.clipseg={clipseg_folder(here)} concept.masks_cache=masks") == 0
    assert json.loads(Path("run/metrics.json").read_text())["masks"] is True
    assert len(os.listdir("masks")) == 2, "one for each picture"
    assert Concept.load("run/concept.safetensors").covariance == f"matrix@{Matrix(torch.eye(32)).digest}:0.01"


@pytest.mark.parametrize(
    ("preset", "file", "stock_name"),
    [
        ("textual_inversion_toyland", "learned_embeds.safetensors", lambda name: "<bear*>"),
        ("lora_toyland", "pytorch_lora_weights.safetensors", lambda name: f"unet.{name}"),
    ],
    ids=["textual_inversion", "lora"],
)
def test_a_run_of_another_method(
    preset: str,
    file: str,
    stock_name: Callable[[str], str],
    words: list[str],
    here: Path,
    capfd: pytest.CaptureFixture[str],
) -> None:
    """From the command line to pictures; what stock diffusers loads is what the concept file holds."""
    words += [f"method={preset} method.steps={STEPS} backbone.covariance.captions=never-read.txt"]
    assert run(*words, "run.dir=run") == 0
    said = capfd.readouterr().out
    assert os.listdir("run/diffusers") == [file]
    size = Path("run/diffusers", file).stat().st_size
    assert f"for stock diffusers: run/diffusers ({size / 1000:.1f} kB)" in said.splitlines()
    concept, written = Concept.load("run/concept.safetensors"), load_file(Path("run/diffusers", file))
    assert len(written) == len(concept.tensors) and concept.settings["steps"] == STEPS
    assert all(torch.equal(written[stock_name(name)], value.float()) for name, value in concept.tensors.items())

    assert run(*words, "run.dir=again") == 0
    assert Concept.load("again/concept.safetensors").hash == concept.hash, "all draws have seeds"

    drawn = f"path={given()}/pipeline prompt='a <bear*>' num=1 steps=1 device=cpu out=drawn"
    assert run_cli(generate.main, shlex.split(f"concept=run/concept.safetensors {drawn}")) == 0
    assert len(list(Path("drawn").glob("*-0000.png"))) == 1


def test_what_was_trained_in_half_precision_is_drawn_by_the_command_that_it_names(
    words: list[str], here: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """In the dtype of the training; and in float32 where none is named."""
    assert run(*words, "backbone.dtype=bfloat16 method.steps=1 run.dir=run") == 0
    (said,) = [line for line in capfd.readouterr().out.splitlines() if line.startswith("next: ")]
    start, *command = shlex.split(said.removeprefix("next: python -m "))
    assert start == "perfusion.generate" and command[-1] == "backbone.dtype=bfloat16"
    few = ["num=1", "steps=1", "device=cpu"]
    for folder, asked in (("half", command), ("single", command[:-1])):
        assert run_cli(generate.main, [*asked, *few, f"out={folder}"]) == 0, capfd.readouterr().err
    (half,), (single,) = (Path(folder).glob("*-0000.png") for folder in ("half", "single"))
    difference = np.asarray(Image.open(half)) - np.asarray(Image.open(single), dtype=int)
    assert 0 < np.abs(difference).max() < 30


def test_words_that_shorten_no_training_are_taken() -> None:
    check_keywords({"limit_train_batches": 1.0, "fast_dev_run": False, "overfit_batches": 0})
    check_keywords({"limit_train_batches": None, "max_time": "00:01:00:00"})


def test_help_says_what_there_is(here: Path, capfd: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        run("--help")
    assert stopped.value.code == 0
    shown = capfd.readouterr().out
    groups = ("backbone: kolors, pixart, sana, sd15, sd21, sdxl, toyland", "experiment: cat_fewshot, cat_oneshot")
    for part in ("usage: python -m perfusion.train", *groups):
        assert part in shown
    own = [line for line in shown.splitlines() if not line.startswith(("method: ", "experiment: "))]  # Hydra's lines
    assert all(len(line) <= 120 for line in own)
    assert not os.listdir(here)


def test_hydras_own_flags_do_what_they_do_in_any_program(
    here: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    assert run("--cfg", "job", "seed=7") == 0
    assert "seed: 7\n" in capfd.readouterr().out
    assert run("-sc", "install=bash") == 0
    assert "hydra_bash_completion()" in capfd.readouterr().out
    monkeypatch.setenv("COMP_LINE", "python train.py backbone=")
    assert run("-sc", "query=bash") == 0
    found = capfd.readouterr().out.split()
    assert found == sorted(f"backbone={file.stem}" for file in (CONF / "backbone").glob("*.yaml"))
    assert not os.listdir(here)


def test_wandb_without_an_account_logs_offline(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    spec = {"_target_": "lightning.pytorch.loggers.WandbLogger", "project": "perfusion"}
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("WANDB_API_KEY", "x" * 40)
    monkeypatch.setenv("WANDB_MODE", "set, so that it is put back")
    monkeypatch.delenv("WANDB_MODE")
    loggers.build("wandb", spec, tmp_path)
    assert "WANDB_MODE" not in os.environ and not capfd.readouterr().out
    monkeypatch.delenv("WANDB_API_KEY")
    logger = loggers.build("wandb", spec, tmp_path)
    assert os.environ["WANDB_MODE"] == "offline" and logger.save_dir == str(tmp_path)
    assert capfd.readouterr().out.startswith("wandb: no account found, logging offline")


def test_tensorboard_is_made_or_says_what_is_missing(tmp_path: Path) -> None:
    spec = {"_target_": "lightning.pytorch.loggers.TensorBoardLogger", "name": "tensorboard", "version": ""}
    try:
        import tensorboard  # noqa: F401
    except ModuleNotFoundError:
        with pytest.raises(ConfigError, match=r"logger\.tb: .*tensorboard"):
            loggers.build("tb", spec, tmp_path)
    else:
        assert Path(loggers.build("tb", spec, tmp_path).log_dir or "") == tmp_path / "tensorboard"


def test_custom_diffusion_with_real_pictures(words: list[str], here: Path, capfd: pytest.CaptureFixture[str]) -> None:
    Path("cats").mkdir()
    for k in range(3):
        Image.new("RGB", (80, 90), (80 * k, 0, 0)).save(f"cats/{k}.png")
    Path("cats/1.txt").write_text("sleeping")
    words += [f"method=custom_diffusion_toyland method.steps={STEPS} method.batch_size=1 method.prior_images=2"]
    assert run(*words, f"concept.prior=cats concept.prior_cache={here}/prior run.dir=run") == 0
    assert "drawing" not in capfd.readouterr().out and not Path("prior").exists()
    header, *rows = Path("run/metrics.csv").read_text().splitlines()
    assert header == "step,loss,loss/denoising,loss/prior" and len(rows) == STEPS
    assert Concept.load("run/concept.safetensors").method == "custom_diffusion"
    assert {"DONE", "samples.png"} <= {*os.listdir("run")} and not Path("run/diffusers").exists()
