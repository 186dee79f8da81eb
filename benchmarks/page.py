"""docs/performance.md, written from the results."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from benchmarks.catalogue import BENCHMARKS
from benchmarks.report import Result, cells
from benchmarks.training import BATCH
from perfusion.backbones.layouts import meta_pipeline
from perfusion.files import atomic_write_text

PAGE, MEMORY = (Path(__file__).with_name(name) for name in ("page.md", "memory.md"))  # with blanks
# The rows that have what one picture keeps, and what is set there.
FITTING = {"train_memory": "the default", "train_memory_checkpointing": "`backbone.gradient_checkpointing=true`"}


def write(path: Path, rows: Sequence[Result]) -> None:
    """Write the page, atomically."""
    names = dict.fromkeys(row["name"] for row in rows if row["name"] in BENCHMARKS)
    text = PAGE.read_text(encoding="utf-8").format(
        lines="\n".join(_line(row) for row in rows),
        told="\n".join(f"- `{name}`: {BENCHMARKS[name].text}." for name in names),
        where="\n".join(dict.fromkeys(f"- {_place(row)}" for row in rows)),
    )
    path.parent.mkdir(parents=True, exist_ok=True)
    atomic_write_text(path, text + _memory(rows))


def _line(row: Result) -> str:
    ratio, spread, subject, baseline = cells(row)
    parts = (f"`{row['name']}`", row["model"], ratio, spread, _goal(row), subject, baseline, row["rounds"])
    return f"| {' | '.join(map(str, parts))} |"


def _goal(row: Result) -> str:
    about = BENCHMARKS.get(row["name"])
    if about and about.ratio is not None:
        return f"{about.ratio:.2f}, {'not ' * (row['ratio'] > about.ratio)}reached"
    if about and about.seconds is not None:
        return f"{about.seconds:g} s, {'not ' * (row['median']['subject'] > about.seconds)}reached"
    return ""


def _memory(rows: Sequence[Result]) -> str:
    """The part on the memory of a training; nothing where no row says what a picture keeps."""
    kept = {row["name"]: row["median"]["subject"] for row in rows if row["model"] == "sd15" and row["name"] in FITTING}
    if not kept:
        return ""
    weights = _weights()
    lines = []
    for name, one in kept.items():
        sizes = (one, BATCH * one, weights, BATCH * one + weights)
        lines.append(f"| {FITTING[name]} | {' | '.join(f'{size / 1e9:.1f} GB' for size in sizes)} |")
    measured = "The peak on a GPU has not been measured yet."
    if any(row["name"].startswith("train_peak") for row in rows):
        measured = "The peak that was measured on a GPU is in the rows `train_peak`."
    return MEMORY.read_text(encoding="utf-8").format(batch=BATCH, lines="\n".join(lines), measured=measured)


def _weights() -> int:
    """Bytes of Stable Diffusion 1.5 in float32."""
    pipe: Any = meta_pipeline("sd15")
    parts = [part for part in pipe.components.values() if isinstance(part, torch.nn.Module)]
    return sum(weight.nbytes for part in parts for weight in part.parameters())


def _place(row: Result) -> str:
    machine = row["machine"]
    return (
        f"{machine['cpu']}, {machine['threads']} thread{'s' * (machine['threads'] > 1)}, {machine['device']}, torch "
        f"{machine['torch']}, {'counted' if row['clock'] == 'bytes' else row['clock'] + ' time'}"
    )
