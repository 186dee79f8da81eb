"""Sheets of pictures: the order, the captions, the sizes."""

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from perfusion.contact_sheet import captioned_sheet, image_grid
from perfusion.training.samples import save_samples

COLOURS = {"red": (255, 0, 0), "green": (0, 128, 0), "blue": (0, 0, 255)}


def test_image_grid():
    colours = ["red", "green", "blue"]
    grid = image_grid([Image.new("RGB", (4, 3), colour) for colour in colours], columns=2, gap=1)
    assert grid.size == (9, 7)
    found = [grid.getpixel(at) for at in [(0, 0), (5, 0), (3, 6), (4, 0), (0, 3), (8, 6)]]
    assert found == [(255, 0, 0), (0, 128, 0), (0, 0, 255)] + [(255, 255, 255)] * 3
    assert image_grid([Image.new("RGB", (4, 3))], columns=5).size == (4, 3)


def boxes(sheet: Image.Image, colour: str) -> tuple[int, int, int, int]:
    """Left, top, right and bottom of what is painted in exactly this colour."""
    y, x = np.nonzero((np.asarray(sheet) == COLOURS[colour]).all(-1))
    return int(x.min()), int(y.min()), int(x.max()) + 1, int(y.max()) + 1


def pictures(*colours: str, side: int = 64) -> list[Image.Image]:
    return [Image.new("RGB", (side, side), colour) for colour in colours]


def test_small_pictures_are_enlarged_below_their_captions() -> None:
    sheet = captioned_sheet([("a photo of <cat*>", pictures("red", "blue"))])
    red, blue = boxes(sheet, "red"), boxes(sheet, "blue")
    assert red[2] - red[0] == red[3] - red[1] == 3 * 64
    assert (blue[0], blue[1]) == (red[2] + 2, red[1])
    above = np.asarray(sheet.crop((0, 0, sheet.width, red[1])))
    assert above.min() < 64, "no caption above the pictures"


def test_large_pictures_stay_as_they_are() -> None:
    left, top, right, bottom = boxes(captioned_sheet([("x", pictures("green", side=256))]), "green")
    assert (right - left, bottom - top) == (256, 256)


@pytest.mark.parametrize(("each", "beside"), [(1, 6), (3, 2), (4, 1), (9, 1)])
def test_blocks_stand_side_by_side_where_there_is_room(each: int, beside: int) -> None:
    groups = [(f"prompt {i}", pictures(*["red"] * each)) for i in range(beside)]
    first = captioned_sheet([*groups, ("last", pictures(*["blue"] * each))])
    assert boxes(first, "blue")[0] == boxes(first, "red")[0] and boxes(first, "blue")[1] >= boxes(first, "red")[3]
    if beside > 1:
        groups[-1] = ("last", pictures(*["blue"] * each))
        line = captioned_sheet(groups)
        assert boxes(line, "blue")[0] > boxes(line, "red")[2] - 1 and boxes(line, "blue")[1] == boxes(line, "red")[1]


def test_a_long_caption_is_wrapped_and_its_neighbours_stay_in_line() -> None:
    long = "a photo of <cat*> wearing a very tall hat on a skateboard in the middle of the city at night"
    sheet = captioned_sheet([("short", pictures("red")), (long, pictures("blue"))])
    assert boxes(sheet, "red")[1] == boxes(sheet, "blue")[1]
    text = np.asarray(sheet.convert("L"))[: boxes(sheet, "blue")[1]]
    columns = np.nonzero(text.min(0) < 128)[0]
    assert columns.max() < boxes(sheet, "blue")[2] + 4, "the caption runs out of its block"
    assert captioned_sheet([("short", pictures("red"))]).height < sheet.height


def test_samples_have_a_training_picture_before_each_row_and_are_no_larger_than_to_be_looked_at(tmp_path: Path) -> None:
    rows = [
        (["a", "b"], pictures("blue", "blue", side=512)),
        (["c", "d"], pictures("green", "green", side=512)),
    ]
    found = []
    for count in (1, 2, 5):
        save_samples(tmp_path / "samples.png", pictures(*["red"] * count, side=512), rows, "from some")
        with Image.open(tmp_path / "samples.png") as sheet:
            found.append([boxes(sheet.convert("RGB"), colour) for colour in ("red", "blue", "green")])
    (first, base, concept), (both, *same), many = found
    assert first[2] < base[0] and first[3] - first[1] == 256 and base[3] < concept[1] and base[0] == concept[0]
    assert (both[0], both[1], both[3]) == (first[0], first[1], concept[3]) and same == [base, concept]
    assert many == [both, *same]
