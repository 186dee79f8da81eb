"""A training that is killed at random moments, again and again, ends as one that nobody disturbed: to the byte."""

from __future__ import annotations

import os
import random
import shlex
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from safetensors.torch import load_file

from tests.pipelines import tiny_pipeline_folder

ROOT = Path(__file__).resolve().parents[2]
KILLS = 20  # of each method, with each number of processes
METHODS = ["perfusion", "textual_inversion", "dreambooth", "custom_diffusion", "lora"]
SIGNALS = [signal.SIGINT, signal.SIGTERM, signal.SIGKILL]
BEGUN = "run folder:"  # what a training says before its first step
KEPT = ["concept.safetensors", "metrics.csv", "samples.png"]
LIMIT = 120.0  # seconds for one start of a training


class Training:
    """The command in a process of its own, whose output goes into a file."""

    def __init__(self, command: list[str], log: Path) -> None:
        self.log = log
        with open(log, "w") as output:
            environment = os.environ | {"OMP_NUM_THREADS": "1"}
            self.process = subprocess.Popen(
                command, cwd=ROOT, stdout=output, stderr=output, stdin=subprocess.DEVNULL, env=environment,
                start_new_session=True,
            )  # fmt: skip
        self.started = time.monotonic()

    def wait(self, until: Callable[[], bool]) -> bool:
        """Wait until that holds, or the process has ended; whether it is still there."""
        while self.process.poll() is None and not until():
            assert time.monotonic() - self.started < LIMIT, self.log.read_text()
            time.sleep(0.02)
        return self.process.poll() is None

    def seconds(self) -> float:
        return time.monotonic() - self.started

    def end(self) -> int:
        self.wait(lambda: False)
        return self.process.returncode

    def send(self, number: signal.Signals) -> None:
        """As a terminal sends Ctrl-C: to all processes of the group. Other signals reach the one that was started."""
        (os.killpg if number is signal.SIGINT else os.kill)(self.process.pid, number)


def outcome(folder: Path) -> dict[str, object]:
    tensors = load_file(folder / "concept.safetensors")
    found: dict[str, object] = {name: tensor.float().numpy().tobytes() for name, tensor in tensors.items()}
    return found | {name: (folder / name).read_bytes() for name in KEPT[1:]} | {"files": sorted(os.listdir(folder))}


@pytest.mark.trust
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("processes", [1, 2])
@pytest.mark.parametrize("method", METHODS)
def test_kills(method: str, processes: int, tmp_path: Path, record_property: Callable[[str, object], None]) -> None:
    words = (
        f"backbone=sd15 backbone.path={tiny_pipeline_folder(tmp_path)} backbone.device=cpu backbone.resolution=64 "
        f"backbone.steps=2 backbone.covariance.count=100 backbone.covariance.cache={tmp_path / 'covariance'} "
        f"concept.toyland.count=3 method={method} method.steps=60 method.batch_size=2 callbacks=none "
        f"callbacks.checkpoint.every=3 trainer.devices={processes} trainer.enable_progress_bar=false "
    )
    if method in ("dreambooth", "custom_diffusion"):
        words += f"method.prior_images=4 method.prior_steps=1 concept.prior_cache={tmp_path / 'prior'} "
    draw = random.Random(f"{method} {processes}")

    def start(folder: Path) -> Training:
        command = [sys.executable, "-m", "perfusion.train", *shlex.split(f"{words} run.dir={folder}")]
        return Training(command, tmp_path / "log")

    undisturbed = start(tmp_path / "undisturbed")
    assert undisturbed.wait(lambda: BEGUN in undisturbed.log.read_text()), undisturbed.log.read_text()
    before = undisturbed.seconds()
    assert undisturbed.end() == 0, undisturbed.log.read_text()
    lasts = undisturbed.seconds() - before
    expected = outcome(tmp_path / "undisturbed")

    folder, kills, compared, differences = tmp_path / "killed", 0, 0, []
    while kills < KILLS or folder.exists():
        training, number = start(folder), draw.choice(SIGNALS)
        if kills < KILLS:
            if draw.random() < 0.25:  # while it starts
                moment = draw.uniform(0, before)
                there = training.wait(lambda moment=moment, training=training: training.seconds() > moment)
            else:
                training.wait(lambda training=training: BEGUN in training.log.read_text())
                moment = training.seconds() + draw.uniform(0, 0.5 * lasts)
                there = training.wait(lambda moment=moment, training=training: training.seconds() > moment)
            if there:
                training.send(number)
                kills += 1
        status = training.end()
        said = training.log.read_text()
        assert status in (0, 130, *(-number for number in SIGNALS)), said
        # A signal that arrives while Python calls a __del__ is not heard: then the training goes on.
        assert "Traceback" not in said or "Exception ignored in" in said, said
        if (folder / "DONE").exists():
            compared += 1
            found = outcome(folder)
            if found != expected:
                differences.append([name for name in expected if found.get(name) != expected[name]])
                shutil.copytree(folder, tmp_path / f"different-{compared}")
            shutil.rmtree(folder)
    assert subprocess.run(["pgrep", "-f", str(tmp_path)], capture_output=True).returncode == 1, "none is left behind"
    record_property("kills", kills)
    record_property("trainings compared", compared)
    record_property("differences", len(differences))
    assert not differences
