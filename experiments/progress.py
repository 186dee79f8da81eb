"""How far a pool of workers has come, and how long it will take: a line now and then."""

from __future__ import annotations

import sys
import time
from collections.abc import Sequence

from experiments.pool import Outcome, Task

# Seconds for one unit of a task's size on one core, before anything was measured: a training picture, a drawn picture.
_GUESSED = {"train": 0.03, "draw": 0.45}
_EVERY = 20.0  # seconds between two lines, where nobody watches a terminal


class Progress:
    """Counts the tasks of a pool.

    Attributes:
        failures: what went wrong, a line for each task.
    """

    def __init__(self, tasks: Sequence[Task], workers: int) -> None:
        self._left = {task.name: task for task in tasks}
        self._total, self._workers = len(tasks), workers
        self._spent: dict[str, list[float]] = {}  # kind -> seconds, size
        self._begun = self._said = time.monotonic()
        self.failures: list[str] = []

    def done(self, outcome: Outcome) -> None:
        """Count an outcome and say so, if it is time."""
        del self._left[outcome.task.name]
        if outcome.error is not None:
            self.failures.append(f"{outcome.task.name}: {outcome.error}")
            self.say(f"failed: {self.failures[-1]}")
        elif outcome.task.size > 1:
            spent = self._spent.setdefault(outcome.task.kind, [0.0, 0.0])
            spent[0] += outcome.seconds
            spent[1] += outcome.task.size
        now = time.monotonic()
        if sys.stdout.isatty() or now - self._said > _EVERY or not self._left:
            self._said = now
            line = (
                f"{self._total - len(self._left)} of {self._total} tasks after {clock(now - self._begun)}, "
                f"about {clock(self.seconds_left())} left; {outcome.task.name}"
            )
            if sys.stdout.isatty() and self._left:
                print(f"\r\x1b[K{line[:110]}", end="", flush=True)
            else:
                self.say(line)

    def say(self, line: str) -> None:
        """A line of its own."""
        print(("\r\x1b[K" if sys.stdout.isatty() else "") + line, flush=True)

    def seconds_left(self) -> float:
        """From what tasks of a kind have taken so far."""
        return sum(self._rate(task.kind) * task.size for task in self._left.values()) / self._workers

    def _rate(self, kind: str) -> float:
        seconds, size = self._spent.get(kind, (0.0, 0.0))
        return seconds / size if size else _GUESSED.get(kind, 1.0)


def clock(seconds: float) -> str:
    """Minutes and seconds."""
    return f"{int(seconds) // 60}:{int(seconds) % 60:02d}"
