"""Many pictures as one."""

from __future__ import annotations

from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont

GAP = 2  # pixels between pictures
_SHOWN = 192  # pixels that a small picture is enlarged towards, so that it can be looked at
_TEXT = 14  # share of a picture's width that a caption's letters are high: 1 / 14


def image_grid(images: Sequence[Image.Image], columns: int, gap: int = GAP) -> Image.Image:
    """The pictures, all of one size, from left to right and top to bottom on white, `gap` pixels apart."""
    assert images and columns > 0 and len({image.size for image in images}) == 1
    columns = min(columns, len(images))
    rows = -(-len(images) // columns)
    width, height = images[0].size
    grid = Image.new("RGB", (columns * (width + gap) - gap, rows * (height + gap) - gap), "white")
    for i, image in enumerate(images):
        row, column = divmod(i, columns)
        grid.paste(image, (column * (width + gap), row * (height + gap)))
    return grid


def captioned_sheet(groups: Sequence[tuple[str, Sequence[Image.Image]]], columns: int = 6) -> Image.Image:
    """A block for every group, its caption above its pictures; blocks stand side by side where there is room.

    Small pictures are enlarged by a whole factor, pixel by pixel.

    Args:
        groups: captions and their pictures, at least one each; all pictures have one size.
        columns: pictures in a row of the sheet, at most.
    """
    width = groups[0][1][0].width
    factor = max(1, _SHOWN // width)
    matplotlib = find_spec("matplotlib")  # whose font has Greek letters; to import it takes long
    assert matplotlib is not None and matplotlib.origin is not None
    font_file = Path(matplotlib.origin).with_name("mpl-data") / "fonts" / "ttf" / "DejaVuSans.ttf"
    font = ImageFont.truetype(font_file, width * factor / _TEXT)
    blocks = [_block(caption, [_enlarged(p, factor) for p in pictures], columns, font) for caption, pictures in groups]
    widest = max(min(len(pictures), columns) for _, pictures in groups)
    beside = max(1, columns // widest)
    lines = [blocks[i : i + beside] for i in range(0, len(blocks), beside)]
    gap = round(font.size)  # wider between blocks than between pictures, or captions could belong to either
    across = max(block.width for block in blocks) + gap
    down = [max(block.height for block in line) + gap for line in lines]
    sheet = Image.new("RGB", (across * min(beside, len(blocks)) + gap, sum(down) + gap), "white")
    for number, line in enumerate(lines):
        for position, block in enumerate(line):
            room = down[number] - gap - block.height  # captions of several lines push their pictures down
            sheet.paste(block, (gap + position * across, gap + sum(down[:number]) + room))
    return sheet


def _block(caption: str, pictures: Sequence[Image.Image], columns: int, font: ImageFont.FreeTypeFont) -> Image.Image:
    grid = image_grid(pictures, columns)
    text = "\n".join(_wrapped(caption, grid.width, font))
    below = round(ImageDraw.Draw(grid).multiline_textbbox((0, 0), text, font)[3] + font.size / 3)
    block = Image.new("RGB", (grid.width, below + grid.height), "white")
    ImageDraw.Draw(block).multiline_text((0, 0), text, "black", font)
    block.paste(grid, (0, below))
    return block


def _wrapped(text: str, width: int, font: ImageFont.FreeTypeFont) -> list[str]:
    """Lines of whole words, none longer than `width` pixels unless a single word is."""
    lines = [""]
    for word in text.split():
        longer = f"{lines[-1]} {word}".strip()
        if not lines[-1] or font.getlength(longer) <= width:
            lines[-1] = longer
        else:
            lines.append(word)
    return lines


def _enlarged(picture: Image.Image, factor: int) -> Image.Image:
    if factor == 1:
        return picture
    return picture.resize((picture.width * factor, picture.height * factor), Image.Resampling.NEAREST)
