"""Results as rows of `latest.json` and as lines of a table."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, TypedDict

import torch

from benchmarks.timing import Clock, Found
from perfusion.config import ConfigError
from perfusion.files import atomic_write_text
from perfusion.provenance import provenance


class Result(TypedDict):
    """One row; `name` and `model` identify it."""

    name: str
    model: str
    ratio: float  # these as in `Found`
    median: dict[str, float]
    spread: float
    rounds: int
    clock: Clock
    machine: dict[str, Any]


def machine(device: torch.device) -> dict[str, Any]:
    """This machine, as torch uses it now: its `cpu`, the `threads` of it, the version of `torch`, the `device`."""
    described = provenance()
    name = device.type if device.type == "cpu" else f"{device.type} ({described['gpu']})"
    return {"cpu": described["cpu"], "threads": torch.get_num_threads(), "torch": torch.__version__, "device": name}


def result(name: str, model: str, found: Found, clock: Clock, where: dict[str, Any]) -> Result:
    """The row of what was measured."""
    row: Any = {"name": name, "model": model, **found._asdict(), "clock": clock, "machine": where}
    return row


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
        assert isinstance(rows, list) and all(isinstance(row["name"] + row["model"], str) for row in rows)
    except (ValueError, TypeError, KeyError, AssertionError) as error:
        raise ConfigError(f"out: {path} does not hold results of benchmarks; delete it or name another file") from error
    return rows


def cells(row: Result) -> list[str]:
    """What tables show of a row: ratio, spread, and the medians of subject and baseline with their unit."""

    def amount(value: float) -> str:
        if row["clock"] == "bytes":
            return f"{value / 1e6:.1f} MB"
        return f"{value:.2f} s" if value >= 1 else f"{1000 * value:.2f} ms"

    return [f"{row['ratio']:.3f}", f"{row['spread']:.3f}", *(amount(row["median"][s]) for s in ("subject", "baseline"))]


_LINE = "{:<26} {:<9} {:>7} {:>7} {:>10} {:>10} {:>7}"
HEADER = _LINE.format("benchmark", "model", "ratio", "spread", "subject", "baseline", "rounds")


def line(row: Result) -> str:
    """`row` under `HEADER`."""
    return _LINE.format(row["name"], row["model"], *cells(row), row["rounds"])
