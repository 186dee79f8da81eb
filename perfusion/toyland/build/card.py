"""The model card of Toyland's weights, written from `report.json`, so that no result in it is copied by hand."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from perfusion.toyland.captions import vocabulary

FILE_NAME = "README.md"


def _text(part: str) -> str:
    """A part of the card, with blanks."""
    return (Path(__file__).with_name("pages") / f"{part}.md").read_text(encoding="utf-8")


def number(value: float | None) -> str:
    """As tables show it; nothing for None."""
    return "" if value is None else f"{value:g}"


def card(report: Mapping[str, Any]) -> str:
    """Markdown from a report: `training`, `settings`, `built_with`, `bars`, `measured_with`, `details`, and a `note` on
    how the weights came about, written by hand; parts may be missing."""
    note = f"\n\n{report['note']}" if "note" in report else ""
    text = _text("head").format(version=report["world_version"], note=note)
    if training := report.get("training"):
        rows = [
            (stage, f"{was['step']:,}", f"{was['elapsed'] / 60:.1f}", f"{was['loss']:.4f}")
            for stage, was in training.items()
        ]
        text += "\n## Training\n" + _table("| stage | steps | minutes | loss at the end |", rows)
        built = report.get("built_with", {})
        where = built.get("gpu") or built.get("cpu", "an unknown machine")
        settings = ", ".join(f"{key} {value}" for key, value in report.get("settings", {}).items())
        text += f"\nOn {where}{'; ' if settings else ''}{settings}.\n"
    if bars := report.get("bars"):
        marks = {True: "reached", False: "**not reached**", None: ""}
        rows = [(row["name"], number(row["value"]), number(row["bar"]), marks[row["reached"]]) for row in bars]
        text += "\n## Measured\n" + _table("| what | value | bar | |", rows)
        cpu = report.get("measured_with", {}).get("cpu")
        text += _text("legend").format(where=f" on {cpu}" if cpu else "")
    if curve := report.get("details", {}).get("fine_tuning"):
        rows = [(f"{at['steps']:.0f}", f"{at['identity']:.3f}", f"{at['prompts']:.3f}") for at in curve]
        text += "\nNaive full fine-tuning of the UNet on one picture, judged by the reader:\n"
        text += _table("| steps | identity | prompts followed |", rows)
    return text + _text("limits").format(words=len(vocabulary()))


def _table(head: str, rows: Sequence[Sequence[str]]) -> str:
    lines = [head, "---".join("|" * (len(rows[0]) + 1)), *(f"| {' | '.join(row)} |" for row in rows)]
    return "\n" + "\n".join(lines) + "\n"
