"""The figures of an experiment: its series as fronts, in Toyland's ground truth and in CLIP's scores."""

from __future__ import annotations

from pathlib import Path

from PIL import Image

from eval.figures import draw_fronts, save_figure
from eval.front import fronts
from eval.score_kinds import score_kind
from experiments.evidence import Evidence
from experiments.experiment import Experiment
from perfusion.files import atomic_path

_WIDTH = 900  # pixels of a figure on the page
_COLOURS = 64


def draw(experiment: Experiment, evidence: Evidence, folder: Path, images: Path) -> None:
    """Write `<id>` and `<id>-clip` as PNG and SVG into `folder`, and small PNG files into `images`."""
    folder.mkdir(parents=True, exist_ok=True)
    images.mkdir(parents=True, exist_ok=True)
    summaries = [evidence.summary(s, series.label) for series in experiment.series for s in series.settings]
    axes = {experiment.id: (experiment.x, experiment.y), f"{experiment.id}-clip": ("clip_t", "clip_i")}
    for name, (right, up) in axes.items():
        x, y = score_kind(right, "x"), score_kind(up, "y")
        save_figure(draw_fronts(fronts(summaries, x, y, (0.0, 0.0), evidence.bootstrap.level), x, y), folder / name)
        with Image.open(folder / f"{name}.png") as image:
            image.thumbnail((_WIDTH, _WIDTH), Image.Resampling.LANCZOS)
            small = image.convert("RGB").quantize(_COLOURS)
        with atomic_path(images / f"{name}.png") as file:
            small.save(file, "PNG", optimize=True)
