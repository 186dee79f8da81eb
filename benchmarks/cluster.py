"""`python -m benchmarks.cluster`: what many concepts take on many workers that fail now and then, by simulation."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from heapq import heappop, heappush
from math import inf
from pathlib import Path

import numpy as np

from experiments.runner import SECONDS
from perfusion.cli import aligned, parse_key_values, run_cli
from perfusion.config import ConfigError

USAGE = """
Simulate `python -m experiments.paper executor=ray` for many concepts: each is a training and then a drawing of 192
pictures, which begin in their order as workers are free. Workers fail, and come back after a while; a failure costs the
task that runs, which begins anew with the next free worker. Nothing is trained.

  python -m benchmarks.cluster                              10,000 concepts on 64 GPUs, with times that are assumed
  python -m benchmarks.cluster runs=runs/paper/<weights>    with times and files of trainings that are there
"""


@dataclass
class ClusterConfig:
    """The options of `python -m benchmarks.cluster`; the times, and files of Stable Diffusion, are assumed."""

    concepts: int = 10_000
    workers: int = 64
    failures: list[float] = field(default_factory=lambda: [0.0, 0.01, 0.1])  # of a worker in an hour
    repair: float = 10.0  # minutes until a worker is back
    load: float = 60.0  # seconds in which a new worker loads its models
    train: float = 300.0  # seconds of a training, the mean
    draw: float = 400.0  # seconds of a drawing, the mean
    spread: float = 0.2  # standard deviation of both, as a part of the mean
    train_files: float = 7  # that a training leaves
    train_mb: float = 4.0  # most of it samples.png
    draw_files: float = 216  # that a drawing leaves: 192 pictures, and a manifest and scores for each of 12 settings
    draw_mb: float = 90.0  # pictures of 512 x 512
    runs: str | None = None  # folder that experiments.paper left, from which times and files are taken; null: as above
    seed: int = 0


@dataclass(frozen=True)
class Found:
    """Seconds: until all is done, and of all workers together what became of them."""

    until: float
    useful: float  # in tasks that were done
    lost: float  # in tasks whose worker failed
    loading: float
    repair: float
    idle: float
    failures: int


def simulate(
    tasks: np.ndarray, workers: int, load: float, rate: float, repair: float, random: np.random.Generator
) -> Found:
    """Run tasks as `experiments.pool` does: a free worker takes the first whose turn it is.

    Args:
        tasks: seconds that they take, a row for each concept; each of a row needs the one before it.
        load: seconds that a worker needs before its first task, also after a failure.
        rate: failures of a worker per second. Those of an idle one cost nothing, and are left out.
        repair: seconds until it is back.
    """
    seconds, each = tasks.ravel(), tasks.shape[1]
    ready = list(range(0, seconds.size, each))  # a heap, as it is sorted
    idle = [False] * workers  # the free ones: whether they have their models
    events: list[tuple[float, int, float]] = []  # time, task (-1: a worker is back), seconds that it ran in vain
    now, left, lost, loading, failures = 0.0, seconds.size, 0.0, 0.0, 0
    while left:
        while ready and idle:
            task, begin = heappop(ready), 0.0 if idle.pop() else load
            takes, fails = begin + seconds[task], random.exponential(1 / rate) if rate else inf
            if fails < takes:
                heappush(events, (now + fails, task, fails))
            else:
                heappush(events, (now + takes, task, 0.0))
                loading += begin
        now, task, vain = heappop(events)
        if task < 0:
            idle.append(False)
        elif vain:
            lost, failures = lost + vain, failures + 1
            heappush(ready, task)
            heappush(events, (now + repair, -1, 0.0))
        else:
            left -= 1
            idle.append(True)
            if (task + 1) % each:
                heappush(ready, task + 1)
    useful, down = float(seconds.sum()), failures * repair - sum(time - now for time, *_ in events)
    return Found(now, useful, lost, loading, down, workers * now - useful - lost - loading - down, failures)


def main(argv: Sequence[str]) -> None:
    """Command line entry point. Raises ConfigError."""
    config = parse_key_values(argv, ClusterConfig, USAGE)
    if min(config.concepts, config.workers) < 1 or min(config.failures, default=-1) < 0:
        raise ConfigError("concepts, workers, failures: expected at least 1, 1 and one rate of at least 0")
    tasks = _drawn(config) if config.runs is None else _read(Path(config.runs).expanduser(), config)
    train, draw = tasks.mean(axis=0)
    files, megabytes = config.train_files + config.draw_files, config.train_mb + config.draw_mb
    columns = [
        simulate(
            tasks, config.workers, config.load, rate / 3600, 60 * config.repair, np.random.default_rng(config.seed)
        )
        for rate in config.failures
    ]
    rows = [["failures of a worker in an hour", *(f"{rate:.0%}" for rate in config.failures)]]
    rows.append(["hours until all is done", *(f"{one.until / 3600:.2f}" for one in columns)])
    rows.append(["failures that cost a task", *(f"{one.failures}" for one in columns)])
    for name in ("useful", "lost", "loading", "repair", "idle"):
        shares = (getattr(one, name) / config.workers / one.until for one in columns)
        rows.append([f"of the workers' time: {name}", *(f"{share:.2%}" for share in shares)])
    rows.append(["files written in a second", *(f"{config.concepts * files / one.until:.1f}" for one in columns)])
    rows.append(["MB written in a second", *(f"{config.concepts * megabytes / one.until:.1f}" for one in columns)])
    print(
        f"{config.concepts} concepts on {config.workers} workers: trainings of {train:.0f} s, drawings of {draw:.0f} s"
    )
    print(*aligned(rows, range(1, len(rows[0]))), sep="\n")
    print(f"the folder in the end: {config.concepts * files:,.0f} files, {config.concepts * megabytes / 1000:,.1f} GB")
    print(f"where all workers draw at once: {config.workers * config.draw_files / draw:.1f} files written in a second")


def _drawn(config: ClusterConfig) -> np.ndarray:
    """Seconds of a training and a drawing for each concept: gamma distributed, so that none is negative."""
    shape = 1 / config.spread**2
    random = np.random.default_rng(config.seed)
    return random.gamma(shape, np.array([config.train, config.draw]) / shape, (config.concepts, 2))


def _read(root: Path, config: ClusterConfig) -> np.ndarray:
    """The same, each a training that is there and all drawings with it; what they left goes into the config."""
    try:
        drawings: dict[str, float] = json.loads((root / SECONDS).read_text(encoding="utf-8"))
        trainings = {file.parent.name: json.loads(file.read_bytes()) for file in root.glob("trained/*/metrics.json")}
    except (OSError, ValueError) as error:
        raise ConfigError(f"runs: {error}; expected a folder that experiments.paper left") from None
    drawn: dict[str, float] = {}
    for place, seconds in drawings.items():
        name = place.split("/")[1]
        drawn[name] = drawn.get(name, 0.0) + seconds
    both = [(one["seconds"]["total"], drawn[name]) for name, one in trainings.items() if name in drawn]
    if not both:
        raise ConfigError(f"runs: found no training with pictures in {root}, expected some")
    config.train_files, config.train_mb = _left(root, ["trained"], len(trainings))
    config.draw_files, config.draw_mb = _left(root, ["pictures", "measured"], len(drawn))
    return np.array(both)[np.random.default_rng(config.seed).integers(len(both), size=config.concepts)]


def _left(root: Path, folders: Sequence[str], count: int) -> tuple[float, float]:
    """Files and megabytes, of each of so many."""
    sizes = [file.stat().st_size for folder in folders for file in (root / folder).rglob("*") if file.is_file()]
    return len(sizes) / count, sum(sizes) / 1e6 / count


if __name__ == "__main__":
    sys.exit(run_cli(main))
