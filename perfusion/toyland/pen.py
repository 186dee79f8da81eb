"""A pen that draws bold shapes in an object's own coordinates onto one or more images at once."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from PIL import ImageDraw

SUPERSAMPLE = 2
Point = tuple[float, float]
RGB = tuple[int, int, int]
INK: RGB = (28, 24, 36)


def mix(a: RGB, b: RGB, amount: float) -> RGB:
    """`a` moved towards `b` by `amount` (0 to 1)."""
    return tuple(round(x + (y - x) * amount) for x, y in zip(a, b, strict=True))  # type: ignore[return-value]


class Pen:
    """Draws in local units (one unit is one final pixel at scale 1; the origin is `x`, `y`; y points down).

    targets: (draw, override) pairs; a target with an override is always painted in that value. That is how a
    thing in front of an object is painted on the picture and taken out of the object's mask in one call.
    """

    def __init__(self, targets: Sequence[tuple[ImageDraw.ImageDraw, Any]], x: float, y: float, scale: float) -> None:
        self.targets = targets
        self.x, self.y = x * SUPERSAMPLE, y * SUPERSAMPLE
        self.scale = scale * SUPERSAMPLE

    def _points(self, points: Sequence[Point]) -> list[Point]:
        return [(self.x + px * self.scale, self.y + py * self.scale) for px, py in points]

    def _box(self, x0: float, y0: float, x1: float, y1: float) -> tuple[float, float, float, float]:
        (ax, ay), (bx, by) = self._points(((x0, y0), (x1, y1)))
        return ax, ay, bx, by

    def oval(self, x: float, y: float, rx: float, ry: float, fill: Any) -> None:
        box = self._box(x - rx, y - ry, x + rx, y + ry)
        for draw, override in self.targets:
            draw.ellipse(box, fill=fill if override is None else override)

    def poly(self, points: Sequence[Point], fill: Any) -> None:
        moved = self._points(points)
        for draw, override in self.targets:
            draw.polygon(moved, fill=fill if override is None else override)

    def box(self, x0: float, y0: float, x1: float, y1: float, fill: Any, round_by: float = 0.0) -> None:
        box = self._box(x0, y0, x1, y1)
        for draw, override in self.targets:
            colour = fill if override is None else override
            if round_by:
                draw.rounded_rectangle(box, round_by * self.scale, fill=colour)
            else:
                draw.rectangle(box, fill=colour)

    def stroke(self, points: Sequence[Point], width: float, fill: Any) -> None:
        """A thick line with round ends and joints."""
        moved = self._points(points)
        thick = max(1, round(width * self.scale))
        r = thick / 2
        for draw, override in self.targets:
            colour = fill if override is None else override
            draw.line(moved, fill=colour, width=thick, joint="curve")
            if thick > 3:
                for px, py in (moved[0], moved[-1]):
                    draw.ellipse((px - r, py - r, px + r, py + r), fill=colour)

    def arc(self, x: float, y: float, rx: float, ry: float, start: float, end: float, width: float, fill: Any) -> None:
        """Part of an oval's rim, from `start` to `end` degrees clockwise from the right, `width` units thick."""
        box = self._box(x - rx, y - ry, x + rx, y + ry)
        for draw, override in self.targets:
            colour = fill if override is None else override
            draw.arc(box, start, end, fill=colour, width=max(1, round(width * self.scale)))
