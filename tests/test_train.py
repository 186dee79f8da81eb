"""`python -m perfusion.train`, from a command line to a finished folder, and its answers to mistakes."""

import json
import os
import shlex
import shutil
import signal
import socket
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from lightning.pytorch.loggers.logger import DummyLogger
from PIL import Image
from safetensors.torch import load_file

from perfusion import generate, train
from perfusion.backbones.stable_diffusion import StableDiffusionBackbone
from perfusion.cli import run_cli
from perfusion.concept import Concept
from perfusion.config import ConfigError
from perfusion.covariance.matrix import Matrix
from perfusion.toyland.draw import render
from perfusion.toyland.world import concept_scene, sample_instance
from perfusion.training import loggers
from perfusion.training.checkpoint import SafetensorsCheckpointIO
from perfusion.training.module import PersonalizationModule
from perfusion.training.run_folder import RunFolder, read_config
from perfusion.training.trainer import TimeLimit, check_keywords
from tests.pipelines import tiny_pipeline_folder
from tests.scorers import make_scorer
from tests.segmenters import clipseg_folder

ROOT = Path(__file__).resolve().parents[1]
STEPS = 5


@pytest.fixture(scope="module")
def pipeline(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_pipeline_folder(tmp_path_factory.mktemp("backbone"))


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two pictures of one toy, of different size and kind, with masks beside them."""
    folder = tmp_path_factory.mktemp("photos")
    (folder / "mask").mkdir()
    toy = sample_instance(np.random.default_rng(3), "cat")
    for k, (name, size) in enumerate([("a.jpg", (96, 80)), ("b.png", (50, 70))]):
        drawn = render(concept_scene(toy, k))
        Image.fromarray(drawn.image).resize(size).save(folder / name)
        Image.fromarray(drawn.masks[0]).resize(size).save((folder / "mask" / name).with_suffix(".png"))
    return folder


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("covariance")


@pytest.fixture
def words(pipeline: Path, photos: Path, cache: Path) -> list[str]:
    """A command line that trains in seconds."""
    return [
        f"backbone=sd15 backbone.path={pipeline} backbone.device=cpu backbone.resolution=64 backbone.steps=2",
        f"backbone.covariance.count=100 backbone.covariance.cache={cache}",
        f"method=perfusion method.steps={STEPS} method.batch_size=2 callbacks=none callbacks.checkpoint.every=2",
        f"concept=photos concept.images={photos} concept.masks={photos}/mask",
        "concept.superclass='teddy bear' concept.placeholder='<bear*>'",
    ]


def run(*words: str) -> int:
    return run_cli(train.main, shlex.split(" ".join(words)))


def test_the_command_makes_every_file(words: list[str], tmp_path: Path) -> None:
    scorer = make_scorer(tmp_path / "scorer")
    select = f"callbacks=select callbacks.select.scorer={scorer} callbacks.select.every=2 callbacks.select.steps=1"
    command = [
        sys.executable,
        "-m",
        "perfusion.train",
        *shlex.split(" ".join([*words, select, f"run.root={tmp_path}"])),
    ]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=280)
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
    for noise in ("GPU", "TPU", "Tip", "workers", "Traceback", "Warning", "deprecated"):
        assert noise not in done.stdout + done.stderr, done.stdout + done.stderr


def test_a_stopped_run_is_resumed_by_the_same_command(
    words: list[str], here: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    step = PersonalizationModule.training_step

    def stopping(self: PersonalizationModule, *args: Any) -> Any:
        if self.global_step == 3:
            os.kill(os.getpid(), signal.SIGTERM)
        return step(self, *args)

    monkeypatch.setattr(PersonalizationModule, "training_step", stopping)
    assert run(*words, "run.dir=stopped") == 130
    shown = capfd.readouterr()
    assert shown.err.splitlines()[-1] == "stopped at step 3; the same command goes on at step 2"
    assert "Traceback" not in shown.err and not Path("stopped/concept.safetensors").exists()

    monkeypatch.setattr(PersonalizationModule, "training_step", step)
    assert run(*words, "run.dir=stopped") == 0
    assert "run folder: stopped (going on at step 2)" in capfd.readouterr().out
    assert run(*words, "run.dir=whole") == 0
    assert Concept.load("stopped/concept.safetensors").hash == Concept.load("whole/concept.safetensors").hash
    assert Path("stopped/metrics.csv").read_text() == Path("whole/metrics.csv").read_text()
    assert Path("stopped/samples.png").read_bytes() == Path("whole/samples.png").read_bytes()
    assert sorted(os.listdir()) == ["stopped", "whole"], "nothing is left in the working directory"

    capfd.readouterr()
    before = Path("whole/DONE").stat().st_mtime_ns
    Path("whole/.training").touch()  # of a process that was killed after all was done
    assert run(*words, "run.dir=whole") == 0
    assert not Path("whole/.training").exists()
    assert capfd.readouterr().out.startswith("finished already: whole")
    assert Path("whole/DONE").stat().st_mtime_ns == before
    assert run(*words, "run.dir=whole", "seed=1") == 2
    assert "seed is 0 there and 1 here" in capfd.readouterr().err
    assert run("from=whole", "seed=1", "run.dir=whole", "run.overwrite=true", "method.steps=1") == 0
    whole, other = load_file("whole/concept.safetensors"), load_file("stopped/concept.safetensors")
    assert not torch.equal(whole["values"], other["values"])
    assert len(Path("whole/metrics.csv").read_text().splitlines()) == 2


@pytest.mark.parametrize("select", [False, True], ids=["plain", "validated"])
def test_a_time_limit_is_one_of_each_process_and_loses_no_step(
    select: bool, words: list[str], here: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    words = [*words, "trainer.max_time=00:00:00:10", "callbacks.checkpoint.every=100"]
    if select:
        words += [f"callbacks=select callbacks.select.scorer={make_scorer(here / 'scorer')}"]
        words += ["callbacks.select.every=2 callbacks.select.steps=1"]
    assert run(*words, "run.dir=whole") == 0
    steps: list[int] = []
    step = PersonalizationModule.training_step

    def noted(self: PersonalizationModule, *args: Any) -> Any:
        steps.append(self.global_step + 1)
        return step(self, *args)

    monkeypatch.setattr(PersonalizationModule, "training_step", noted)
    with monkeypatch.context() as patch:
        for at in (2, 4):
            patch.setattr(TimeLimit, "time_elapsed", lambda self, stage="train", at=at: 10 if len(steps) == at else 9)
            assert run(*words, "run.dir=run") == 130
            said = f"stopped at step {at} by trainer.max_time; the same command goes on at step {at}"
            assert capfd.readouterr().err.splitlines()[-1] == said and not Path("run/DONE").exists()
    assert run(*words, "run.dir=run") == 0
    assert steps == [1, 2, 3, 4, 5] and Path("run/DONE").exists()
    assert Concept.load("run/concept.safetensors").hash == Concept.load("whole/concept.safetensors").hash
    assert Path("run/metrics.csv").read_text() == Path("whole/metrics.csv").read_text()


@pytest.mark.parametrize("select", [False, True], ids=["plain", "validated"])
def test_what_is_stopped_while_it_is_saved_has_every_step_in_its_curve(
    select: bool, words: list[str], here: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A checkpoint is the last thing of its step: a training that goes on from it does not log that step again."""
    if select:
        words += [f"callbacks=select callbacks.select.scorer={make_scorer(here / 'scorer')}"]
        words += ["callbacks.select.every=2 callbacks.select.steps=1"]
    save = SafetensorsCheckpointIO.save_checkpoint

    def stopping(self: SafetensorsCheckpointIO, checkpoint: Any, path: Any, **more: Any) -> None:
        save(self, checkpoint, path, **more)
        if checkpoint["global_step"] == 4:
            os.kill(os.getpid(), signal.SIGTERM)

    monkeypatch.setattr(SafetensorsCheckpointIO, "save_checkpoint", stopping)
    assert run(*words, "run.dir=stopped") == 130
    monkeypatch.setattr(SafetensorsCheckpointIO, "save_checkpoint", save)
    assert run(*words, "run.dir=stopped") == 0 and run(*words, "run.dir=whole") == 0
    assert Path("stopped/metrics.csv").read_text() == Path("whole/metrics.csv").read_text()


@pytest.mark.parametrize("answer", [0, 1])
def test_a_job_of_slurm_saves_its_step_and_queues_again(
    answer: int, words: list[str], here: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    words = [*words, "callbacks.checkpoint.every=100", "run.dir=run", "run.requeue=true"]
    assert run(*words) == 2 and "run.requeue=true: found no SLURM_JOB_ID" in capfd.readouterr().err
    scontrol = here / "bin" / "scontrol"
    scontrol.parent.mkdir()
    scontrol.write_text(f"#!/bin/sh\necho $* >> {here}/asked\necho not now >&2\nexit {answer}\n")
    scontrol.chmod(0o755)
    monkeypatch.setenv("PATH", str(scontrol.parent), prepend=os.pathsep)
    monkeypatch.setenv("SLURM_JOB_ID", "17")
    with monkeypatch.context() as patch:
        patch.setattr(PersonalizationModule, "training_step", stopped_at(3, signal.SIGUSR1))
        assert run(*words) == 130
    queued = "not queued again (not now)" if answer else "queued again"
    said = f"stopped at step 4 by SIGUSR1, {queued}; the same command goes on at step 4"
    assert capfd.readouterr().err.splitlines()[-1] == said
    assert (here / "asked").read_text() == "requeue 17\n" and not Path("run/DONE").exists()
    assert run(*words) == 0 and Path("run/DONE").exists()


def stopped_at(step: int, number: int = signal.SIGTERM) -> Any:
    """A training step that has the process stopped before the one after `step`."""
    whole = PersonalizationModule.training_step

    def training_step(self: PersonalizationModule, *args: Any) -> Any:
        if self.global_step == step:
            os.kill(os.getpid(), number)
        return whole(self, *args)

    return training_step


def test_a_second_process_says_which_the_first_is_and_stops(
    words: list[str], here: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    with RunFolder(Path("run")).held():
        assert run(*words, "run.dir=run") == 2
    assert f"error: run: process {os.getpid()} on {socket.gethostname()} trains there" in capfd.readouterr().err
    assert run(*words, "run.dir=run", "method.steps=1") == 0
    with RunFolder(Path("run")).held():
        assert run(*words, "run.dir=run", "method.steps=1") == 0, "what is finished is not written to"
        assert run(*words, "run.dir=run", "run.overwrite=true") == 2


def test_a_run_is_its_config_and_what_it_has_read(
    words: list[str],
    pipeline: Path,
    photos: Path,
    here: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    """Photos of the same path that were replaced are found before a run is gone on with, and before it is finished
    already; run.overwrite=true trains with them."""
    shutil.copytree(photos, "photos")
    shutil.copytree(pipeline, "model")
    np.save("C.npy", np.eye(32))
    (here / "elsewhere").mkdir()
    words += [f"concept.images=photos concept.masks=photos/mask run.root={here}/runs backbone.path={here}/model"]
    words += [f"backbone.covariance.matrix={here}/C.npy"]
    with monkeypatch.context() as patch:
        patch.setattr(PersonalizationModule, "training_step", stopped_at(3))
        assert run(*words) == 130
    image, mask = Path("photos/a.jpg").read_bytes(), Path("photos/mask/b.png").read_bytes()
    (folder,) = (here / "runs/default").iterdir()
    for stage in ("begun", "finished"):
        capfd.readouterr()
        Image.new("RGB", (96, 80)).save("photos/a.jpg")
        Image.new("L", (50, 70), 200).save("photos/mask/b.png")
        np.save("C.npy", np.eye(32) * 2)
        weights = next(Path("model/unet").glob("*.safetensors"))
        before = weights.read_bytes()
        weights.write_bytes(before[:-1] + bytes([before[-1] ^ 1]))
        assert run(*words) == 2
        said = capfd.readouterr().err
        for key, name in (
            ("backbone.covariance.matrix", "C.npy"),
            ("backbone.path", f"unet/{weights.name}"),
            ("concept.images", "a.jpg"),
            ("concept.masks", "b.png"),
        ):
            assert f"{key}: {name} is another" in said, stage
        assert "b.jpg" not in said and "b.png is another); put those back" in said
        weights.write_bytes(before)
        np.save("C.npy", np.eye(32))
        Path("photos/a.jpg").write_bytes(image)
        Path("photos/mask/b.png").write_bytes(mask)
        assert run(*words) == 0, "what was put back is the same, whenever it was written"
        assert ("going on at step 2" if stage == "begun" else "finished already") in capfd.readouterr().out
    Image.new("RGB", (96, 80)).save("photos/a.jpg")
    monkeypatch.chdir("elsewhere")
    assert read_config(folder / "config.yaml").concept.images == str(here / "photos")
    shutil.copytree(photos, "photos")
    assert run(*words) == 0 and "finished already" in capfd.readouterr().out, "the same pictures"
    Path("photos/b.png").unlink()
    Path("photos/mask/b.png").unlink()
    assert (
        run(*words) == 2 and "(concept.images: b.png is gone; concept.masks: b.png is gone)" in capfd.readouterr().err
    )
    assert run(*words, "run.overwrite=true") == 0
    assert run(*words) == 0 and list(folder.parent.iterdir()) == [folder]
    assert json.loads((folder / "metrics.json").read_text())["images"] == ["a.jpg"]
    (folder / "inputs.json").unlink()
    shutil.copy(photos / "b.png", "photos")
    shutil.copy(photos / "mask/b.png", "photos/mask")
    assert run(*words) == 0, "a run of a former version, which does not say what it has read"


@pytest.mark.parametrize("other", ["method=lora", "seed=1"])
def test_a_checkpoint_of_another_run_is_not_gone_on_from(
    other: str, words: list[str], here: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(PersonalizationModule, "training_step", stopped_at(3))
        assert run(*words, "run.dir=run") == 130
        others = [word.replace("method=perfusion", other) for word in words] if "method" in other else [*words, other]
        assert run(*others, "run.dir=other") == 130
    capfd.readouterr()
    name = "checkpoints/step-000002.safetensors"
    Path("other", name).replace(Path("run", name))
    assert run(*words, "run.dir=run") == 2
    said = capfd.readouterr().err
    assert f"{name}: expected a checkpoint of this run" in said and "Traceback" not in said
    Path("run/config.yaml").unlink()
    assert run(*words, "run.dir=run", "method.value_rate=0.5") == 2
    assert "and no config.yaml that says of which run" in capfd.readouterr().err


def test_a_run_stays_until_the_one_that_replaces_it_is_finished(
    words: list[str], here: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """Whatever keeps the new one from that; and the new one goes on where it was stopped."""
    words += ["run.dir=run", "run.overwrite=true"]
    assert run(*words) == 0
    before = {file: file.read_bytes() for file in Path("run").rglob("*")}

    def stays() -> bool:
        return all(file.read_bytes() == content for file, content in before.items())

    assert run(*words, "seed=1", "callbacks=select") == 2
    assert "callbacks.select.scorer" in capfd.readouterr().err and stays()
    assert run(*words, "seed=1", "trainer.accelerator=gpu") == 2
    assert "trainer.accelerator=gpu: the backbone is on cpu" in capfd.readouterr().err and stays()
    with monkeypatch.context() as patch:
        patch.setattr(PersonalizationModule, "training_step", stopped_at(3))
        assert run(*words, "seed=1") == 130 and stays()
    assert "the same command goes on at step 2" in capfd.readouterr().err
    assert run(*words) == 0, "the old one, again; the stopped one is given up"
    assert "(going on" not in capfd.readouterr().out
    with monkeypatch.context() as patch:
        patch.setattr(PersonalizationModule, "training_step", stopped_at(3))
        assert run(*words, "seed=1") == 130
    capfd.readouterr()
    assert run(*words, "seed=1") == 0
    said = capfd.readouterr().out
    assert "run stays as it is until" in said and "(going on at step 2)" in said
    assert "concept: run/concept.safetensors" in said
    assert "seed: 1" in Path("run/config.yaml").read_text() and {*Path("run").rglob("*")} == {*before}


def test_a_folder_of_photos_is_not_trained_in(
    words: list[str], photos: Path, here: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    before = sorted(photos.rglob("*"))
    for overwrite in ("false", "true"):
        assert run(*words, f"run.dir={photos} run.overwrite={overwrite}") == 2
        assert "is no run's folder, for it holds pictures (a.jpg, b.png)" in capfd.readouterr().err
    assert sorted(photos.rglob("*")) == before


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
    scorer = make_scorer(here / "scorer")
    words += [f"callbacks=select callbacks.select.scorer={scorer} callbacks.select.every=2 callbacks.select.steps=1"]
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
    pipeline: Path,
    here: Path,
    capfd: pytest.CaptureFixture[str],
) -> None:
    """From the command line to pictures; what stock diffusers loads is what the concept file holds."""
    words = [word.replace("method=perfusion", f"method={preset}") for word in words]
    words += ["backbone.covariance.captions=never-read.txt run.dir=run"]
    assert run(*words) == 0
    said = capfd.readouterr().out
    assert os.listdir("run/diffusers") == [file]
    size = Path("run/diffusers", file).stat().st_size
    assert f"for stock diffusers: run/diffusers ({size / 1000:.1f} kB)" in said.splitlines()
    concept, written = Concept.load("run/concept.safetensors"), load_file(Path("run/diffusers", file))
    assert len(written) == len(concept.tensors) and concept.settings["steps"] == STEPS
    assert all(torch.equal(written[stock_name(name)], value.float()) for name, value in concept.tensors.items())

    again = [word.replace("run.dir=run", "run.dir=again") for word in words]
    assert run(*again) == 0
    assert Concept.load("again/concept.safetensors").hash == concept.hash, "all draws have seeds"

    capfd.readouterr()
    command = f"concept=run/concept.safetensors path={pipeline} prompt='a <bear*>' num=1 steps=1 device=cpu out=drawn"
    assert run_cli(generate.main, shlex.split(command)) == 0
    assert len(list(Path("drawn").glob("*-0000.png"))) == 1
    assert run_cli(generate.main, shlex.split(f"{command} beta=0.5")) == 2
    assert "beta: found a concept of the method" in capfd.readouterr().err


def test_what_was_trained_in_half_precision_is_drawn_by_the_command_that_it_names(
    words: list[str], here: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """In the dtype of the training; and in float32 where none is named."""
    assert run(*words, "backbone.dtype=bfloat16 method.steps=1 run.dir=run") == 0
    (said,) = [line for line in capfd.readouterr().out.splitlines() if line.startswith("next: ")]
    start, *command = shlex.split(said.removeprefix("next: python -m "))
    assert start == "perfusion.generate" and command[-1] == "backbone.dtype=bfloat16"
    few = ["num=1", "steps=1", "device=cpu"]
    for folder, given in (("half", command), ("single", command[:-1])):
        assert run_cli(generate.main, [*given, *few, f"out={folder}"]) == 0, capfd.readouterr().err
    (half,), (single,) = (Path(folder).glob("*-0000.png") for folder in ("half", "single"))
    difference = np.asarray(Image.open(half)) - np.asarray(Image.open(single), dtype=int)
    assert 0 < np.abs(difference).max() < 30


def test_a_crash_while_drawing_costs_no_step(
    words: list[str], here: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    def broken(*args: Any) -> None:
        raise OSError(28, "No space left on device", "samples.png")

    words = [*words, "method.steps=2", "run.dir=run"]
    with monkeypatch.context() as patch:
        patch.setattr("perfusion.training.samples.save_samples", broken)
        assert run(*words) == 2
    assert "No space left on device" in capfd.readouterr().err and not Path("run/DONE").exists()
    monkeypatch.setattr(PersonalizationModule, "training_step", broken)
    assert run(*words) == 0
    assert Path("run/DONE").exists() and len(Path("run/metrics.csv").read_text().splitlines()) == 3


def zero_mask(folder: Path) -> None:
    Image.new("L", (96, 80)).save(folder / "mask" / "a.png")


def truncated(folder: Path) -> None:
    data = (folder / "a.jpg").read_bytes()
    (folder / "a.jpg").write_bytes(data[: len(data) // 2])


@pytest.mark.parametrize(
    ("spoil", "extra", "parts"),
    [
        (truncated, "", ["a.jpg", "truncated"]),
        (zero_mask, "", ["a.png", "zero everywhere"]),
        (None, "concept.placeholder=cat", ["concept.placeholder", "'cat'", "already"]),
        (None, "concept.superclass=''", ["concept.superclass"]),
        (None, "concept.images=null", ["concept.masks", "concept.images"]),
        (None, "concept.masks=clipseg concept.clipseg=no/such/model", ["concept.clipseg", "no/such/model"]),
        (None, "backbone.covariance.positions=word", ["backbone.covariance.positions", "'word'", "all or words"]),
        (None, "backbone.covariance.captions=no.txt", ["backbone.covariance.captions", "'no.txt'"]),
        (None, "backbone.covariance.matrix=no.npy", ["backbone.covariance.matrix", "no.npy", "No such file"]),
        (None, "method.beat=1", ["method.beat", "'beta'"]),
        (None, "method.steps=0", ["method.steps", "at least 1"]),
        (None, "trainer.max_steps=2", ["trainer.max_steps", "method.steps instead"]),
        (None, "trainer.limit_train_batches=0", ["trainer.limit_train_batches=0", "method.steps instead"]),
        (None, "trainer.limit_train_batches=1", ["trainer.limit_train_batches=1:", "method.steps instead"]),
        (None, "trainer.fast_dev_run=true", ["trainer.fast_dev_run=True", "method.steps instead"]),
        (None, "trainer.overfit_batches=1", ["trainer.overfit_batches=1", "method.steps instead"]),
        (None, "trainer.overfit_batches=0.5", ["trainer.overfit_batches=0.5", "method.steps instead"]),
        (None, "seed=-1", ["seed=-1", "from 0"]),
        (None, "seed=20240101123456", ["seed=20240101123456", "4294967295"]),
        (
            None,
            "concept.images=null concept.masks=null concept.superclass=cat concept.toyland.instance=-1",
            ["concept.toyland.instance: found -1", "at least 0"],
        ),
        (None, "method.name=prefusion", ["method.name", "'prefusion'", "perfusion"]),
        (None, "backbone.path=no/such", ["backbone.path", "no/such"]),
        (None, "backbone.name=sd", ["backbone.name", "stable_diffusion"]),
    ],
)
def test_mistakes_are_answered_before_a_model_is_loaded(
    spoil: Any,
    extra: str,
    parts: list[str],
    words: list[str],
    photos: Path,
    here: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    def load(*args: Any) -> None:
        raise AssertionError("a model was loaded")

    monkeypatch.setattr(StableDiffusionBackbone, "load", load)
    if spoil is not None:
        own = here / "photos"
        own.mkdir()
        subprocess.run(["cp", "-r", f"{photos}/.", own], check=True)
        spoil(own)
        extra = f"concept.images={own} concept.masks={own}/mask"
    assert run(*words, extra) == 2
    shown = capfd.readouterr()
    assert shown.err.startswith("error: ") and "Traceback" not in shown.err and not shown.out
    assert all(part in shown.err for part in parts), shown.err
    assert not Path("runs").exists()


def test_words_that_shorten_no_training_are_taken() -> None:
    check_keywords({"limit_train_batches": 1.0, "fast_dev_run": False, "overfit_batches": 0})
    check_keywords({"limit_train_batches": None, "max_time": "00:01:00:00"})


def test_help_says_what_there_is(here: Path, capfd: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        run("--help")
    assert stopped.value.code == 0
    shown = capfd.readouterr().out
    groups = ("backbone: sd15, sd21, sdxl, toyland", "experiment: cat_fewshot, cat_oneshot")
    for part in ("usage: python -m perfusion.train", *groups):
        assert part in shown
    own = [line for line in shown.splitlines() if not line.startswith("method: ")]  # Hydra lists a group in one line
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
    assert capfd.readouterr().out.split() == [f"backbone={name}" for name in ("sd15", "sd21", "sdxl", "toyland")]
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


def test_a_training_that_goes_on_is_one_run_of_its_logger(
    words: list[str], here: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ids: list[Any] = []

    class Named(DummyLogger):
        def __init__(self, save_dir: str, id: str | None = None) -> None:
            super().__init__()
            ids.append(id)

    monkeypatch.setattr(loggers, "Named", Named, raising=False)
    words = [*words, "+logger.other._target_=perfusion.training.loggers.Named", "run.dir=run"]
    with monkeypatch.context() as patch:
        patch.setattr(PersonalizationModule, "training_step", stopped_at(3))
        assert run(*words) == 130
    assert run(*words) == 0 and run(*words, "run.overwrite=true") == 0
    first, again, new = ids
    assert first == again and new not in (first, None)


def test_tensorboard_is_made_or_says_what_is_missing(tmp_path: Path) -> None:
    spec = {"_target_": "lightning.pytorch.loggers.TensorBoardLogger", "name": "tensorboard", "version": ""}
    try:
        import tensorboard  # noqa: F401
    except ModuleNotFoundError:
        with pytest.raises(ConfigError, match=r"logger\.tb: .*tensorboard"):
            loggers.build("tb", spec, tmp_path)
    else:
        assert Path(loggers.build("tb", spec, tmp_path).log_dir or "") == tmp_path / "tensorboard"
