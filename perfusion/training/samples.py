"""samples.png: what the base model draws for fixed prompts, and below it what it draws for the concept."""

from __future__ import annotations

import textwrap
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.figure import Figure
from PIL import Image

from perfusion.data.prompts import validation_prompts
from perfusion.files import atomic_path

_SIDE = 1.6  # inches of one picture
_DPI = 120


def sample_templates(prompts: str) -> tuple[str, ...]:
    """The validation templates that go with `backbone.prompts`: those in Toyland's words, or those for all others."""
    return validation_prompts("toyland" if prompts == "toyland" else "sd")


def save_samples(
    path: Path,
    training: Sequence[Image.Image],
    rows: Sequence[tuple[str, Sequence[str], Sequence[Image.Image]]],
    title: str,
) -> None:
    """Draw the sheet: training pictures in the first column, then one column per prompt.

    Args:
        path: a PNG file, written atomically.
        training: the training pictures; one is shown beside each row.
        rows: for each row its name, its prompts and their pictures.
        title: above everything.
    """
    columns = 1 + max(len(pictures) for _, _, pictures in rows)
    figure = Figure(figsize=(columns * _SIDE, len(rows) * (_SIDE + 0.4) + 0.3), dpi=_DPI, layout="constrained")
    figure.suptitle(title, fontsize=10, parse_math=False)
    axes = figure.subplots(len(rows), columns, squeeze=False)
    for axis in axes.flat:
        axis.set_axis_off()
    for r, (name, prompts, pictures) in enumerate(rows):
        if r < len(training):
            _show(axes[r, 0], training[r], "training picture")
        axes[r, 1].annotate(
            name, (0, 0.5), (-4, 0), "axes fraction", "offset points", rotation=90, ha="right", va="center",
            fontsize=9, fontweight="bold", parse_math=False,
        )  # fmt: skip
        for c, (prompt, picture) in enumerate(zip(prompts, pictures, strict=True), start=1):
            _show(axes[r, c], picture, prompt)
    with atomic_path(path) as temporary:
        figure.savefig(temporary)


def _show(axis: Any, picture: Image.Image, caption: str) -> None:
    axis.imshow(np.asarray(picture), interpolation="nearest" if picture.width < 256 else None)
    axis.set_title("\n".join(textwrap.wrap(caption, 22)), fontsize=7.5, parse_math=False)
