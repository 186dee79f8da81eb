"""`python -m eval.pareto`: fronts of methods, and the volume below them. `--help` says how it is used."""

from __future__ import annotations

import csv
import io
import json
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from omegaconf import MISSING

from eval.aggregate import RESAMPLES, Bootstrap, summarize
from eval.front import Front, asked_fronts
from eval.record import Point, ScoreError, read_all
from eval.score_kinds import ScoreKind, score_kind
from perfusion.cli import parse_key_values, run_cli
from perfusion.files import atomic_write_text

USAGE = """
Usage: python -m eval.pareto scores=<scores.json> [key=value ...]

Draws two scores of every method against each other, with 95 % intervals over concepts and seeds, and measures what
each method's settings dominate together: its hypervolume above a reference point. Writes front.png, front.svg,
front.csv (a line for every point) and front.json into `out`. Several records: scores=[a.json,b.json]
"""


@dataclass
class ParetoConfig:
    """The options of `python -m eval.pareto`."""

    scores: Any = MISSING  # record of `python -m eval.score`, or a list of records
    out: str = "pareto"  # folder; it is made
    x: str = "clip_t"  # score that goes to the right
    y: str = "clip_i"  # score that goes up
    reference: list[float] = field(default_factory=lambda: [0.0, 0.0])  # x and y that the hypervolume starts from
    concept: str | None = None  # one concept's front; null: means over concepts
    resamples: int = RESAMPLES  # of the bootstrap over concepts and seeds
    seed: int = 0  # of the bootstrap
    title: str | None = None  # of the figure


def chosen(points: Sequence[Point], concept: str | None) -> list[Point]:
    """The points of one concept, or all. ScoreError: no such concept."""
    if concept is None:
        return list(points)
    found = [point for point in points if point.concept == concept]
    if not found:
        known = ", ".join(sorted({point.concept for point in points}))
        raise ScoreError(f"concept: found {concept!r}, expected one of {known}")
    return found


def main(argv: Sequence[str]) -> None:
    """Command line entry point."""
    config = parse_key_values(argv, ParetoConfig, USAGE)
    x, y = score_kind(config.x, "x"), score_kind(config.y, "y")
    bootstrap = Bootstrap(config.resamples, config.seed)
    document, points = read_all(config.scores)
    summaries = summarize(chosen(points, config.concept), bootstrap)
    found = asked_fronts(summaries, x, y, config.reference, bootstrap.level)
    from eval.figures import draw_fronts, save_figure

    out = Path(config.out).expanduser()
    out.mkdir(parents=True, exist_ok=True)
    what = config.title or ("means over concepts" if config.concept is None else config.concept)
    save_figure(draw_fronts(found, x, y, what), out / "front")
    atomic_write_text(out / "front.csv", as_csv(found, x, y))
    said = {
        "x": x.name,
        "y": y.name,
        "reference": config.reference,
        "concept": config.concept,
        "bootstrap": asdict(bootstrap),
        "scorer": document.get("scorer"),
        "fronts": [asdict(front) for front in found],
    }
    atomic_write_text(out / "front.json", json.dumps(said, indent=2, ensure_ascii=False) + "\n")
    width = max(len(front.method) for front in found)
    print(f"{'':<{width}}  settings  on its front  hypervolume above ({', '.join(f'{v:g}' for v in config.reference)})")
    for front in found:
        on = sum(point.on_front for point in front.points)
        volume = front.hypervolume
        spread = "" if volume.low is None else f"  [{volume.low:.4f}, {volume.high:.4f}]"
        print(f"{front.method:<{width}}  {len(front.points):>8}  {on:>12}  {volume.mean:.4f}{spread}")
    print(f"figures and numbers: {out} (front.png, .svg, .csv, .json)")


def as_csv(found: Sequence[Front], x: ScoreKind, y: ScoreKind) -> str:
    """A line for every point."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    sides = [f"{m.name}{end}" for m in (x, y) for end in ("", "_low", "_high")]
    writer.writerow(["method", "label", "setting", *sides, "on_front", "best", "concepts", "images"])
    for front in found:
        for p in front.points:
            numbers = [value for i in (p.x, p.y) for value in (i.mean, i.low, i.high)]
            cells = ["" if value is None else f"{value:.6f}" for value in numbers]
            setting = json.dumps(p.setting, ensure_ascii=False)
            writer.writerow(
                [front.method, p.label, setting, *cells, int(p.on_front), int(p.best), p.concepts, p.images]
            )
    return text.getvalue()


if __name__ == "__main__":
    sys.exit(run_cli(main))
