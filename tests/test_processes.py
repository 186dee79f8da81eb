"""Several processes train the concept that one trains, to rounding: `trainer.devices=2` on the CPU."""

import csv
import json
import os
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from safetensors.torch import load_file

from perfusion.config import BackboneConfig, ConfigError, TrainConfig
from perfusion.training.devices import device_count, device_of, rank_of
from tests.pipelines import tiny_pipeline_folder
from tests.scorers import make_scorer

ROOT = Path(__file__).resolve().parents[1]


def train(folder: Path, words: str, extra: str) -> str:
    """What a training in `folder` says."""
    command = [sys.executable, "-m", "perfusion.train", *shlex.split(f"{words} run.dir={folder} {extra}")]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=280, stdin=subprocess.DEVNULL)
    assert done.returncode == 0, done.stderr
    return done.stdout


def losses(file: Path) -> list[float]:
    with open(file, newline="") as rows:
        return [float(row["loss"]) for row in csv.DictReader(rows)]


def small_run(tmp_path: Path) -> str:
    """What trainings of this file have in common."""
    return (
        f"backbone=sd15 backbone.path={tiny_pipeline_folder(tmp_path)} backbone.device=cpu backbone.resolution=64 "
        f"backbone.steps=2 backbone.covariance.count=100 backbone.covariance.cache={tmp_path / 'covariance'} "
        "concept.toyland.count=3"
    )


def apart(one: Path, two: Path) -> dict[str, float]:
    """How far the tensors of two concepts are from one another, as shares of their norms."""
    first, second = load_file(one / "concept.safetensors"), load_file(two / "concept.safetensors")
    assert first.keys() == second.keys()
    found = {}
    for name, tensor in first.items():
        found[name] = ((second[name].float() - tensor.float()).norm() / tensor.float().norm()).item()
    return found


@pytest.mark.slow
def test_two_processes_train_the_concept_of_one(tmp_path: Path) -> None:
    """To 1e-4 of a tensor's norm: files hold half precision, and AdamW enlarges the rounding of small gradients."""
    scorer = make_scorer(tmp_path / "scorer", seed=10)
    words = (
        f"{small_run(tmp_path)} method=perfusion method.steps=6 method.batch_size=4 method.ema=0.8 "
        f"callbacks.checkpoint.every=2 callbacks.select.scorer={scorer} callbacks.select.every=2 "
        "callbacks.select.steps=1"
    )
    train(tmp_path / "one", words, "")
    said = train(tmp_path / "two", words, "trainer.devices=2")
    assert said.count("run folder:") == 1 and said.count("concept:") == 1, said
    assert max(apart(tmp_path / "one", tmp_path / "two").values()) < 1e-4
    first, second = (json.loads((tmp_path / name / "metrics.json").read_text()) for name in ("one", "two"))
    assert first["step_kept"] == second["step_kept"]
    assert second["scores"] == pytest.approx(first["scores"], abs=1e-3)
    alone, together = (losses(tmp_path / name / "metrics.csv") for name in ("one", "two"))
    assert len(alone) == 6 and together == pytest.approx(alone, rel=1e-3)
    assert sorted(os.listdir(tmp_path / "one")) == sorted(os.listdir(tmp_path / "two"))


@pytest.mark.slow
def test_two_processes_share_the_drawn_pictures_of_the_superclass(tmp_path: Path) -> None:
    """The first draws them before there is a second; each step takes as many as one process would."""
    words = (
        f"{small_run(tmp_path)} method=custom_diffusion method.steps=3 method.batch_size=2 method.prior_images=3 "
        f"method.prior_steps=1 concept.prior_cache={tmp_path / 'prior'} callbacks=none"
    )
    said = train(tmp_path / "two", words, "trainer.devices=2")
    assert said.count("drawing 8 pictures of 'photo of a ") == 1, said
    (drawn,) = (tmp_path / "prior").iterdir()
    assert len([*drawn.glob("*.png")]) == 8
    assert "drawing" not in train(tmp_path / "one", words, "")
    assert max(apart(tmp_path / "one", tmp_path / "two").values()) < 1e-3
    alone, together = (losses(tmp_path / name / "metrics.csv") for name in ("one", "two"))
    assert len(alone) == 3 and together == pytest.approx(alone, rel=1e-3)


def config(device: str = "auto", **trainer: object) -> TrainConfig:
    return TrainConfig(backbone=BackboneConfig(name="toyland", device=device), trainer=trainer)


@pytest.mark.parametrize(
    ("devices", "count"), [(None, 1), (1, 1), ("1", 1), ("auto", 1), (2, 2), ("2", 2), ([0, 3], 2), ([1], 1)]
)
def test_devices_are_counted(devices: object, count: int) -> None:
    assert device_count({"devices": devices}) == count


def test_every_process_has_its_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0,1,2")
    monkeypatch.setenv("LOCAL_RANK", "1")
    assert rank_of({"devices": 2}) == 1 and rank_of({"devices": 1}) == 0
    assert device_of(config(devices=2), 1) == "cuda:1" and device_of(config(devices=[0, 2]), 1) == "cuda:2"
    assert device_of(config(), 0) == "auto" and device_of(config("cuda:2"), 0) == "cuda:2"
    assert device_of(config("cpu", devices=2), 1) == "cpu" and device_of(config(devices=[2]), 0) == "cuda:2"
    with pytest.raises(ConfigError, match=r"backbone\.device=cuda:1: expected auto or cuda"):
        device_of(config("cuda:1", devices=2), 0)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    assert device_of(config(devices=2), 1) == "auto"
    with pytest.raises(ConfigError, match=r"trainer\.devices=all: expected a number"):
        device_count({"devices": "all"})


CHILD = (
    "import time; from perfusion.training.devices import join; print(join({'devices': 2}), flush=True); time.sleep(60)"
)
FIRST = f"""
import os, signal, subprocess, sys, time
from perfusion.training.devices import join
assert join({{"devices": 2}}) == 0
told = {{**os.environ, "LOCAL_RANK": "1"}}
child = subprocess.Popen([sys.executable, "-c", {CHILD!r}], env=told, stdout=subprocess.PIPE, text=True)
assert child.stdout.readline() == "1\\n"
child.send_signal(signal.SIGINT)
time.sleep(0.3)
print(child.pid if child.poll() is None else "ended", flush=True)
os.kill(os.getpid(), signal.SIGKILL)
"""


def test_a_process_ends_with_the_one_that_started_it_and_leaves_ctrl_c_to_it() -> None:
    first = subprocess.run([sys.executable, "-c", FIRST], cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert first.returncode == -signal.SIGKILL, first.stderr
    child, deadline = int(first.stdout), time.monotonic() + 20
    while Path(f"/proc/{child}").exists() and Path(f"/proc/{child}/stat").read_text().split()[2] != "Z":
        assert time.monotonic() < deadline, "it waits for a process that was killed"
        time.sleep(0.05)
