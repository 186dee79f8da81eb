"""Trainings that are stopped, killed, gone on with and replaced: no step is lost or done twice, no run is mixed."""

import json
import os
import shutil
import signal
import socket
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from lightning.pytorch.callbacks import Timer
from lightning.pytorch.loggers.logger import DummyLogger
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file

from perfusion.concept import Concept
from perfusion.training import loggers
from perfusion.training.checkpoint import SafetensorsCheckpointIO
from perfusion.training.module import PersonalizationModule
from perfusion.training.run_folder import RunFolder, read_config
from tests.training import given, run, run_stopped, validated


def test_a_stopped_run_is_resumed_by_the_same_command(
    words: list[str], here: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    assert run_stopped(3, *words, "run.dir=stopped") == 130
    shown = capfd.readouterr()
    assert shown.err.splitlines()[-1] == "stopped at step 3; the same command goes on at step 2"
    assert "Traceback" not in shown.err and not Path("stopped/concept.safetensors").exists()

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
    words = [*words, "trainer.max_time=00:01:00:00", "callbacks.checkpoint.every=100"]
    if select:
        words += [validated(here)]
    assert run(*words, "run.dir=whole") == 0
    steps: list[int] = []
    step = PersonalizationModule.training_step

    def noted(self: PersonalizationModule, *args: Any) -> Any:
        steps.append(self.global_step + 1)
        return step(self, *args)

    monkeypatch.setattr(PersonalizationModule, "training_step", noted)
    with monkeypatch.context() as patch:
        for at in (2, 4):
            patch.setattr(Timer, "time_elapsed", lambda self, stage="train", at=at: 3600 * (len(steps) == at))
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
        words += [validated(here)]
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
    assert run_stopped(3, *words, number=signal.SIGUSR1) == 130
    queued = "not queued again (not now)" if answer else "queued again"
    said = f"stopped at step 4 by SIGUSR1, {queued}; the same command goes on at step 4"
    assert capfd.readouterr().err.splitlines()[-1] == said
    assert (here / "asked").read_text() == "requeue 17\n" and not Path("run/DONE").exists()
    assert run(*words) == 0 and Path("run/DONE").exists()


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
    words: list[str], here: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """Photos of the same path that were replaced are found before a run is gone on with, and before it is finished
    already; run.overwrite=true trains with them."""
    photos = given() / "photos"
    shutil.copytree(photos, "photos")
    shutil.copytree(given() / "pipeline", "model")
    np.save("C.npy", np.eye(32))
    (here / "elsewhere").mkdir()
    words += [f"concept.images=photos concept.masks=photos/mask run.root={here}/runs backbone.path={here}/model"]
    words += [f"backbone.covariance.matrix={here}/C.npy"]
    assert run_stopped(3, *words) == 130
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
    other: str, words: list[str], here: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    assert run_stopped(3, *words, "run.dir=run") == 130
    others = [word.replace("method=perfusion", other) for word in words] if "method" in other else [*words, other]
    assert run_stopped(3, *others, "run.dir=other") == 130
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
    words: list[str], here: Path, capfd: pytest.CaptureFixture[str]
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
    assert run_stopped(3, *words, "seed=1") == 130 and stays()
    assert "the same command goes on at step 2" in capfd.readouterr().err
    assert run(*words) == 0, "the old one, again; the stopped one is given up"
    assert "(going on" not in capfd.readouterr().out
    assert run_stopped(3, *words, "seed=1") == 130
    capfd.readouterr()
    assert run(*words, "seed=1") == 0
    said = capfd.readouterr().out
    assert "run stays as it is until" in said and "(going on at step 2)" in said
    assert "concept: run/concept.safetensors" in said
    assert "seed: 1" in Path("run/config.yaml").read_text() and {*Path("run").rglob("*")} == {*before}


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
    assert run_stopped(3, *words) == 130
    assert run(*words) == 0 and run(*words, "run.overwrite=true") == 0
    first, again, new = ids
    assert first == again and new not in (first, None)


def test_dreambooth_is_resumed_exactly_and_draws_its_prior_once(
    words: list[str], here: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    words += ["method=dreambooth_toyland method.steps=3 method.batch_size=1 method.prior_images=2 method.prior_steps=1"]
    words += [f"concept.prior_cache={here}/prior callbacks.checkpoint.every=1"]
    assert run_stopped(2, *words, "run.dir=stopped") == 130
    shown = capfd.readouterr()
    assert "drawing 8 pictures of 'a photo of a teddy bear', once" in shown.out
    assert shown.err.splitlines()[-1] == "stopped at step 2; the same command goes on at step 2"
    assert run(*words, "run.dir=stopped") == 0
    assert run(*words, "run.dir=whole", "concept.prior_cache=./prior") == 0
    assert "drawing" not in capfd.readouterr().out
    assert Concept.load("stopped/concept.safetensors").hash == Concept.load("whole/concept.safetensors").hash
    assert Path("stopped/metrics.csv").read_text() == Path("whole/metrics.csv").read_text()
    assert Path("whole/metrics.csv").read_text().startswith("step,loss,loss/denoising,loss/prior\n1,")
    assert json.loads(Path("whole/diffusers/model_index.json").read_text())["_class_name"] == "StableDiffusionPipeline"
    with safe_open("whole/diffusers/unet/diffusion_pytorch_model.safetensors", framework="pt") as unet:
        assert unet.get_tensor("conv_out.weight").dtype == torch.float16
    assert {"DONE", "samples.png"} <= {*os.listdir("whole")}
