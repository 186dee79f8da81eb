"""Tasks in worker processes, one thread each: what a worker has loaded, it keeps for its next task.

A task that raises, or whose worker is killed, costs that task and those that need it; the others go on. One executor of
`size` processes, the standard library's or joblib's, is broken as a whole by one kill, so each worker is an executor of
its own. Workers end with the process that started them, however that ends.
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
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from perfusion.bars import Bar

_THREADS = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS")
_EVERY = 20.0  # seconds between two lines of progress where nobody watches a terminal


@dataclass(frozen=True)
class Task:
    """A call of a function at the top level of a module, made in a worker."""

    name: str  # for people, and unique
    call: Callable[..., Any]
    arguments: tuple[Any, ...]
    kind: str  # tasks of one kind take time in proportion to their size
    size: float = 1.0
    needs: tuple[str, ...] = ()  # names of tasks that have to succeed before it
    about: Any = None  # whatever the one who made it wants to find again in its outcome
    pace: float = 1.0  # seconds of a core for one unit of its size

    @property
    def guess(self) -> float:
        """Seconds that it takes, about."""
        return self.size * self.pace


@dataclass(frozen=True)
class Outcome:
    """How a task ended: with a value, or with an error in one line."""

    task: Task
    value: Any = None
    error: str | None = None
    seconds: float = 0.0


@dataclass
class Pool:
    """So many workers, which print into a folder: `with Pool(2, logs) as pool: failed = pool.run(tasks)`."""

    size: int
    logs: Path
    _idle: dict[int, ProcessPoolExecutor] = field(default_factory=dict)  # by their number

    def __enter__(self) -> Pool:
        self.logs.mkdir(parents=True, exist_ok=True)
        self._idle = {number: self._worker(number) for number in range(self.size)}
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        for worker in self._idle.values():
            worker.shutdown()
        if kind is not None:
            for process in multiprocessing.active_children():  # nobody waits for their tasks any more
                process.terminate()

    def run(self, tasks: Sequence[Task], done: Callable[[Outcome], None] = lambda outcome: None) -> list[str]:
        """What failed, a line for each task. Tasks begin in their order as far as what they need is there; `done` is
        called with each outcome, in this process, as soon as it is known."""
        errors: dict[str, str | None] = {}  # of tasks that are over
        waiting, busy = list(tasks), dict[Future[Any], tuple[Task, int, ProcessPoolExecutor]]()
        bar = _bar(tasks)

        def settle(outcome: Outcome) -> None:
            errors[outcome.task.name] = outcome.error
            bar.set_postfix_str(outcome.task.name, refresh=False)
            bar.update(outcome.task.guess)
            if outcome.error is not None:
                bar.write(f"failed: {outcome.task.name}: {outcome.error}")
            done(outcome)

        with bar:
            while waiting or busy:
                for task in [*waiting]:
                    if lost := [name for name in task.needs if errors.get(name) is not None]:
                        waiting.remove(task)
                        settle(Outcome(task, error=f"not tried, for {lost[0]} failed"))
                    elif self._idle and errors.keys() >= {*task.needs}:
                        waiting.remove(task)
                        number, worker = self._idle.popitem()
                        try:
                            future = worker.submit(_call, task.call, task.arguments)
                        except BrokenProcessPool:  # killed while it had nothing to do
                            worker = self._worker(number)
                            future = worker.submit(_call, task.call, task.arguments)
                        busy[future] = task, number, worker
                for future in wait(busy, return_when=FIRST_COMPLETED).done:
                    task, number, worker = busy.pop(future)
                    error = future.exception()
                    killed = isinstance(error, BrokenProcessPool)
                    self._idle[number] = self._worker(number) if killed else worker
                    if error is None:
                        settle(Outcome(task, *future.result()))
                    else:
                        settle(Outcome(task, error="its worker was killed" if killed else str(error)))
        return [f"{name}: {error}" for name, error in errors.items() if error is not None]

    def _worker(self, number: int) -> ProcessPoolExecutor:
        """A process, which begins with its first task."""
        spawn = multiprocessing.get_context("spawn")
        return ProcessPoolExecutor(1, spawn, initializer=_begin, initargs=(self.logs / f"worker-{number}.log",))


def _bar(tasks: Sequence[Task]) -> Any:
    """Progress in guessed seconds of one core, from which tqdm tells the time that is left."""
    shape = f"{{percentage:3.0f}}% of {len(tasks)} tasks after {{elapsed}}, about {{remaining}} left{{postfix}}"
    pace = 0.1 if sys.stderr.isatty() else _EVERY
    return Bar(
        total=sum(task.guess for task in tasks), bar_format=shape, mininterval=pace, maxinterval=pace, smoothing=0
    )


def _begin(log: Path) -> None:
    """What a worker does first. Ctrl-C is for the process that started it, with which it ends."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    threading.Thread(target=_end_with_parent, daemon=True).start()
    os.environ |= dict.fromkeys(_THREADS, "1")
    output = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    for descriptor in (1, 2):
        os.dup2(output, descriptor)


def _end_with_parent() -> None:
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)


def _call(call: Callable[..., Any], arguments: tuple[Any, ...]) -> tuple[Any, str | None, float]:
    """A task's value or error, and the seconds that it took. Errors travel as text: not every exception can be sent."""
    begun, value, error = time.monotonic(), None, None
    try:
        value = call(*arguments)
    except BaseException as raised:  # a library's SystemExit included
        traceback.print_exc()
        error = str(raised).splitlines()[0] if str(raised) else type(raised).__name__
    sys.stdout.flush()
    return value, error, time.monotonic() - begun
