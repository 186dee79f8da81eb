"""Small pictures for a page: all of a point's in one file, so that a page of thousands opens at once."""

from __future__ import annotations

import base64
import hashlib
import io
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from PIL import Image

from eval.record import ScoreError
from perfusion.files import atomic_write_bytes

SIDE = 96  # pixels of a small picture, at most
COLUMNS = 16
SUFFIX = ".webp"
_QUALITY = 86


@dataclass(frozen=True)
class Sheet:
    """Cells of one size, from left to right and top to bottom."""

    source: str  # address of the picture for a page: a file's name, or a data URI
    columns: int
    rows: int
    width: int  # of a cell, in pixels
    height: int


def make_sheet(files: Sequence[Path], folder: Path | None, side: int = SIDE) -> Sheet:
    """The pictures of `files`, each made smaller to fit `side`, on one sheet. It is written into `folder`, named after
    its contents, unless it is there; None: it becomes a data URI. Raises ScoreError: a picture that cannot be read."""
    small = [_small(file, side) for file in files]
    width, height = max(s.width for s in small), max(s.height for s in small)
    columns = min(COLUMNS, len(small))
    rows = -(-len(small) // columns)
    sheet = Image.new("RGB", (columns * width, rows * height), "white")
    for k, image in enumerate(small):
        row, column = divmod(k, columns)
        left, top = (width - image.width) // 2, (height - image.height) // 2
        sheet.paste(image, (column * width + left, row * height + top))
    if folder is None:
        return Sheet(data_uri(sheet, max(sheet.size)), columns, rows, width, height)
    name = hashlib.sha256(f"{sheet.size}".encode() + sheet.tobytes()).hexdigest()[:16] + SUFFIX
    if not (folder / name).is_file():
        atomic_write_bytes(folder / name, _encoded(sheet))
    return Sheet(f"{folder.name}/{name}", columns, rows, width, height)


def data_uri(image: Image.Image, side: int = SIDE) -> str:
    """A picture, made smaller to fit `side`, as an address that holds it."""
    if max(image.size) > side:
        image = image.copy()
        image.thumbnail((side, side), Image.Resampling.LANCZOS)
    return f"data:image/webp;base64,{base64.b64encode(_encoded(image)).decode('ascii')}"


def _small(file: Path, side: int) -> Image.Image:
    try:
        with Image.open(file) as image:
            small = image.convert("RGB")
    except (OSError, ValueError) as error:  # PIL's own errors are OSErrors
        raise ScoreError(f"{file}: was scored, but cannot be read any more: {error}") from error
    small.thumbnail((side, side), Image.Resampling.LANCZOS)
    return small


def _encoded(image: Image.Image) -> bytes:
    buffer = io.BytesIO()
    image.convert("RGB").save(buffer, "WEBP", quality=_QUALITY, method=4)
    return buffer.getvalue()
