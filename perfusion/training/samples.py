"""samples.png: what the base model draws for fixed prompts, and below it what it draws for the concept."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from PIL import Image, ImageOps

from perfusion.contact_sheet import captioned_sheet
from perfusion.files import atomic_path

_SIDE = 256  # pixels of one picture, at most


def save_samples(
    path: Path, training: Sequence[Image.Image], rows: Sequence[tuple[Sequence[str], Sequence[Image.Image]]], title: str
) -> None:
    """Draw the sheet: training pictures in the first column, then one column per prompt.

    Args:
        path: a PNG file, written atomically.
        training: the training pictures, one of which is shown before each row; all pictures have their size, and large
            ones are made smaller.
        rows: for each row its captions and their pictures.
        title: of the first training picture.
    """
    side = min(_SIDE, training[0].width)
    blank = Image.new("RGB", training[0].size, "white")
    first = [("another" if k else title, picture) for k, picture in enumerate(training[: len(rows)])]
    first += [("", blank)] * (len(rows) - len(first))
    cells = [
        (caption, [ImageOps.contain(picture, (side, side))])
        for start, (captions, pictures) in zip(first, rows, strict=True)
        for caption, picture in [start, *zip(captions, pictures, strict=True)]
    ]
    with atomic_path(path) as temporary:
        captioned_sheet(cells, columns=len(cells) // len(rows)).save(temporary, "PNG")
