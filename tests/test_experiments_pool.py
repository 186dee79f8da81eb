"""Workers: what raises costs itself, what was killed is tried again, what one keeps it has for its next task."""

import multiprocessing
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from experiments.pool import Outcome, Pool, Task
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
        task("h", pool_tasks.kill_once, tmp_path / "marker"),
    ]
    heard: list[Outcome] = []
    with Pool(2, tmp_path / "log") as pool:
        failed = pool.run(tasks, heard.append)
    values = {one.task.name: one.value for one in heard if one.error is None}
    assert values == {"a": 2, "f": 8, "g": "1", "h": "alive"}
    errors = {one.task.name: one.error for one in heard if one.error is not None}
    assert errors.pop("d").startswith("its worker was killed 3 times: ")
    assert errors == {"b": "no such cat", "c": "not tried, for b failed", "e": "not tried, for c failed"}
    assert failed == [f"{one.task.name}: {one.error}" for one in heard if one.error is not None]
    assert len(heard) == len(tasks)
    assert not multiprocessing.active_children(), "the workers are gone"
    shown = capsys.readouterr()
    assert "failed: b: no such cat" in shown.out and "so it is tried again: h" in shown.out
    assert "100% of 8 tasks" in shown.err
    said = "".join(file.read_text() for file in (tmp_path / "log").iterdir())
    assert "doubling 4" in said and "ValueError: no such cat" in said


def test_what_needs_a_task_that_was_not_tried_is_not_tried(tmp_path: Path) -> None:
    tasks = [
        task("a", pool_tasks.fail, "no"),
        task("b", pool_tasks.double, 1, needs=("a",)),
        task("c", pool_tasks.double, 2, needs=("b",)),
    ]
    with Pool(1, tmp_path) as pool:
        assert pool.run(tasks) == ["a: no", "b: not tried, for a failed", "c: not tried, for b failed"]


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


def test_workers_end_when_the_pool_is_left_by_an_error(tmp_path: Path) -> None:
    def stop(outcome: Outcome) -> None:
        raise KeyboardInterrupt

    begun = time.monotonic()
    tasks = [task("a", abs, 1), task("b", time.sleep, 600)]
    with pytest.raises(KeyboardInterrupt), Pool(2, tmp_path / "log") as pool:
        pool.run(tasks, stop)
    while multiprocessing.active_children():
        assert time.monotonic() < begun + 60, "the worker lives on"
        time.sleep(0.05)


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
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [sys.executable, str(tmp_path / "main.py")], env=environment, capture_output=True, text=True, check=False
    )
    worker = int(done.stdout)
    deadline = time.monotonic() + 60
    while Path(f"/proc/{worker}/cmdline").exists() and Path(f"/proc/{worker}/cmdline").read_bytes():
        assert time.monotonic() < deadline, "the worker lives on"
        time.sleep(0.05)
