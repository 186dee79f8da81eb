"""`python -m perfusion.toyland.build.report`: measures Toyland's models and holds them against the bars."""

from __future__ import annotations

import json
import math
import os
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from perfusion.cli import aligned, parse_key_values, run_cli
from perfusion.config import ConfigError
from perfusion.files import atomic_path, atomic_write_text
from perfusion.provenance import provenance
from perfusion.toyland.build import card, following, measure, probes, shipped
from perfusion.toyland.build.shipped import Toyland
from perfusion.toyland.build.train_words import LOOKS
from perfusion.toyland.reader import OBJECT_HEADS, SCENE_HEADS
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


PROMPTS = {"superclass": 0.98, "body": 0.96, "place": 0.98, "sketch or mosaic": 0.98, "support": 0.97}
PROMPTS |= {"second": 0.90, "pattern": 0.90, "detail": 0.85, "worn": 0.90}
PROMPTS |= {"both superclasses": 0.95, "colours bound": 0.85}
OTHER_PROMPTS = ("photo", "plain", "eyes", "objects")
BARS = {
    **{f"noun's token says: {look}": 0.99 for look in LOOKS},
    **{f"noun's token says, two toys: {look}": 0.97 for look in LOOKS},
    **{f"looks are read at the noun: {look}": 0.8 for look in probes.LOOKS},
    **{f"reader on renders: {name}": 0.97 if name == "detail" else 0.98 for name in (*OBJECT_HEADS, "place", "style")},
    **{f"reader on reconstructions, drop: {name}": 0.02 for name in (*SCENE_HEADS, *OBJECT_HEADS)},
    "scorer: right caption of 100": 0.93,
    "identity of an instance's own renders": 0.95,
    **{f"prompts: {name}": bar for name, bar in PROMPTS.items()},
    "prompts: clip_t_correlation": 0.3,
    "told all looks: identity": 0.90,
    "told all looks: prompts followed": 0.97,
    "swapped noun: the other superclass is drawn": 0.90,
    "compositions, seen minus unseen": 0.10,
    "sharpness": 0.7,
    "images per second": 8.0,
    "weights in all, MB": 30.0,
}
AT_MOST = ("reader on reconstructions, drop: ", "compositions, seen minus unseen", "weights in all, MB")


def row(name: str, value: float) -> dict[str, Any]:
    """One line of the table: the `value`, its `bar` and whether it is `reached`; None for what is only stated.

    NaN reaches nothing, and there is no number to state.
    """
    bar = BARS.get(name)
    reached = None if bar is None else round(value, 4) <= bar if name.startswith(AT_MOST) else round(value, 4) >= bar
    return {"name": name, "value": None if math.isnan(value) else round(value, 4), "bar": bar, "reached": reached}


def measured(toyland: Toyland, weights: Path, prompts: int) -> tuple[dict[str, float], dict[str, Any]]:
    """The values of the table, and the numbers behind them that are no row."""

    def each(what: str, values: Mapping[str, float]) -> dict[str, float]:
        return {f"{what}: {name}": value for name, value in values.items()}

    says, in_scorer = (probes.noun_says(encoder.encode) for encoder in (toyland, toyland.scorer))
    renders, back = measure.reader_accuracy(toyland)
    identity = measure.identity_on_renders(toyland.reader)
    drawn = following.draw_captions(toyland, prompts)
    found = following.prompt_following(drawn)
    told, swap, pairs = following.told_all_looks(toyland), following.swapped(toyland), following.compositions(toyland)
    values = {
        **each("noun's token says", says["one"]),
        **each("noun's token says, two toys", says["two"]),
        **each("noun's token says, in the scorer", in_scorer["one"]),
        **each("noun's token says, two toys, in the scorer", in_scorer["two"]),
        **each("looks are read at the noun", probes.read_at_noun(toyland.pipe, toyland.encode)),
        **each("reader on renders", renders),
        **each("reader on reconstructions, drop", {name: renders[name] - value for name, value in back.items()}),
        "autoencoder: mean squared error on [-1, 1]": measure.autoencoder_error(toyland.pipe.vae),
        "scorer: right caption of 100": measure.retrieval(toyland.scorer),
        "identity of an instance's own renders": identity["own"],
        "identity of another instance's renders (chance)": identity["chance"],
        **each("prompts", {name: found.get(name, math.nan) for name in PROMPTS}),
        **each("prompts", {name: found[name] for name in OTHER_PROMPTS if name in found}),
        **each("prompts", following.scorer_agreement(toyland.scorer, drawn)),
        "told all looks: identity": told["identity"],
        "told all looks: prompts followed": told["prompt"],
        "swapped noun: the other superclass is drawn": swap["other"],
        "swapped noun: its own superclass is drawn": swap["own"],
        **{f"compositions, {name}": pairs[name] for name in ("seen", "unseen", "unseen, reader on renders")},
        "compositions, seen minus unseen": pairs["seen"] - pairs["unseen"],
        "sharpness": following.sharpness(drawn),
        "images per second": measure.images_per_second(toyland.pipe),
        "weights in all, MB": sum(file.stat().st_size for file in weights.rglob("*.safetensors")) / 1e6,
    }
    return values, {"prompts": found, "compositions": pairs, "fine_tuning": measure.fine_tuning_curve(toyland)}


def table(rows: Sequence[Mapping[str, Any]]) -> str:
    """The rows as aligned text."""
    marks = {True: "reached", False: "NOT reached", None: ""}
    lines = [(r["name"], card.number(r["value"]), card.number(r["bar"]), marks[r["reached"]]) for r in rows]
    return "\n".join(aligned([("what", "value", "bar", ""), *lines], right=(1, 2)))


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
    values, details = measured(toyland, weights, config.prompts)
    rows = [row(name, value) for name, value in values.items()]
    report = write(path, bars=rows, details=details, measured_with=provenance())
    if path == weights / REPORT:
        atomic_write_text(weights / card.FILE_NAME, card.card(report))
    print(table(rows))
    print(f"\nwritten to {path}")


if __name__ == "__main__":
    sys.exit(run_cli(main))
