"""`python -m eval.report`: scores as one page, with the pictures behind every point, as tables and as figures."""

from __future__ import annotations

import html
import importlib
import json
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict, astuple, dataclass, field
from pathlib import Path
from typing import Any

from omegaconf import MISSING

from eval.aggregate import RESAMPLES, Bootstrap, Summary, labels_of, summarize, summary
from eval.front import Front, asked_fronts
from eval.looks import looks
from eval.pareto import as_csv
from eval.record import Point, ScoreError, read_all, setting_key
from eval.score_kinds import ordered, score_kind
from eval.sheets import SIDE, SUFFIX, Sheet, make_sheet
from eval.tables import latex, markdown
from perfusion.bars import Bar
from perfusion.cli import parse_key_values, run_cli
from perfusion.files import atomic_write_text

USAGE = """
Usage: python -m eval.report scores=<scores.json> [key=value ...]

Writes index.html, a page that needs no network: fronts of all methods, with the pictures of a point after a click on
it, and all tables. Beside it: the table over concepts (table.md, table.tex) and the front (front.csv, front.png,
front.svg; attributes.png, attributes.svg of Toyland's attribute reader). Several records: scores=[a.json,b.json]
"""
PAGE, SHEETS = "index.html", "sheets"
_TEMPLATES = Path(__file__).with_name("page")
_ALL = ""  # the scope of means over concepts


@dataclass
class ReportConfig:
    """The options of `python -m eval.report`."""

    scores: Any = MISSING  # record of `python -m eval.score`, or a list of records
    out: str = "report"  # folder; it is made
    title: str = "Likeness and prompt"  # of the page
    x: str = "clip_t"  # score that goes to the right at first, and in front.png
    y: str = "clip_i"  # score that goes up
    reference: list[float] = field(default_factory=lambda: [0.0, 0.0])  # x and y that the hypervolume starts from
    embed: bool = False  # put the pictures into the page, too, rather than beside it
    side: int = SIDE  # pixels of a picture on the page, at most
    resamples: int = RESAMPLES  # of the bootstrap over concepts and seeds
    seed: int = 0  # of the bootstrap


def main(argv: Sequence[str]) -> None:
    """Command line entry point."""
    report(parse_key_values(argv, ReportConfig, USAGE))


def report(config: ReportConfig) -> Path:
    """Write a report; returns its page. Raises ScoreError: a record or a picture that cannot be read, plotly is not
    installed; ConfigError: no such score."""
    x, y = score_kind(config.x, "x"), score_kind(config.y, "y")
    if config.side < 8:
        raise ScoreError(f"side: found {config.side}, expected at least 8 pixels")
    try:
        plotly: Any = importlib.import_module("plotly.offline")
    except ImportError as error:
        raise ScoreError("the page needs plotly, the extra report of this package; `make setup` installs it") from error
    bootstrap = Bootstrap(config.resamples, config.seed)
    document, points = read_all(config.scores)
    summaries = summarize(points, bootstrap)
    axes = [(x, y, config.reference)]
    if any({"prompt", "identity"} <= s.scores.keys() for s in summaries) and (x.name, y.name) != ("prompt", "identity"):
        axes.append((score_kind("prompt", "x"), score_kind("identity", "y"), [0.0, 0.0]))
    drawn = [asked_fronts(summaries, *pair, bootstrap.level) for pair in axes]
    out = Path(config.out).expanduser()
    (out / SHEETS).mkdir(parents=True, exist_ok=True)
    sheets = [
        make_sheet([p.file for p in point.pictures], None if config.embed else out / SHEETS, config.side)
        for point in Bar(points, desc="Sheets", unit="sheet", disable=None)
    ]
    data = _data(document, points, summaries, sheets, bootstrap)
    volumes = []
    for found, (right, up, start) in zip(drawn, axes, strict=True):
        areas = {front.method: list(astuple(front.hypervolume)) for front in found}
        volumes.append({"x": right.name, "y": up.name, "reference": list(start), "methods": areas})
    data |= {"x": x.name, "y": y.name, "volumes": volumes}
    files = _write_tables_and_figures(out, summaries, drawn, axes)
    level = f"{bootstrap.level:.0%}".replace("%", " %")
    atomic_write_text(out / PAGE, _page(config.title, data, plotly.get_plotlyjs(), level, files))
    _forget_old_sheets(out / SHEETS, sheets)
    print(f"report: {out / PAGE}")
    print(f"tables and figures beside it: {', '.join(files)}")
    return out / PAGE


def _data(
    document: Mapping[str, Any],
    points: Sequence[Point],
    summaries: Sequence[Summary],
    sheets: Sequence[Sheet],
    bootstrap: Bootstrap,
) -> dict[str, Any]:
    """Everything that the page shows."""
    look = looks(s.method for s in summaries)
    methods = list(look)
    prompts = list(dict.fromkeys(p.prompt for point in points for p in point.pictures))
    number = {prompt: k for k, prompt in enumerate(prompts)}
    concepts = sorted({point.concept for point in points})
    behind: dict[tuple[str, str, str], int] = {point.key: k for k, point in enumerate(points)}
    rows, single = [], []
    scopes = [(_ALL, summaries)] if len(concepts) > 1 else []
    for concept in concepts:
        found = [summary([point], bootstrap) for point in points if point.concept == concept]
        scopes.append((concept, found))
        single += found
    for scope, found in scopes:
        for s, label in zip(found, labels_of(found), strict=True):
            row = {"scope": scope, "method": methods.index(s.method), "label": label, "key": setting_key(s.setting)}
            row["scores"] = {
                name: [None if v is None else round(v, 5) for v in (i.mean, i.low, i.high)]
                for name, i in s.scores.items()
                if i.mean == i.mean
            }
            row["images"] = s.images
            row["sheets"] = [behind[s.method, concept, row["key"]] for concept in s.concepts]
            rows.append(row)
    said = {(s.method, s.concepts[0], setting_key(s.setting)): s for s in single}
    sizes = (sum(len(point.pictures) for point in points), len(methods), len(concepts))
    counts = ", ".join(map(_count, sizes, ("picture", "method", "concept")))
    made = document.get("made_with", {})
    versions = ", ".join(f"{name} {version}" for name, version in made.get("versions", {}).items())
    scorers = " and ".join(f"{kind} {made[kind]}" for kind in ("clip", "dino") if kind in made) or "unknown models"
    intervals = f"Intervals from {bootstrap.resamples} resamples, seed {bootstrap.seed}."
    return {
        "about": f"{counts}. Scored by {scorers}. {intervals}",
        "made": f"Made with {versions}; commit {made.get('git_commit') or 'unknown'}.",
        "measures": [
            {"name": m.name, "title": m.title, "about": m.about, "higher": m.higher}
            for m in ordered({name for s in summaries for name in s.scores})
        ],
        "methods": [{"name": m, "title": v.title, "colour": v.colour, "symbol": v.symbol} for m, v in look.items()],
        "scopes": [[scope, scope or "mean over all"] for scope, _ in scopes],
        "rows": rows,
        "prompts": prompts,
        "sheets": [_sheet(point, sheet, said[point.key], number) for point, sheet in zip(points, sheets, strict=True)],
        "references": document.get("references", {}),
    }


def _sheet(point: Point, sheet: Sheet, scores: Summary, number: Mapping[str, int]) -> dict[str, Any]:
    """One point's pictures, prompt by prompt; a cell is its place on the sheet, its seed and its scores."""
    names = [m.name for m in ordered({name for picture in point.pictures for name in picture.scores})]
    together: dict[str, list[list[Any]]] = {}
    for k, p in enumerate(point.pictures):
        values = [round(p.scores[name], 3) if name in p.scores else None for name in names]
        together.setdefault(p.prompt, []).append([k, p.seed, *values])
    shown = [f"{m.title} {scores.scores[m.name].mean:.3f}" for m in ordered(set(scores.scores))[:2]]
    return {
        "concept": point.concept,
        "said": " · ".join([_count(len(point.pictures), "picture"), *shown]),
        **asdict(sheet),
        "measures": names,
        "prompts": [{"prompt": number[prompt], "cells": cells} for prompt, cells in together.items()],
    }


def _write_tables_and_figures(
    out: Path, summaries: Sequence[Summary], drawn: Sequence[Sequence[Front]], axes: Sequence[tuple[Any, ...]]
) -> list[str]:
    """Write what a paper takes; returns the files' names."""
    from eval.figures import draw_fronts, save_figure

    files = {
        "table.md": markdown(summaries),
        "table.tex": latex(summaries, "Mean over concepts, and half the width of its 95 % interval."),
        "front.csv": as_csv(drawn[0], *axes[0][:2]),
    }
    for name, text in files.items():
        atomic_write_text(out / name, text)
    written = list(files)
    for stem, found, pair in zip(("front", "attributes"), drawn, axes, strict=False):
        save_figure(draw_fronts(found, *pair[:2]), out / stem)
        written += [f"{stem}.png", f"{stem}.svg"]
    return written


def _page(title: str, data: Mapping[str, Any], plotly: str, level: str, files: Sequence[str]) -> str:
    style, script, page = ((_TEMPLATES / name).read_text("utf-8") for name in ("page.css", "page.js", "page.html"))
    # "<" ends a script wherever it stands, and means the same in JSON when it is escaped.
    content = json.dumps(data, ensure_ascii=False, separators=(",", ":")).replace("<", "\\u003c")
    links = ", ".join(f'<a href="{name}">{name}</a>' for name in files)
    parts = {
        "title": html.escape(title),
        "style": style,
        "level": level,
        "files": f"Tables and figures: {links}.",
        "data": content,
        "plotly": f"<script>{plotly}</script>",
        "script": script,
    }
    head, *rest = page.split("{{")
    return head + "".join(parts[name] + text for name, text in (piece.split("}}", 1) for piece in rest))


def _forget_old_sheets(folder: Path, sheets: Sequence[Sheet]) -> None:
    """Delete the sheets of former reports in the same folder."""
    current = {Path(sheet.source).name for sheet in sheets if not sheet.source.startswith("data:")}
    for file in folder.glob(f"*{SUFFIX}"):
        if file.name not in current:
            file.unlink()
    if not current:
        folder.rmdir()


def _count(number: int, what: str) -> str:
    return f"{number:,} {what}{'s' * (number != 1)}"


if __name__ == "__main__":
    sys.exit(run_cli(main))
