"""Workers: what raises or is killed costs itself, what a worker keeps it has for its next task, and all of them end."""

import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from experiments.pool import Outcome, Pool, Task
from experiments.progress import Progress, clock
from tests import pool_tasks

ROOT = Path(__file__).resolve().parents[1]


def task(name: str, call: Callable[..., Any], *arguments: Any, needs: tuple[str, ...] = ()) -> Task:
    return Task(name, call, arguments, "train", 1.0, needs)


def test_a_task_that_fails_or_whose_worker_is_killed_costs_itself_alone(tmp_path: Path) -> None:
    tasks = [
        task("a", pool_tasks.double, 1),
        task("b", pool_tasks.fail, "no such cat\nand more"),
        task("c", pool_tasks.double, 2, needs=("b",)),
        task("d", pool_tasks.kill_once, tmp_path / "marker"),
        task("e", pool_tasks.double, 3, needs=("c",)),
        task("f", pool_tasks.double, 4, needs=("a",)),
        task("g", pool_tasks.threads),
    ]
    heard: list[Outcome] = []
    with Pool(2, tmp_path / "log") as pool:
        outcomes = pool.run(tasks, heard.append)
        again = pool.run([task("d", pool_tasks.kill_once, tmp_path / "marker")])
        processes = [worker.process for worker in pool._workers]
    assert {name: one.value for name, one in outcomes.items() if one.error is None} == {"a": 2, "f": 8, "g": "1"}
    errors = {name: one.error for name, one in outcomes.items() if one.error is not None}
    assert errors == {
        "b": "no such cat",
        "c": "not tried, for b failed",
        "d": "its worker was killed by SIGKILL",
        "e": "not tried, for c failed",
    }
    assert len(heard) == len(tasks) and again["d"].value == "alive"
    assert all(process.exitcode == 0 for process in processes), "they leave in order"
    said = "".join(file.read_text() for file in (tmp_path / "log").iterdir())
    assert "doubling 4" in said and "ValueError: no such cat" in said


def test_what_needs_a_task_that_was_not_tried_is_not_tried(tmp_path: Path) -> None:
    tasks = [
        task("a", pool_tasks.fail, "no"),
        task("b", pool_tasks.double, 1, needs=("a",)),
        task("c", pool_tasks.double, 2, needs=("b",)),
    ]
    with Pool(1, tmp_path) as pool:
        outcomes = pool.run(tasks)
    assert [outcomes[name].error for name in "bc"] == ["not tried, for a failed", "not tried, for b failed"]


def test_a_worker_keeps_what_it_has(tmp_path: Path) -> None:
    tasks = [task(str(k), pool_tasks.remembered, k) for k in range(4)]
    with Pool(1, tmp_path) as pool:
        assert pool.run(tasks)["3"].value == [0, 1, 2, 3]


def test_a_worker_that_is_killed_while_idle_is_replaced(tmp_path: Path) -> None:
    with Pool(1, tmp_path / "log") as pool:
        pool.run([task("a", pool_tasks.double, 1)])
        (killed,) = pool._workers
        killed.process.kill()
        killed.process.join()
        assert pool.run([task("b", pool_tasks.double, 2)])["b"].value == 4
        assert [worker is killed for worker in pool._workers] == [False]


def test_workers_end_with_the_process_that_started_them(tmp_path: Path) -> None:
    program = (
        "import os, signal, time\n"
        "from pathlib import Path\n"
        "from experiments.pool import Pool, Task\n"
        "if __name__ == '__main__':\n"
        "    def started(outcome):\n"
        "        print(pool._workers[0].process.pid, flush=True)\n"
        "        os.kill(os.getpid(), signal.SIGKILL)\n"
        f"    with Pool(1, Path({str(tmp_path)!r})) as pool:\n"
        "        pool.run([Task('a', abs, (1,), 'x'), Task('b', time.sleep, (600,), 'x')], started)\n"
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


def test_progress_counts_and_estimates(capsys: pytest.CaptureFixture[str]) -> None:
    tasks = [Task(str(k), abs, (k,), "draw", 10.0) for k in range(4)]
    progress = Progress(tasks, workers=2)
    progress.done(Outcome(tasks[0], seconds=20.0))
    assert progress.seconds_left() == pytest.approx(3 * 20 / 2)
    progress.done(Outcome(tasks[1], error="no"))
    for one in tasks[2:]:
        progress.done(Outcome(one, seconds=20.0))
    shown = capsys.readouterr().out
    assert progress.failures == ["1: no"] and "failed: 1: no" in shown and "4 of 4 tasks" in shown
    assert clock(125.9) == "2:05"
