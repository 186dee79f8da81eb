"""Persistent worker processes, one thread each: what a worker has loaded, it keeps for its next task.

A task that raises, or whose worker is killed, costs that task and those that need it; the others go on. Workers end
with the process that started them, however that ends.
"""

from __future__ import annotations

import multiprocessing
import os
import signal
import sys
import threading
import time
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from multiprocessing import connection
from pathlib import Path
from types import TracebackType
from typing import Any

_THREADS = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS")
_SPAWN = multiprocessing.get_context("spawn")


@dataclass(frozen=True)
class Task:
    """A call, made in a worker.

    Attributes:
        name: for people, and unique.
        call: a function at the top level of a module.
        kind: tasks of one kind take time in proportion to their `size`.
        needs: names of tasks that have to succeed before it.
        about: whatever the one who made it wants to find again in its outcome.
    """

    name: str
    call: Callable[..., Any]
    arguments: tuple[Any, ...]
    kind: str
    size: float = 1.0
    needs: tuple[str, ...] = ()
    about: Any = None


@dataclass(frozen=True)
class Outcome:
    """How a task ended: with a value, or with an error in one line."""

    task: Task
    value: Any = None
    error: str | None = None
    seconds: float = 0.0


@dataclass
class _Worker:
    process: Any
    tasks: Any  # connection: (call, arguments) one way, (value, error) the other
    lifeline: Any  # connection that nobody writes to: it closes when this process ends
    task: Task | None = None
    begun: float = 0.0


@dataclass
class Pool:
    """Workers for tasks: `with Pool(2, logs) as pool: outcomes = pool.run(tasks)`.

    Attributes:
        size: number of workers.
        logs: folder, made if missing, for what the workers print.
    """

    size: int
    logs: Path
    _workers: list[_Worker] = field(default_factory=list)

    def __enter__(self) -> Pool:
        self.logs.mkdir(parents=True, exist_ok=True)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for worker in self._workers:
            self._end(worker)
        self._workers.clear()

    def run(self, tasks: Sequence[Task], done: Callable[[Outcome], None] = lambda outcome: None) -> dict[str, Outcome]:
        """All outcomes by the tasks' names. Tasks begin in their order as far as what they need is there.

        Args:
            done: called with each outcome, in this process, as soon as it is known.
        """
        names = {task.name for task in tasks}
        assert len(names) == len(tasks) and all({*task.needs} <= names for task in tasks)
        outcomes: dict[str, Outcome] = {}
        waiting = list(tasks)

        def settle(outcome: Outcome) -> None:
            outcomes[outcome.task.name] = outcome
            done(outcome)

        while len(outcomes) < len(tasks):
            for task in [task for task in waiting if _missed(task, outcomes)]:
                waiting.remove(task)
                settle(Outcome(task, error=f"not tried, for {_missed(task, outcomes)} failed"))
            while (ready := _first_ready(waiting, outcomes)) and (worker := self._idle()):
                waiting.remove(ready)
                worker.task, worker.begun = ready, time.monotonic()
                worker.tasks.send((ready.call, ready.arguments))
            busy = [worker for worker in self._workers if worker.task is not None]
            if busy:
                ended = connection.wait([worker.tasks for worker in busy])
                for worker in busy:
                    if worker.tasks in ended:
                        settle(self._outcome(worker))
        return outcomes

    def _idle(self) -> _Worker | None:
        for worker in [worker for worker in self._workers if worker.task is None]:
            if worker.process.is_alive():
                return worker
            self._end(worker)  # killed while it had nothing to do
            self._workers.remove(worker)
        if len(self._workers) == self.size:
            return None
        self._workers.append(_started(self.logs / f"worker-{len(self._workers)}.log"))
        return self._workers[-1]

    def _outcome(self, worker: _Worker) -> Outcome:
        """What a worker has to say of its task; one that was killed says nothing, and another takes its place."""
        assert worker.task is not None
        task, seconds = worker.task, time.monotonic() - worker.begun
        try:
            value, error = worker.tasks.recv()
            worker.task = None
        except (EOFError, ConnectionError):
            worker.process.join()
            value, error = None, _death(worker.process.exitcode)
            self._end(worker)
            self._workers.remove(worker)
        return Outcome(task, value, error, seconds)

    def _end(self, worker: _Worker) -> None:
        worker.tasks.close()
        if worker.task is None:  # it reads that there are no more, and leaves in order
            worker.process.join(timeout=10)
        worker.lifeline.close()
        worker.process.join(timeout=5)


def _first_ready(waiting: Sequence[Task], outcomes: dict[str, Outcome]) -> Task | None:
    done = {name for name, outcome in outcomes.items() if outcome.error is None}
    return next((task for task in waiting if {*task.needs} <= done), None)


def _missed(task: Task, outcomes: dict[str, Outcome]) -> str | None:
    """A task that this one needs and that has failed."""
    return next((name for name in task.needs if name in outcomes and outcomes[name].error is not None), None)


def _death(status: int | None) -> str:
    if status is not None and status < 0:
        return f"its worker was killed by {signal.Signals(-status).name}"
    return f"its worker ended with status {status}"


def _started(log: Path) -> _Worker:
    ours, theirs = _SPAWN.Pipe()
    end, lifeline = _SPAWN.Pipe(duplex=False)
    process = _SPAWN.Process(target=_work, args=(theirs, end, log), daemon=True)
    before = {name: os.environ.get(name) for name in _THREADS}
    os.environ |= dict.fromkeys(_THREADS, "1")
    try:
        process.start()
    finally:
        for name, value in before.items():
            os.environ.pop(name) if value is None else os.environ.update({name: value})
    theirs.close()
    end.close()
    return _Worker(process, ours, lifeline)


def _work(tasks: Any, end: Any, log: Path) -> None:
    """A worker's life."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the process that started it
    threading.Thread(target=_end_with, args=(end,), daemon=True).start()
    output = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    for descriptor in (1, 2):
        os.dup2(output, descriptor)
    while True:
        try:
            call, arguments = tasks.recv()
        except (EOFError, ConnectionError):
            return
        value, error = None, None
        try:
            value = call(*arguments)
        except Exception as raised:
            traceback.print_exc()
            error = str(raised).splitlines()[0] if str(raised) else type(raised).__name__
        except BaseException as raised:  # a KeyboardInterrupt or SystemExit of a library
            traceback.print_exc()
            error = f"{type(raised).__name__} {raised}"
        sys.stdout.flush()
        tasks.send((value, error))


def _end_with(end: Any) -> None:
    """End this process when the one that started it does."""
    try:
        end.recv()
    except (EOFError, OSError):
        os._exit(1)
