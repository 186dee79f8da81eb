"""A pen that draws bold shapes in an object's own coordinates, and out of the masks of what they hide."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from PIL import Image, ImageDraw

SUPERSAMPLE = 2
Point = tuple[float, float]
RGB = tuple[int, int, int]
INK: RGB = (28, 24, 36)
WHITE: RGB = (255, 255, 255)


def mix(a: RGB, b: RGB, amount: float) -> RGB:
    """`a` moved towards `b` by `amount` (0 to 1)."""
    return tuple(round(x + (y - x) * amount) for x, y in zip(a, b, strict=True))  # type: ignore[return-value]


class Pen:
    """Draws in local units (one unit is one final pixel at scale 1; the origin is `x`, `y`; y points down).

    A thing in front of objects is painted on `image` and, in the same call, taken out of the objects' `masks`.
    """

    def __init__(self, image: Image.Image, x: float, y: float, scale: float, masks: Sequence[Image.Image] = ()) -> None:
        self.image, self.masks = ImageDraw.Draw(image), [ImageDraw.Draw(mask) for mask in masks]
        self.x, self.y = x * SUPERSAMPLE, y * SUPERSAMPLE
        self.scale = scale * SUPERSAMPLE

    def _points(self, points: Sequence[Point]) -> list[Point]:
        return [(self.x + px * self.scale, self.y + py * self.scale) for px, py in points]

    def _box(self, x0: float, y0: float, x1: float, y1: float) -> tuple[float, float, float, float]:
        (ax, ay), (bx, by) = self._points(((x0, y0), (x1, y1)))
        return ax, ay, bx, by

    def _each(self, fill: Any) -> Sequence[tuple[ImageDraw.ImageDraw, Any]]:
        """What is drawn on, and in which colour."""
        return ((self.image, fill), *((mask, 0) for mask in self.masks))

    def oval(self, fill: Any, x: float, y: float, rx: float, ry: float) -> None:
        box = self._box(x - rx, y - ry, x + rx, y + ry)
        for draw, colour in self._each(fill):
            draw.ellipse(box, fill=colour)

    def poly(self, fill: Any, points: Sequence[Point]) -> None:
        moved = self._points(points)
        for draw, colour in self._each(fill):
            draw.polygon(moved, fill=colour)

    def box(self, fill: Any, x0: float, y0: float, x1: float, y1: float, round_by: float = 0.0) -> None:
        box = self._box(x0, y0, x1, y1)
        for draw, colour in self._each(fill):
            if round_by:
                draw.rounded_rectangle(box, round_by * self.scale, fill=colour)
            else:
                draw.rectangle(box, fill=colour)

    def stroke(self, fill: Any, points: Sequence[Point], width: float) -> None:
        """A thick line with round ends and joints."""
        moved = self._points(points)
        thick = max(1, round(width * self.scale))
        r = thick / 2
        for draw, colour in self._each(fill):
            draw.line(moved, fill=colour, width=thick, joint="curve")
            if thick > 3:
                for px, py in (moved[0], moved[-1]):
                    draw.ellipse((px - r, py - r, px + r, py + r), fill=colour)

    def arc(self, fill: Any, x: float, y: float, rx: float, ry: float, start: float, end: float, width: float) -> None:
        """Part of an oval's rim, from `start` to `end` degrees clockwise from the right, `width` units thick."""
        box = self._box(x - rx, y - ry, x + rx, y + ry)
        for draw, colour in self._each(fill):
            draw.arc(box, start, end, fill=colour, width=max(1, round(width * self.scale)))
