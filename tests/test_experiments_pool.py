"""Workers, here and elsewhere: what raises costs itself, what was killed is tried again, what one keeps it has for its
next task. Elsewhere is a Ray cluster of two workers, and jobs of submitit, which are processes here."""

import importlib.util
import multiprocessing
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from experiments.pool import Executor, Outcome, Pool, Task, executor_of, in_ray, in_slurm, local
from perfusion.config import ConfigError
from tests import pool_tasks

ROOT = Path(__file__).resolve().parents[1]


def task(name: str, call: Callable[..., Any], *arguments: Any, needs: tuple[str, ...] = ()) -> Task:
    return Task(name, call, arguments, "train", 1.0, needs)


def test_a_task_that_fails_or_whose_workers_are_all_killed_costs_itself_alone(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    tasks = [
        task("a", pool_tasks.double, 1),
        task("b", pool_tasks.fail, "no such cat\nand more"),
        task("c", pool_tasks.double, 2, needs=("b",)),
        task("d", pool_tasks.kill),
        task("e", pool_tasks.double, 3, needs=("c",)),
        task("f", pool_tasks.double, 4, needs=("a",)),
        task("g", pool_tasks.threads),
    ]
    heard: list[Outcome] = []
    with Pool(2, tmp_path / "log") as pool:
        failed = pool.run(tasks, heard.append)
    values = {one.task.name: one.value for one in heard if one.error is None}
    assert values == {"a": 2, "f": 8, "g": "1"}
    errors = {one.task.name: one.error for one in heard if one.error is not None}
    assert errors.pop("d").startswith("its worker was killed 3 times: ")
    assert errors == {"b": "no such cat", "c": "not tried, for b failed", "e": "not tried, for c failed"}
    assert failed == [f"{one.task.name}: {one.error}" for one in heard if one.error is not None]
    assert len(heard) == len(tasks)
    assert not multiprocessing.active_children(), "the workers are gone"
    shown = capsys.readouterr()
    assert "failed: b: no such cat" in shown.out and "so it is tried again: d" in shown.out
    assert "100% of 7 tasks" in shown.err
    said = "".join(file.read_text() for file in (tmp_path / "log").iterdir())
    assert "doubling 4" in said and "ValueError: no such cat" in said


def test_a_worker_keeps_what_it_has(tmp_path: Path) -> None:
    heard: list[Outcome] = []
    with Pool(1, tmp_path) as pool:
        pool.run([task(str(k), pool_tasks.remembered, k) for k in range(4)], heard.append)
    assert heard[-1].value == [0, 1, 2, 3]


def test_a_worker_that_is_killed_while_idle_is_replaced(tmp_path: Path) -> None:
    heard: list[Outcome] = []
    with Pool(1, tmp_path / "log") as pool:
        pool.run([task("a", os.getpid)], heard.append)
        os.kill(heard[0].value, signal.SIGKILL)
        time.sleep(1)  # until the pool has heard of it
        assert pool.run([task("b", os.getpid)], heard.append) == []
    assert heard[0].value != heard[1].value


def test_workers_end_with_the_process_that_started_them(tmp_path: Path) -> None:
    program = (
        "import os, signal, time\n"
        "from pathlib import Path\n"
        "from experiments.pool import Pool, Task\n"
        "if __name__ == '__main__':\n"
        "    def started(outcome):\n"
        "        print(outcome.value, flush=True)\n"
        "        os.kill(os.getpid(), signal.SIGKILL)\n"
        f"    with Pool(1, Path({str(tmp_path)!r})) as pool:\n"
        "        pool.run([Task('a', os.getpid, (), 'x'), Task('b', time.sleep, (600,), 'x')], started)\n"
    )
    (tmp_path / "main.py").write_text(program)
    done = subprocess.run([sys.executable, str(tmp_path / "main.py")], capture_output=True, text=True, check=False)
    worker = int(done.stdout)
    deadline = time.monotonic() + 60
    while Path(f"/proc/{worker}/cmdline").exists() and Path(f"/proc/{worker}/cmdline").read_bytes():
        assert time.monotonic() < deadline, "the worker lives on"
        time.sleep(0.05)


@pytest.fixture(scope="module", autouse=True)
def path() -> Iterator[None]:
    """For processes that others start."""
    with pytest.MonkeyPatch.context() as patched:
        patched.setenv("PYTHONPATH", str(ROOT))
        yield


@pytest.fixture(scope="module")
def cluster() -> Iterator[Any]:
    """Two CPUs; and two GPUs, as Ray believes."""
    ray = pytest.importorskip("ray")
    few = {"include_dashboard": False, "log_to_driver": False, "object_store_memory": 8 * 10**7}
    ray.init("local", num_cpus=2, num_gpus=2, **few)
    yield ray
    ray.shutdown()


@pytest.fixture(params=["local", "ray", "submitit"])
def executor(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Executor:
    monkeypatch.chdir(tmp_path)
    if request.param == "local":
        return local
    if request.param == "ray":
        request.getfixturevalue("cluster")
        return in_ray
    core = pytest.importorskip("submitit.core.core")
    monkeypatch.setattr(core.Job, "_results_timeout_s", 1)  # for which it waits for the file of a job that is over
    return partial(in_slurm, parameters={"timeout_min": 5}, cluster="local")


def test_tasks_fail_and_are_tried_again_wherever_they_run(executor: Executor, tmp_path: Path) -> None:
    tasks = [
        Task("a", pool_tasks.kill_once, (Path("marker"),), "train"),
        Task("b", os.getcwd, (), "train", needs=("a",)),
        Task("c", pool_tasks.fail, ("no such cat",), "train"),
    ]
    heard: list[Outcome] = []
    with Pool(2, tmp_path / "log", executor) as pool:
        assert pool.run(tasks, heard.append) == ["c: no such cat"]
    values = {one.task.name: one.value for one in heard}
    assert values == {"a": "alive", "b": str(tmp_path), "c": None}


@pytest.fixture
def interruptible() -> Iterator[None]:
    """Submitit's local processes, which stand for jobs of SLURM, are ended by SIGINT. Where the tests run in the
    background of a script it is ignored, and so it would be there."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


def test_tasks_end_when_the_pool_is_left_by_an_error(executor: Executor, interruptible: None, tmp_path: Path) -> None:
    def stop(outcome: Outcome) -> None:
        raise KeyboardInterrupt

    said = tmp_path / "said"
    tasks = [Task("a", pool_tasks.sleep, (said,), "train"), Task("b", pool_tasks.wait_for, (said,), "train")]
    with pytest.raises(KeyboardInterrupt), Pool(2, tmp_path / "log", executor) as pool:
        pool.run(tasks, stop)
    deadline = time.monotonic() + 60
    with suppress(ProcessLookupError):
        while True:
            os.kill(int(said.read_text()), 0)
            assert time.monotonic() < deadline, "the task goes on"
            time.sleep(0.05)


def test_a_worker_in_ray_keeps_what_it_has_and_has_a_gpu_of_its_own(cluster: Any, tmp_path: Path) -> None:
    heard: list[Outcome] = []
    with Pool(1, tmp_path / "log", in_ray) as pool:
        pool.run([Task(str(k), pool_tasks.remembered, (k,), "train") for k in range(3)], heard.append)
    assert heard[-1].value == [0, 1, 2]
    ends = [tmp_path / "x", tmp_path / "y"]
    tasks = [Task(str(k), pool_tasks.gpu_of_one_of_two, tuple(ends[::k]), "train") for k in (1, -1)]
    with Pool(2, tmp_path / "log", executor_of("ray", gpus=1)) as pool:
        pool.run(tasks, heard.append)
    assert {one.value for one in heard[-2:]} == {"0", "1"}
    with pytest.raises(ConfigError, match="device: found no GPU in the Ray cluster"):
        Pool(1, tmp_path, executor_of("ray", gpus=3)).__enter__()


def test_an_executor_that_is_not_installed_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ConfigError, match="found no ray, expected it"):
        executor_of("ray")
