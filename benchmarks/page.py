"""docs/performance.md, written from the results."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from benchmarks.report import Result, amount
from perfusion.files import atomic_write_text

HEAD = """# Performance

What the project costs beside doing without it: two things measured in turn in one run, since times of different runs or
machines say little. `ratio` is the median over the rounds of subject / baseline, `spread` the interquartile range of
the rounds' ratios, `goal` what the ratio should be at most. `make bench` measures anew and writes this page and
`benchmarks/latest.json`; `benchmarks/` says what each side does.

| benchmark | model | ratio | spread | goal | subject | baseline | rounds |
|---|---|---:|---:|---|---:|---:|---:|
"""

# Benchmark -> what it compares with what, and what its ratio should be at most.
ABOUT: dict[str, tuple[str, float | None]] = {
    "projection": ("K and V of all layers for a batch of prompts in training: edited against plain", None),
    "projection_sampling": ("the same over the steps of one sampling, where they are computed once", None),
    "train_step": ("a whole training step against frozen forward and gradients of activations alone", 1.05),
    "sampling_1": ("a whole call of the pipeline: one concept against none", 1.00),
    "sampling_8": ("the same with eight concepts attached, two of them in the prompt", 1.00),
    "sampling_16_betas": ("the same with 16 pictures in a batch, each with a strength of its own", 1.00),
    "attach_first": (
        "attaching a concept to a model that was just loaded, and detaching it, against encoding its superclass alone; "
        "goal: 0.2 s",
        None,
    ),
    "attach": ("the same where a concept of this superclass has been before; goal: 0.2 s", None),
    "train_memory": ("what a training step keeps for the backward pass against what it has to keep", 1.05),
    "train_memory_checkpointing": ("the same with gradient checkpointing", 1.05),
    "train_peak": (
        "the most memory that is allocated in training steps on 16 pictures of 512 x 512 (`_bf16`: under autocast)",
        1.05,
    ),
    "train_peak_checkpointing": ("the same with gradient checkpointing", 1.05),
    "train_400": ("400 such steps under autocast to bfloat16; goal: 60 s", None),
    "train_400_checkpointing": ("the same with gradient checkpointing; goal: 60 s", None),
}


def write(path: Path, rows: Sequence[Result]) -> None:
    """Write the page, atomically."""
    lines = [_line(row) for row in rows]
    told = [f"- `{name}`: {ABOUT[name][0]}." for name in dict.fromkeys(row["name"] for row in rows) if name in ABOUT]
    where = [f"- {place}" for place in dict.fromkeys(_place(row) for row in rows)]
    path.parent.mkdir(parents=True, exist_ok=True)
    atomic_write_text(path, HEAD + "\n".join([*lines, "", *told, "", "Measured on:", "", *where, ""]))


def _line(row: Result) -> str:
    _, goal = ABOUT.get(row["name"], ("", None))
    said = "" if goal is None else f"{goal:.2f}" + (", not reached" if row["ratio"] > goal else ", reached")
    subject, baseline = amount(row, "subject"), amount(row, "baseline")
    return (
        f"| `{row['name']}` | {row['model']} | {row['ratio']:.3f} | {row['spread']:.3f} | {said} | {subject} | "
        f"{baseline} | {row['rounds']} |"
    )


def _place(row: Result) -> str:
    machine = row["machine"]
    return (
        f"{machine['cpu']}, {machine['threads']} thread{'s' * (machine['threads'] > 1)}, {machine['device']}, torch "
        f"{machine['torch']}, {'counted' if row['clock'] == 'bytes' else row['clock'] + ' time'}"
    )
