"""Worn things and supports, in fixed colours so that captions need not describe them."""

from __future__ import annotations

from perfusion.toyland.pen import INK, RGB, Pen
from perfusion.toyland.shapes import Shape

GOLD: RGB = (255, 200, 20)
GOLD_DARK: RGB = (196, 130, 0)
SCARF: RGB = (214, 20, 40)
SCARF_DARK: RGB = (140, 8, 28)
TEAL: RGB = (0, 168, 168)
HULL: RGB = (140, 78, 34)
HULL_DARK: RGB = (92, 48, 20)
CARD: RGB = (214, 166, 104)
CARD_DARK: RGB = (150, 106, 58)

# How far a support lifts its object off the ground, in local units.
LIFT = {"none": 0.0, "skateboard": 7.0, "boat": 3.5, "box": 2.5}


def draw_worn(pen: Pen, worn: str, shape: Shape) -> None:
    """Paint a worn thing at the shape's anchor points."""
    x, y = shape.top
    w = shape.head
    if worn == "hat":
        pen.box((236, 236, 240), x - w * 0.62 - 0.6, y - 11.1, x + w * 0.62 + 0.6, y + 1)
        pen.box((236, 236, 240), x - w * 1.05 - 0.6, y - 1.6, x + w * 1.05 + 0.6, y + 2.6, 1)
        pen.box(INK, x - w * 0.62, y - 10.5, x + w * 0.62, y + 1)
        pen.box((255, 255, 255), x - w * 0.62, y - 4.2, x + w * 0.62, y - 1.9)
        pen.box(INK, x - w * 1.05, y - 1.2, x + w * 1.05, y + 2, 0.8)
    elif worn == "crown":
        for grow, colour in ((0.8, GOLD_DARK), (0.0, GOLD)):
            a, b, low = x - w * 0.85 - grow, x + w * 0.85 + grow, y + 2 + grow
            high, mid = y - 9 - grow, y - 2.5 - grow
            third = (b - a) / 4
            teeth = [(a, high + 1), (a + third, mid), (x, high), (b - third, mid), (b, high + 1)]
            pen.poly(colour, [(a, low), *teeth, (b, low)])
        for dx in (-0.5, 0, 0.5):
            pen.oval((220, 30, 60), x + dx * w, y - 0.4, 1.3, 1.3)
    elif worn == "scarf":
        (ax, ay), (bx, by) = shape.neck
        hang_x, hang_y = ax + (bx - ax) * 0.72, ay + (by - ay) * 0.72
        sag = 1.2 if by - ay < 8 else 0.0
        band = [(ax, ay), ((ax + bx) / 2, (ay + by) / 2 + sag), (bx, by)]
        pen.stroke(SCARF_DARK, band, 5.2)
        pen.stroke(SCARF, band, 4.2)
        pen.box(SCARF_DARK, hang_x - 2.6, hang_y, hang_x + 2.6, hang_y + 10.5)
        pen.box(SCARF, hang_x - 2.1, hang_y - 0.5, hang_x + 2.1, hang_y + 7.4)
    elif worn == "sunglasses":
        eyes = shape.eyes
        left, right = eyes[0], eyes[-1]
        r = 4.7 if len(eyes) > 1 else 5.6
        # A pale rim keeps the black lenses apart from dark bodies and from black eyes.
        for ex, ey in eyes:
            pen.box((240, 240, 244), ex - r - 0.7, ey - r * 0.8 - 0.7, ex + r + 0.7, ey + r * 0.8 + 0.7, 2.4)
        ends = (left, right) if len(eyes) > 1 else (left, (left[0] + 11, left[1] - 1))
        pen.stroke(INK, [(ends[0][0], ends[0][1] - 1.8), (ends[1][0], ends[1][1] - 1.8)], 1.9)
        for ex, ey in eyes:
            pen.box(INK, ex - r, ey - r * 0.8, ex + r, ey + r * 0.8, 2.2)
            pen.stroke((150, 160, 190), [(ex - 2.4, ey + 0.8), (ex - 0.4, ey - 1.8)], 1)


def draw_behind(pen: Pen, support: str, half: float) -> None:
    """Paint the part of a support that lies behind its object."""
    if support == "box":
        pen.box(CARD_DARK, -half, 5, half, 12)
        for s in (-1, 1):
            pen.poly(CARD, [(s * half, 8), (s * half, 5), (s * (half + 4), 1), (s * (half + 6), 4)])
    elif support == "boat":
        pen.box(HULL_DARK, half - 1.4, -14, half + 0.4, 12)
        pen.poly(SCARF, [(half + 0.6, -14), (half + 9, -10.5), (half + 0.6, -7)])


def draw_front(pen: Pen, support: str, half: float) -> None:
    """Paint the part of a support that lies under or in front of its object."""
    if support == "skateboard":
        w = max(16.0, half)
        for x in (-w * 0.62, w * 0.62):
            pen.oval(INK, x, 24, 3, 3)
            pen.oval((230, 230, 230), x, 24, 1.1, 1.1)
        pen.stroke(TEAL, [(-w - 3, 18.4), (-w + 1, 20.4), (w - 1, 20.4), (w + 3, 18.4)], 3)
    elif support == "boat":
        pen.poly(HULL, [(-half - 5, 9), (half + 5, 9), (half - 3, 23), (-half + 3, 23)])
        pen.poly((250, 240, 220), [(-half - 5, 9), (half + 5, 9), (half + 3.6, 12.4), (-half - 3.6, 12.4)])
        pen.poly(HULL_DARK, [(-half + 1, 19.5), (half - 1, 19.5), (half - 3, 23), (-half + 3, 23)])
        for x in (-1.0, -0.5, 0.0, 0.5, 1.0):
            pen.oval((120, 196, 250), x * half, 23.4, half * 0.32, 1.9)
    elif support == "box":
        pen.box(CARD, -half, 9, half, 22.5)
        pen.box(CARD_DARK, -half, 9, half, 10.6)
        pen.box((236, 204, 150), -2.4, 9, 2.4, 22.5)
        pen.box(CARD_DARK, -half, 21.3, half, 22.5)
