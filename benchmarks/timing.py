"""Two ways to do a thing, timed in turn (A, B, A, B, ...), so that a machine that slows down slows both of them."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any, Literal, NamedTuple

import torch

WINDOW = 0.05  # seconds that one measurement lasts at least: above that, timers and schedulers do not count
WARM_UPS = 2  # calls of each side before the first that counts: allocators, lazily made kernels, caches

Clock = Literal["process", "wall", "bytes"]  # bytes: counted, not timed
CLOCKS = {"process": time.process_time, "wall": time.perf_counter}


class Sides(NamedTuple):
    """What is compared: `subject` is the project's work, `baseline` what nothing could do without.

    A call does that work, to be timed; or it measures by itself, and gives bytes or seconds.
    """

    subject: Callable[[], Any]
    baseline: Callable[[], Any]


class Found(NamedTuple):
    """What was measured of either side, in seconds of one call or in bytes."""

    ratio: float  # median over the rounds of subject / baseline
    median: dict[str, float]  # of each side
    spread: float  # interquartile range of the rounds' ratios
    rounds: int

    @classmethod
    def of(cls, subject: Sequence[float], baseline: Sequence[float]) -> Found:
        """From each round's values."""
        ratios = [a / b for a, b in zip(subject, baseline, strict=True)]
        low, _, high = statistics.quantiles(ratios, n=4, method="inclusive") if len(ratios) > 1 else (0.0, 0.0, 0.0)
        medians = {"subject": statistics.median(subject), "baseline": statistics.median(baseline)}
        return cls(statistics.median(ratios), medians, high - low, len(ratios))


def clock_for(device: torch.device, threads: int) -> Clock:
    """`process` on a CPU with one thread: the CPU time of this process, which other processes do not lengthen but
    through the caches that they share. Else `wall`: waiting for an accelerator or for a thread takes no CPU time."""
    return "process" if device.type == "cpu" and threads == 1 else "wall"


def compare(
    sides: Sides,
    rounds: int,
    device: torch.device,
    clock: Callable[[], float],
    least: float = 0.0,
    most: int | None = None,
) -> Found:
    """Time both sides by `clock`, one after the other, `rounds` times, and on until `least` seconds; or only `most`
    times, if that is given.

    Each measurement repeats its side until it lasts about `WINDOW`, and ends when `device` has done all of it.
    """
    calls = []
    for side in sides:
        seconds_each(side, WARM_UPS, device, clock)
        calls.append(max(1, round(WINDOW / max(seconds_each(side, 1, device, clock), 1e-9))))
    times: list[list[float]] = []
    begin = clock()
    while len(times) < rounds or clock() - begin < least:
        if len(times) == most:
            break
        times.append([seconds_each(side, count, device, clock) for side, count in zip(sides, calls, strict=True)])
    return Found.of(*zip(*times, strict=True))


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
