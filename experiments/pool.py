"""Tasks in workers, one thread each: what a worker has loaded, it keeps for its next task.

A task that raises costs itself and those that need it; the others go on. One whose worker is killed is tried again, for
the worker need not have been killed because of it. `experiments.executors` says where workers are.
"""

from __future__ import annotations

import sys
import threading
import time
import traceback
from collections import Counter
from collections.abc import Callable, Sequence
from concurrent.futures import FIRST_COMPLETED, BrokenExecutor, Future, wait
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from textwrap import shorten
from typing import Any

from experiments.executors import Executor, Make, local
from perfusion.bars import Bar
from perfusion.files import first_line

_TRIES = 3  # of a task whose workers are killed
_SAID = 200  # characters at most that an executor says of it
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
    executor: Executor = local
    _held: ExitStack = field(default_factory=ExitStack)
    _make: Make | None = None

    def __enter__(self) -> Pool:
        self.logs.mkdir(parents=True, exist_ok=True)
        self._make = self._held.enter_context(self.executor(self.size, self.logs))
        return self

    def __exit__(self, *error: Any) -> None:
        self._held.__exit__(*error)

    def run(self, tasks: Sequence[Task], done: Callable[[Outcome], None] = lambda outcome: None) -> list[str]:
        """What failed, a line for each task. Tasks begin in their order as far as what they need is there; `done` is
        called with each outcome, in this process, as soon as it is known."""
        errors: dict[str, str | None] = {}  # of tasks that are over
        waiting, busy, kills = list(tasks), dict[Future[Any], Task](), Counter[str]()
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
                    elif len(busy) < self.size and errors.keys() >= {*task.needs}:
                        waiting.remove(task)
                        busy[self._begun(task)] = task
                for future in wait(busy, return_when=FIRST_COMPLETED).done:
                    task, error = busy.pop(future), future.exception()
                    if isinstance(error, BrokenExecutor):
                        kills[task.name] += 1
                        if kills[task.name] < _TRIES:
                            bar.write(f"its worker was killed, so it is tried again: {task.name}")
                            waiting.insert(0, task)
                            continue
                        said = shorten(str(error).strip().splitlines()[-1], _SAID)  # what a traceback ends with
                        error = f"its worker was killed {_TRIES} times: {said}"
                    settle(Outcome(task, *future.result()) if error is None else Outcome(task, error=str(error)))
        return [f"{name}: {error}" for name, error in errors.items() if error is not None]

    def _begun(self, task: Task) -> Future[Any]:
        """A task that a thread makes and waits for. Nothing waits for the thread, where all is left by an error."""
        future, make = Future[Any](), self._make
        assert make is not None

        def run() -> None:
            try:
                future.set_result(make(_call, task.call, task.arguments))
            except BaseException as error:
                future.set_exception(error)

        threading.Thread(target=run, daemon=True).start()
        return future


def _bar(tasks: Sequence[Task]) -> Any:
    """Progress in guessed seconds of one core, from which tqdm tells the time that is left."""
    shape = f"{{percentage:3.0f}}% of {len(tasks)} tasks after {{elapsed}}, about {{remaining}} left{{postfix}}"
    pace = 0.1 if sys.stderr.isatty() else _EVERY
    return Bar(
        total=sum(task.guess for task in tasks), bar_format=shape, mininterval=pace, maxinterval=pace, smoothing=0
    )


def _call(call: Callable[..., Any], arguments: tuple[Any, ...]) -> tuple[Any, str | None, float]:
    """A task's value or error, and the seconds that it took. Errors travel as text: not every exception can be sent."""
    begun, value, error = time.monotonic(), None, None
    try:
        value = call(*arguments)
    except BaseException as raised:  # a library's SystemExit included
        traceback.print_exc()
        error = first_line(raised)
    sys.stdout.flush()
    return value, error, time.monotonic() - begun
