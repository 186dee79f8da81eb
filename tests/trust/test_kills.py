"""A training that is killed at random moments, again and again, ends as one that nobody disturbed: to the byte."""

from __future__ import annotations

import contextlib
import os
import random
import shlex
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from safetensors.torch import load_file
from tqdm import tqdm

from tests.pipelines import tiny_pipeline_folder

ROOT = Path(__file__).resolve().parents[2]
KILLS = {1: 32, 2: 8}  # of each method, by the number of processes: 200 in all
METHODS = ["perfusion", "textual_inversion", "dreambooth", "custom_diffusion", "lora"]
SIGNALS = [signal.SIGINT, signal.SIGTERM, signal.SIGKILL]
BEGUN = "run folder:"  # what a training says before its first step
KEPT = ["concept.safetensors", "metrics.csv", "samples.png"]
LIMIT = 600.0  # seconds for one start of a training; generous, for a machine that does other things as well


class Training:
    """`python -m perfusion.train` in a session of its own, whose output goes into a file.

    Where `apart`, as a new command; else forked from this process, which has loaded the libraries already, so that it
    begins at once: loading takes ten times as long as such a training.
    """

    def __init__(self, words: list[str], log: Path, apart: bool) -> None:
        self.log, self.status = log, None
        self.started = time.monotonic()
        with open(log, "wb") as output:
            if apart:
                command = [sys.executable, "-m", "perfusion.train", *words]
                environment = os.environ | {"OMP_NUM_THREADS": "1"}
                streams = {"stdin": subprocess.DEVNULL, "stdout": output, "stderr": output}
                started = subprocess.Popen(command, cwd=ROOT, env=environment, start_new_session=True, **streams)
                started.returncode = 0  # `wait` below is who asks
                self.pid = started.pid
            else:
                self.pid = os.fork() or _forked(words, output.fileno())

    def running(self) -> bool:
        if self.status is None:
            pid, status = os.waitpid(self.pid, os.WNOHANG)
            self.status = os.waitstatus_to_exitcode(status) if pid else None
        return self.status is None

    def wait(self, until: Callable[[], bool]) -> bool:
        """Wait until that holds, or the process has ended; whether it is still there."""
        while self.running() and not until():
            assert self.seconds() < LIMIT, self.said()
            time.sleep(0.01)
        return self.running()

    def said(self) -> str:
        return self.log.read_text()

    def begun(self) -> bool:
        return BEGUN in self.said()

    def seconds(self) -> float:
        return time.monotonic() - self.started

    def end(self) -> int:
        self.wait(lambda: False)
        assert self.status is not None
        return self.status

    def send(self, number: signal.Signals) -> None:
        """As a terminal sends Ctrl-C: to all processes of the group. Other signals reach the one that was started."""
        with contextlib.suppress(ProcessLookupError):
            (os.killpg if number is signal.SIGINT else os.kill)(self.pid, number)


def _forked(words: list[str], output: int) -> int:
    """What the child does."""
    from perfusion import train
    from perfusion.cli import run_cli

    status = 70
    try:
        os.setsid()
        for descriptor in (1, 2):
            os.dup2(output, descriptor)
        sys.stdout, sys.stderr = (os.fdopen(os.dup(output), "w", buffering=1) for _ in range(2))
        signal.signal(signal.SIGINT, signal.default_int_handler)
        signal.signal(signal.SIGALRM, signal.SIG_IGN)
        tqdm.set_lock(threading.RLock())  # its own is shared by all forks: one that was killed would hold it for ever
        sys.argv = ["train", *words]
        status = run_cli(train.main)
    except BaseException as error:
        print("Traceback", repr(error), file=sys.stderr)
    finally:
        sys.stdout.flush()
        os._exit(status)


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
        return Training(shlex.split(f"{words} run.dir={folder}"), tmp_path / "log", apart=processes > 1)

    first = start(tmp_path / "first")  # which loads, measures C, draws pictures of the superclass
    assert first.end() == 0, first.said()
    undisturbed = start(tmp_path / "undisturbed")
    assert undisturbed.wait(undisturbed.begun), undisturbed.said()
    before = undisturbed.seconds()
    assert undisturbed.end() == 0, undisturbed.said()
    lasts = undisturbed.seconds() - before
    expected = outcome(tmp_path / "undisturbed")
    assert outcome(tmp_path / "first") == expected

    folder, kills, compared, differences = tmp_path / "killed", 0, 0, []
    while kills < KILLS[processes] or folder.exists():
        training, number = start(folder), draw.choice(SIGNALS)
        if kills < KILLS[processes]:
            if draw.random() < 0.25:  # while it starts
                moment = draw.uniform(0, before)
            else:
                training.wait(training.begun)
                moment = training.seconds() + draw.uniform(0, 0.6 * lasts)
            if training.wait(lambda training=training, moment=moment: training.seconds() > moment):
                training.send(number)
                kills += 1
        status, said = training.end(), training.said()
        assert status in (0, 130, *(-number for number in SIGNALS)), said
        # A signal that arrives while Python calls a __del__ is not heard: then the training goes on. And what loses the
        # first process by SIGKILL may say so before it ends.
        heard = "Exception ignored in" not in said and not (processes > 1 and status == -signal.SIGKILL)
        assert "Traceback" not in said or not heard, said
        if (folder / "DONE").exists():
            again = start(folder)  # which finds it finished, and removes what a process left that was killed at its end
            assert again.end() == 0 and "finished already" in again.said(), again.said()
            compared += 1
            found = outcome(folder)
            if found != expected:
                differences.append([name for name in expected if found.get(name) != expected[name]])
                shutil.copytree(folder, tmp_path / f"different-{compared}")
            shutil.rmtree(folder)
    time.sleep(1)
    left = subprocess.run(["pgrep", "-f", str(tmp_path)], capture_output=True, text=True).stdout.split()
    assert not {*left} - {str(os.getpid())}, "none is left behind"
    record_property("kills", kills)
    record_property("trainings compared", compared)
    record_property("differences", len(differences))
    assert not differences
