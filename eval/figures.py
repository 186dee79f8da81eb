"""Fronts as figures, by matplotlib: the same colours and marks as on the report's page."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib as mpl
import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.text import Annotation

from eval.aggregate import Interval
from eval.front import Front
from eval.looks import looks
from eval.score_kinds import ScoreKind
from perfusion.files import atomic_path

_INK, _GRID = "#222222", "#E4E4E4"
_STYLE: dict[Any, Any] = {
    "font.family": "sans-serif",
    "font.size": 10,
    "axes.edgecolor": _INK,
    "axes.labelcolor": _INK,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.linewidth": 0.8,
    "xtick.color": _INK,
    "ytick.color": _INK,
    "svg.fonttype": "none",  # text stays text
    "svg.hashsalt": "perfusion",  # the same figure, the same file
}
_LABELLED = 16  # points of a method, at most, that carry their setting


def draw_fronts(found: Sequence[Front], x: ScoreKind, y: ScoreKind, title: str = "") -> Figure:
    """Two scores against each other: points with their intervals, and a line through those on each method's front."""
    with mpl.rc_context(_STYLE):
        figure = Figure(figsize=(6.4, 4.8), layout="constrained")
        FigureCanvasAgg(figure)
        axes = figure.add_subplot()
        axes.grid(color=_GRID, linewidth=0.6)
        axes.set_axisbelow(True)
        look = looks(front.method for front in found)
        labels: list[tuple[bool, Annotation]] = []  # whether the point is on its front
        for front in found:
            colour, mark = look[front.method].colour, look[front.method].mark
            points = front.points
            xs, ys = [p.x.mean for p in points], [p.y.mean for p in points]
            on = sorted((p.x.mean, p.y.mean) for p in points if p.on_front)
            axes.plot(*zip(*on, strict=True), color=colour, linewidth=1.6, alpha=0.8, zorder=2)
            right, up = (np.array([_sides(getattr(p, side)) for p in points]).T for side in "xy")
            axes.errorbar(xs, ys, up, right, fmt="none", ecolor=colour, elinewidth=0.8, alpha=0.35, zorder=1)
            faces = [colour if p.on_front else "white" for p in points]
            name = plain(look[front.method].title)
            axes.scatter(xs, ys, s=34, c=faces, edgecolors=colour, marker=mark, linewidths=1.2, zorder=3, label=name)
            for p in points if len(points) <= _LABELLED else ():
                place = {"textcoords": "offset points", "fontsize": 7, "color": _INK}
                labels.append((p.on_front, axes.annotate(plain(p.label), (p.x.mean, p.y.mean), (4, 4), **place)))
        axes.set_xlabel(_axis(x))
        axes.set_ylabel(_axis(y))
        axes.set_title(plain(title), loc="left", fontsize=11)
        handles, names = axes.get_legend_handles_labels()
        legend = axes.legend(handles, names, frameon=False, fontsize=9)
        for handle, front in zip(legend.legend_handles, found, strict=True):
            handle.set_facecolor(look[front.method].colour)  # type: ignore[union-attr]
        _hide_overlapping(figure, [label for _, label in sorted(labels, key=lambda pair: not pair[0])])
    return figure


def _hide_overlapping(figure: Figure, labels: Sequence[Annotation]) -> None:
    """Hide labels that would lie on others, which come before them."""
    figure.draw_without_rendering()  # which lays it out
    shown: list[Any] = []
    for label in labels:
        box = label.get_window_extent()
        if any(box.overlaps(other) for other in shown):
            label.set_visible(False)
        else:
            shown.append(box)


def plain(text: str) -> str:
    """Text that means itself in matplotlib: "$" would begin a formula, a label that begins with "_" would be left out
    of the legend, and other letters than printable ones have no place in an SVG file."""
    text = "".join(letter if letter.isprintable() else "\N{REPLACEMENT CHARACTER}" for letter in text)
    text = text.replace("$", r"\$")
    return f" {text}" if text.startswith("_") else text


def save_figure(figure: Figure, stem: Path) -> None:
    """Write `<stem>.png` and `<stem>.svg`, each atomically; equal figures give equal files."""
    with mpl.rc_context(_STYLE):
        with atomic_path(stem.with_suffix(".png")) as file:
            figure.savefig(file, dpi=200, metadata={"Software": None})
        with atomic_path(stem.with_suffix(".svg")) as file:
            figure.savefig(file, metadata={"Date": None, "Creator": None})


def _sides(value: Interval) -> tuple[float, float]:
    """Lengths of an error bar to both sides; none is negative, though a percentile interval may lie beside its mean."""
    if value.low is None or value.high is None:
        return 0.0, 0.0
    return max(0.0, value.mean - value.low), max(0.0, value.high - value.mean)


def _axis(kind: ScoreKind) -> str:
    return f"{kind.title}  {'→' if kind.higher else '(lower is better)'}"
