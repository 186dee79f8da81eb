"""`python -m perfusion.toyland.build.report`: measures Toyland's models and holds them against the bars."""

from __future__ import annotations

import json
import math
import os
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from perfusion.cli import parse_key_values, run_cli
from perfusion.config import ConfigError
from perfusion.files import atomic_path, atomic_write_text
from perfusion.provenance import provenance
from perfusion.toyland.build import card, following, measure, probes, shipped
from perfusion.toyland.build.shipped import Toyland
from perfusion.toyland.world import WORLD_VERSION

WEIGHTS = Path(__file__).parents[1] / "weights"
REPORT = "report.json"

USAGE = """
Measure Toyland's models and write the table, with what is reached, to report.json beside the weights.

  python -m perfusion.toyland.build.report
  python -m perfusion.toyland.build.report weights=toyland-weights prompts=200

It takes less than 25 minutes on two CPU cores. The model card (README.md beside the weights) is written anew, unless
out= is given; and with sheet=<file> a picture: 64 renders, and what the model draws for their captions.
"""


@dataclass
class ReportConfig:
    """Command line of the report."""

    weights: str = str(WEIGHTS)  # folder with pipeline/, reader/ and scorer/
    prompts: int = 1000  # fresh captions to draw
    processes: int | None = None  # that draw, with one thread each; null: one per core
    out: str | None = None  # file to write; null: report.json in the folder of the weights
    sheet: str | None = None  # PNG file for 64 renders beside 64 generated pictures; null: none


@dataclass(frozen=True)
class Row:
    """One line of the table; `bar` is None for what is only stated."""

    name: str
    value: float | None  # None: there was nothing to count
    bar: float | None = None
    reached: bool | None = None


def stated(name: str, value: float) -> Row:
    """A row without a bar."""
    return Row(name, _stated(value))


def at_least(name: str, value: float, bar: float) -> Row:
    """A row that is reached from `bar` upwards; never by NaN, of which there is no number to state."""
    return Row(name, _stated(value), bar, round(value, 4) >= bar)


def at_most(name: str, value: float, bar: float) -> Row:
    """A row that is reached up to `bar`; never by NaN."""
    return Row(name, _stated(value), bar, round(value, 4) <= bar)


def _stated(value: float) -> float | None:
    return None if math.isnan(value) else round(value, 4)


READER = {"superclass": 0.98, "body": 0.98, "second": 0.98, "pattern": 0.98, "detail": 0.97}
READER |= {"place": 0.98, "worn": 0.98, "support": 0.98, "style": 0.98}
DROP = 0.02  # of the reader on reconstructions
PROMPTS = {"superclass": 0.98, "body": 0.96, "place": 0.98, "sketch or mosaic": 0.98, "support": 0.97}
PROMPTS |= {"second": 0.90, "pattern": 0.90, "detail": 0.85, "worn": 0.90}
PROMPTS |= {"both superclasses": 0.95, "colours bound": 0.85}
OTHER_PROMPTS = ("photo", "plain", "eyes", "objects")
SAYS = {"one": ("", 0.99), "two": (", two toys", 0.97)}


def measured(toyland: Toyland, weights: Path, prompts: int) -> tuple[list[Row], dict[str, Any]]:
    """The rows of the table, and the numbers behind them that are no row."""
    rows = [*_at_the_noun(toyland), *_of_the_judges(toyland)]
    drawn = following.draw_captions(toyland, prompts)
    found = following.prompt_following(drawn)
    rows += [at_least(f"prompts: {name}", found.get(name, math.nan), bar) for name, bar in PROMPTS.items()]
    rows += [stated(f"prompts: {name}", found[name]) for name in OTHER_PROMPTS if name in found]
    agreement = following.scorer_agreement(toyland.scorer, drawn)
    rows.append(at_least("prompts: clip_t_correlation", agreement.pop("clip_t_correlation"), 0.3))
    rows += [stated(f"prompts: {name}", value) for name, value in agreement.items()]
    told = following.told_all_looks(toyland)
    rows.append(at_least("told all looks: identity", told["identity"], 0.90))
    rows.append(at_least("told all looks: prompts followed", told["prompt"], 0.97))
    swap = following.swapped(toyland)
    rows.append(at_least("swapped noun: the other superclass is drawn", swap["other"], 0.90))
    rows.append(stated("swapped noun: its own superclass is drawn", swap["own"]))
    pairs = following.compositions(toyland)
    rows += [stated(f"compositions, {name}", pairs[name]) for name in ("seen", "unseen", "unseen, reader on renders")]
    rows.append(at_most("compositions, seen minus unseen", pairs["seen"] - pairs["unseen"], 0.10))
    rows.append(at_least("sharpness", following.sharpness(drawn), 0.7))
    rows.append(at_least("images per second", measure.images_per_second(toyland.pipe), 8.0))
    size = sum(f.stat().st_size for f in weights.rglob("*.safetensors")) / 1e6
    rows.append(at_most("weights in all, MB", size, 30.0))
    details = {"prompts": found, "compositions": pairs, "fine_tuning": measure.fine_tuning_curve(toyland)}
    return rows, details


def _at_the_noun(toyland: Toyland) -> Iterator[Row]:
    """What a noun's own token holds, and what the UNet reads there."""
    for count, shares in probes.noun_says(toyland.encode).items():
        which, bar = SAYS[count]
        for look, share in shares.items():
            yield at_least(f"noun's token says{which}: {look}", share, bar)
    for count, shares in probes.noun_says(toyland.scorer.encode).items():
        for look, share in shares.items():
            yield stated(f"noun's token says{SAYS[count][0]}, in the scorer: {look}", share)
    for look, share in probes.read_at_noun(toyland.pipe, toyland.encode).items():
        yield at_least(f"looks are read at the noun: {look}", share, 0.8)


def _of_the_judges(toyland: Toyland) -> Iterator[Row]:
    """How far reader and scorer can be trusted, and what the autoencoder leaves of a picture."""
    renders, back = measure.reader_accuracy(toyland)
    for name, value in renders.items():
        what = f"reader on renders: {name}"
        yield at_least(what, value, READER[name]) if name in READER else stated(what, value)
    for name, value in back.items():
        yield at_most(f"reader on reconstructions, drop: {name}", renders[name] - value, DROP)
    yield stated("autoencoder: mean squared error on [-1, 1]", measure.autoencoder_error(toyland.pipe.vae))
    yield at_least("scorer: right caption of 100", measure.retrieval(toyland.scorer), 0.93)
    identity = measure.identity_on_renders(toyland.reader)
    yield at_least("identity of an instance's own renders", identity["own"], 0.95)
    yield stated("identity of another instance's renders (chance)", identity["chance"])


def table(rows: Iterable[Row]) -> str:
    """The rows as aligned text."""
    marks = {True: "reached", False: "NOT reached", None: ""}
    lines = [(r.name, card.number(r.value), card.number(r.bar), marks[r.reached]) for r in rows]
    lines.insert(0, ("what", "value", "bar", ""))
    widths = [max(len(line[i]) for line in lines) for i in range(3)]
    return "\n".join(
        f"{name:<{widths[0]}}  {value:>{widths[1]}}  {bar:>{widths[2]}}  {mark}".rstrip()
        for name, value, bar, mark in lines
    )


def write(path: Path, **parts: Any) -> dict[str, Any]:
    """Set the parts of a report file and keep the others that it has; returns all of it."""
    known: Mapping[str, Any] = json.loads(path.read_text()) if path.exists() else {}
    report = _without_nan({**known, "world_version": WORLD_VERSION, **parts})
    atomic_write_text(path, json.dumps(report, indent=2, allow_nan=False) + "\n")
    return report


def _without_nan(value: Any) -> Any:
    """The same with null, which JSON has, for numbers that are none."""
    if isinstance(value, dict):
        return {key: _without_nan(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_without_nan(item) for item in value]
    return None if isinstance(value, float) and math.isnan(value) else value


def main(argv: Sequence[str]) -> None:
    """Command line entry point."""
    config = parse_key_values(argv, ReportConfig, USAGE)
    weights = Path(config.weights).expanduser()
    for part in ("pipeline", "reader", "scorer"):
        if not (weights / part).is_dir():
            raise ConfigError(f"weights: {weights} has no folder {part}/; expected what perfusion.toyland.build wrote")
    for name in ("prompts", "processes"):
        if (value := getattr(config, name)) is not None and value < 1:
            raise ConfigError(f"{name}: found {value}, expected at least 1")
    path = Path(config.out or weights / REPORT).expanduser()
    toyland = shipped.Toyland(weights, config.processes or os.cpu_count() or 1)
    if config.sheet:
        with atomic_path(Path(config.sheet).expanduser()) as temporary:
            following.renders_beside_pictures(toyland).save(temporary, "PNG")
    rows, details = measured(toyland, weights, config.prompts)
    report = write(path, bars=[asdict(row) for row in rows], details=details, measured_with=provenance())
    if path == weights / REPORT:
        atomic_write_text(weights / card.FILE_NAME, card.card(report))
    print(table(rows))
    print(f"\nwritten to {path}")


if __name__ == "__main__":
    sys.exit(run_cli(main))
