"""Two ways to do a thing, timed in turn (A, B, A, B, ...), so that a machine that slows down slows both of them."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch

WINDOW = 0.05  # seconds that one measurement lasts at least: above that, timers and schedulers do not count
WARM_UPS = 2  # calls of each side before the first that counts: allocators, lazily made kernels, caches


Clock = Literal["process", "wall", "bytes"]  # bytes: counted, not timed
CLOCKS = {"process": time.process_time, "wall": time.perf_counter}


@dataclass(frozen=True)
class Pair:
    """What is compared: `subject` is the project's work, `baseline` what nothing could do without."""

    name: str  # of the benchmark
    model: str  # whose sizes it has
    subject: Callable[[], object]
    baseline: Callable[[], object]
    rounds: int | None = None  # at most so many, of what takes seconds


@dataclass(frozen=True)
class Amounts:
    """What is found once instead of in rounds: bytes of either side, or seconds."""

    name: str
    model: str
    subject: float
    baseline: float
    clock: Clock = "bytes"

    def comparison(self) -> Comparison:
        """As a result of one round."""
        return Comparison(self.subject / self.baseline, 0.0, self.subject, self.baseline, 1)


@dataclass(frozen=True)
class Comparison:
    """`ratio` is the median of the rounds' ratios subject / baseline, `spread` their interquartile range."""

    ratio: float
    spread: float
    subject: float  # median seconds of one call, or bytes
    baseline: float
    rounds: int


def clock_for(device: torch.device, threads: int) -> Clock:
    """`process` on a CPU with one thread: the CPU time of this process, which other processes do not lengthen but
    through the caches that they share. Else `wall`: waiting for an accelerator or for a thread takes no CPU time."""
    return "process" if device.type == "cpu" and threads == 1 else "wall"


def compare(
    pair: Pair, rounds: int, device: torch.device, clock: Callable[[], float], least: float = 0.0
) -> Comparison:
    """Time both sides of `pair` by `clock`, one after the other, `rounds` >= 2 times, and on until `least` seconds.

    Each measurement repeats its side until it lasts about `WINDOW`, and ends when `device` has done all of it.
    """
    assert rounds >= 2, "a spread needs two rounds"
    calls = []
    for side in (pair.subject, pair.baseline):
        seconds_each(side, WARM_UPS, device, clock)
        calls.append(max(1, round(WINDOW / max(seconds_each(side, 1, device, clock), 1e-9))))
    subject: list[float] = []
    baseline: list[float] = []
    rounds = rounds if pair.rounds is None else min(rounds, pair.rounds)
    begin = clock()
    while len(subject) < rounds or (pair.rounds is None and clock() - begin < least):
        subject.append(seconds_each(pair.subject, calls[0], device, clock))
        baseline.append(seconds_each(pair.baseline, calls[1], device, clock))
    ratios = [a / b for a, b in zip(subject, baseline, strict=True)]
    low, _, high = statistics.quantiles(ratios, n=4, method="inclusive")
    return Comparison(
        ratio=statistics.median(ratios),
        spread=high - low,
        subject=statistics.median(subject),
        baseline=statistics.median(baseline),
        rounds=len(ratios),
    )


def seconds_each(side: Callable[[], object], calls: int, device: torch.device, clock: Callable[[], float]) -> float:
    """Mean seconds of `calls` calls, until `device` has done all of them."""
    finish(device)
    start = clock()
    for _ in range(calls):
        side()
    finish(device)
    return (clock() - start) / calls


def finish(device: torch.device) -> None:
    """Return once `device` has done what it was given; a CPU always has."""
    if device.type != "cpu":
        torch.accelerator.synchronize(device)
