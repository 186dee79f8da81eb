"""Results as rows of `latest.json` and as lines of a table."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Literal, TypedDict

import torch

from benchmarks.timing import Amounts, Clock, Comparison, Pair
from perfusion.config import ConfigError
from perfusion.files import atomic_write_text
from perfusion.provenance import provenance


class Median(TypedDict):
    """Seconds of one call; bytes where the clock says so."""

    subject: float
    baseline: float


class Machine(TypedDict):
    """Where a result was measured."""

    cpu: str  # model and number of logical cores
    threads: int  # of them, used by torch
    torch: str  # version
    device: str  # "cpu", or the accelerator and its name


class Result(TypedDict):
    """One row; `name` and `model` identify it."""

    name: str
    model: str
    ratio: float  # median over the rounds of subject / baseline
    median: Median
    spread: float  # interquartile range of the rounds' ratios
    rounds: int
    clock: Clock
    machine: Machine


def machine(device: torch.device) -> Machine:
    """This machine, as torch uses it now."""
    described = provenance()
    name = device.type if device.type == "cpu" else f"{device.type} ({described['gpu']})"
    return Machine(cpu=described["cpu"], threads=torch.get_num_threads(), torch=torch.__version__, device=name)


def result(pair: Pair | Amounts, found: Comparison, clock: Clock, where: Machine) -> Result:
    """The row of what was measured."""
    return Result(
        name=pair.name,
        model=pair.model,
        ratio=found.ratio,
        median=Median(subject=found.subject, baseline=found.baseline),
        spread=found.spread,
        rounds=found.rounds,
        clock=clock,
        machine=where,
    )


def write(path: Path, results: Sequence[Result]) -> list[Result]:
    """Put `results` into the file at `path`, atomically; rows of other benchmarks stay there. Gives all rows.

    Raises:
        ConfigError: the file holds something else than results.
    """
    rows = {(row["name"], row["model"]): row for row in [*_read(path), *results]}
    ordered = [rows[key] for key in sorted(rows)]
    path.parent.mkdir(parents=True, exist_ok=True)
    atomic_write_text(path, json.dumps(ordered, indent=2) + "\n")
    return ordered


def _read(path: Path) -> list[Result]:
    if not path.exists():
        return []
    try:
        rows: list[Result] = json.loads(path.read_text(encoding="utf-8"))
        assert isinstance(rows, list) and all(
            isinstance(row["name"], str) and isinstance(row["model"], str) for row in rows
        )
    except (ValueError, TypeError, KeyError, AssertionError) as error:
        raise ConfigError(f"out: {path} does not hold results of benchmarks; delete it or name another file") from error
    return rows


def amount(row: Result, side: Literal["subject", "baseline"]) -> str:
    """The median of a side, with its unit."""
    value = row["median"][side]
    if row["clock"] == "bytes":
        return f"{value / 1e6:.1f} MB"
    return f"{value:.2f} s" if value >= 1 else f"{1000 * value:.2f} ms"


HEADER = f"{'benchmark':<26} {'model':<9} {'ratio':>7} {'spread':>7} {'subject':>10} {'baseline':>10} {'rounds':>7}"


def line(row: Result) -> str:
    """`row` under `HEADER`."""
    subject, baseline = (amount(row, side) for side in ("subject", "baseline"))
    return (
        f"{row['name']:<26} {row['model']:<9} {row['ratio']:>7.3f} {row['spread']:>7.3f} {subject:>10} {baseline:>10} "
        f"{row['rounds']:>7}"
    )
