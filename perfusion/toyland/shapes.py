"""The ten superclasses: silhouettes, features, and the points where things are worn.

Local units: the ground is at y = 20, the top of most objects at about y = -20; profiles look to the left.
A silhouette is painted on the object's mask and decides what is body colour and pattern; features go on top of it.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from perfusion.toyland.pen import INK, RGB, Pen, Point, mix
from perfusion.toyland.world import COLOURS, DETAILS, Instance

WHITE: RGB = (255, 255, 255)
ROSE: RGB = (240, 120, 140)


@dataclass(frozen=True)
class Paint:
    """Colours of an instance as used by its features."""

    body: RGB
    dark: RGB
    pale: RGB
    detail: RGB
    beak: RGB


def paint_of(instance: Instance) -> Paint:
    body = COLOURS[instance.body]
    return Paint(
        body=body,
        dark=mix(body, INK, 0.32),
        pale=mix(body, WHITE, 0.62) if instance.body != "white" else (214, 210, 214),
        detail=DETAILS[instance.detail],
        beak=(196, 60, 40) if instance.body in ("orange", "yellow") else (255, 168, 24),
    )


def _eye(c: Pen, x: float, y: float, r: float, paint: Paint) -> None:
    c.oval(x, y, r, r, WHITE)
    c.oval(x, y + 0.1, r * 0.82, r * 0.82, paint.detail)
    c.oval(x - r * 0.25, y - r * 0.3, r * 0.2, r * 0.2, WHITE)


def _cat(m: Pen) -> None:
    m.stroke([(8, 17), (15, 14), (17.5, 7), (15.5, -2)], 4.4, 255)
    m.oval(0, 10, 10.5, 10, 255)
    m.oval(-6, 18, 5, 2.8, 255)
    m.oval(6, 18, 5, 2.8, 255)
    m.oval(0, -5, 13.5, 10.5, 255)
    for s in (-1, 1):
        m.poly([(s * 13, -5), (s * 12, -20), (s * 2, -13)], 255)


def _cat_face(c: Pen, p: Paint) -> None:
    for s in (-1, 1):
        c.poly([(s * 11, -10), (s * 10.8, -16.5), (s * 5, -13)], ROSE)
        c.stroke([(s * 6, 0), (s * 15, -1.5)], 0.7, INK)
        c.stroke([(s * 6, 1.5), (s * 14.5, 3)], 0.7, INK)
        _eye(c, s * 6, -6, 4.2, p)
    c.oval(0, 0.6, 4.6, 3, p.pale)
    c.poly([(-2, -1.8), (2, -1.8), (0, 0.8)], (214, 60, 90))
    c.stroke([(0, 13), (0, 20)], 1, p.dark)


def _dog(m: Pen) -> None:
    m.stroke([(8, 16), (15, 11), (18, 3)], 4, 255)
    m.oval(0, 10, 10.5, 10, 255)
    m.oval(-6, 18, 5, 2.8, 255)
    m.oval(6, 18, 5, 2.8, 255)
    m.box(-10, -18, 10, 4, 255, 9)
    for s in (-1, 1):
        m.oval(s * 12, -3, 4.4, 9, 255)


def _dog_face(c: Pen, p: Paint) -> None:
    for s in (-1, 1):
        c.oval(s * 12, -3, 4.4, 9, p.dark)
        _eye(c, s * 5, -9, 4.1, p)
    c.oval(0, 4.5, 2.6, 4, (236, 70, 100))
    c.oval(0, -0.5, 7, 5, p.pale)
    c.oval(0, -3, 3.6, 2.5, INK)
    c.stroke([(0, -2), (0, 2.6)], 0.9, INK)
    c.stroke([(0, 13), (0, 20)], 1, p.dark)


def _bird(m: Pen) -> None:
    m.poly([(9, 0), (21, -8), (22, -1), (19, 5), (8, 10)], 255)
    m.oval(2, 4, 12.5, 11.5, 255)
    m.oval(-6, -8, 9.5, 9.5, 255)
    m.poly([(-13, -12), (-22, -7), (-13, -3.5)], 255)
    m.stroke([(-1, 14), (-1, 19), (-4, 19)], 2, 255)
    m.stroke([(5, 14), (5, 19), (2, 19)], 2, 255)


def _bird_face(c: Pen, p: Paint) -> None:
    c.stroke([(-1, 15), (-1, 19), (-4, 19)], 2, p.beak)
    c.stroke([(5, 15), (5, 19), (2, 19)], 2, p.beak)
    c.poly([(-13.5, -12), (-22, -7), (-13.5, -3.5)], p.beak)
    c.poly([(-2, 1), (8, -1), (15, 6), (8, 10), (1, 9)], p.dark)
    _eye(c, -8, -9.5, 4.6, p)


def _teddy(m: Pen) -> None:
    for s in (-1, 1):
        m.oval(s * 10, -14.5, 5, 5, 255)
        m.stroke([(s * 9, 4), (s * 14.5, 9)], 7, 255)
        m.oval(s * 8.5, 15.5, 6, 5, 255)
    m.oval(0, 9, 10.5, 10, 255)
    m.oval(0, -7, 12.5, 10.5, 255)


def _teddy_face(c: Pen, p: Paint) -> None:
    for s in (-1, 1):
        c.oval(s * 10.5, -15, 2.6, 2.6, p.pale)
        c.oval(s * 8.8, 15.8, 3.8, 3.2, p.pale)
        _eye(c, s * 5.4, -9.2, 4.1, p)
    c.oval(0, 8, 3.8, 4, p.pale)
    c.oval(0, -2.4, 5.4, 4, p.pale)
    c.oval(0, -4.2, 2.5, 1.8, INK)
    c.arc(0, -2.8, 2.6, 2.6, 20, 160, 0.8, INK)


def _robot(m: Pen) -> None:
    m.stroke([(0, -15), (0, -20)], 1.8, 255)
    m.oval(0, -21, 2.6, 2.6, 255)
    m.box(-11.5, -16, 11.5, 0, 255, 2)
    m.box(-14, -11, 14, -5, 255, 1)
    m.box(-4, 0, 4, 3, 255)
    m.box(-10, 2, 10, 14, 255, 1)
    for s in (-1, 1):
        m.box(min(s * 11.5, s * 15.5), 3, max(s * 11.5, s * 15.5), 13, 255, 1.5)
        m.box(min(s * 10, s * 12), 4, max(s * 10, s * 12), 7, 255)
        m.box(min(s * 2, s * 8.5), 14, max(s * 2, s * 8.5), 20, 255)


def _robot_face(c: Pen, p: Paint) -> None:
    c.oval(0, -21, 2.6, 2.6, p.detail)
    for s in (-1, 1):
        c.box(min(s * 11.8, s * 14), -11, max(s * 11.8, s * 14), -5, INK)
        c.box(min(s * 1.5, s * 9), 18, max(s * 1.5, s * 9), 20, INK)
        c.box(s * 5.2 - 4.1, -13, s * 5.2 + 4.1, -5, WHITE)
        c.box(s * 5.2 - 3.2, -12.1, s * 5.2 + 3.2, -5.9, p.detail)
    c.box(-6, -3.6, 6, -1.2, INK)
    for x in (-3, 0, 3):
        c.box(x - 0.5, -3.6, x + 0.5, -1.2, WHITE)
    c.box(-5, 5, 5, 11, p.pale)
    c.oval(-2, 8, 1.6, 1.6, (220, 50, 50))
    c.oval(2.2, 8, 1.6, 1.6, (40, 150, 70))


def _rabbit(m: Pen) -> None:
    for s in (-1, 1):
        m.oval(s * 5.5, -14.5, 3.7, 9.5, 255)
        m.oval(s * 7, 17.6, 6, 2.8, 255)
    m.oval(11, 13, 4, 4, 255)
    m.oval(0, 11, 9.8, 9.4, 255)
    m.oval(0, -2, 11.5, 9.2, 255)


def _rabbit_face(c: Pen, p: Paint) -> None:
    for s in (-1, 1):
        c.oval(s * 5.5, -15.5, 1.8, 7, ROSE)
        _eye(c, s * 5.2, -3.6, 4.1, p)
    c.oval(11.5, 13, 3.2, 3.4, WHITE)
    c.oval(0, 2.2, 4.6, 3, p.pale)
    c.oval(0, 0.6, 1.8, 1.3, (214, 60, 90))
    c.box(-1.8, 3.4, 1.8, 6.4, WHITE)
    c.stroke([(0, 3.4), (0, 6.4)], 0.5, INK)
    c.stroke([(0, 14), (0, 20)], 1, p.dark)


def _mug(m: Pen) -> None:
    m.arc(9, 3, 9, 10, -100, 100, 4.2, 255)
    m.box(-14, -13, 9, 20, 255, 4)
    m.box(-14, -13, 9, -4, 255)
    m.oval(-2.5, -13, 11.5, 4, 255)


def _mug_face(c: Pen, p: Paint) -> None:
    c.oval(-2.5, -13, 11.8, 5, p.detail)
    c.oval(-2.5, -13, 7.6, 2, (92, 50, 24))
    c.box(-13, 14.5, 8, 19.5, p.detail, 2)


def _teapot(m: Pen) -> None:
    m.poly([(-9, 3), (-15, 0), (-17, -8), (-22, -8), (-20, 7), (-9, 15)], 255)
    m.arc(12, 5, 9, 9.5, -110, 110, 3.8, 255)
    m.oval(0, 7, 14.5, 12, 255)
    m.box(-9, 15.4, 9, 20, 255, 1)
    m.oval(0, -5, 9, 5, 255)
    m.oval(0, -11.5, 4.2, 4.2, 255)


def _teapot_face(c: Pen, p: Paint) -> None:
    c.box(-9.5, -4.6, 9.5, -2.6, p.dark, 0.8)
    c.oval(0, -11.5, 4.2, 4.2, p.detail)
    c.box(-9, 15.4, 9, 20, p.detail, 1)


def _car(m: Pen) -> None:
    m.poly([(-13, 0), (-8, -14), (9, -14), (16, 0)], 255)
    m.box(-21, -3, 21, 15, 255, 4)
    for x in (-12, 12):
        m.oval(x, 14.5, 5.6, 5.6, 255)


def _car_face(c: Pen, p: Paint) -> None:
    c.poly([(-10, -2.4), (-6.4, -11.6), (-0.8, -11.6), (-0.8, -2.4)], p.detail)
    c.poly([(1.4, -2.4), (1.4, -11.6), (8, -11.6), (12.6, -2.4)], p.detail)
    c.box(-20.6, 12, 20.6, 15, p.detail, 1.5)
    for x in (-12, 12):
        c.oval(x, 14.5, 5.6, 5.6, INK)
        c.oval(x, 14.5, 2.7, 2.7, (225, 225, 230))
    c.oval(-19, 2, 2, 2.2, (255, 240, 150))
    c.box(19, 0.5, 21, 4, (200, 30, 30))


def _fish(m: Pen) -> None:
    m.poly([(9, 3), (21, -9), (18, 3), (21, 15)], 255)
    m.poly([(-2, -8), (7, -17), (11, -2)], 255)
    m.poly([(-3, 13), (5, 20), (7, 11)], 255)
    m.oval(-3, 3, 16, 12.5, 255)


def _fish_face(c: Pen, p: Paint) -> None:
    c.arc(-11, 3, 9, 11, -60, 60, 1.1, p.dark)
    c.poly([(2, 4), (10, 1), (9, 9)], p.dark)
    for y in (-4, 3, 10):
        c.stroke([(15, y * 0.8 + 0.6), (19, y + (y - 3) * 0.4)], 0.9, p.dark)
    _eye(c, -10, 0.4, 4.8, p)
    c.arc(-16, 6.5, 4, 3, 20, 150, 1.2, INK)


@dataclass(frozen=True)
class Shape:
    """How a superclass is drawn (`silhouette`, `features`) and where worn things and supports go."""

    silhouette: Callable[[Pen], None]
    features: Callable[[Pen, Paint], None]
    top: Point  # where a hat or crown rests
    head: float  # half width of the head there
    neck: tuple[Point, Point]  # ends of the band of a scarf
    eyes: tuple[Point, ...]  # lenses of sunglasses
    half: float  # half width of the whole, for what it stands in


SHAPES: dict[str, Shape] = {
    "cat": Shape(_cat, _cat_face, (0, -13), 10, ((-8, 4.6), (8, 4.6)), ((-6, -6), (6, -6)), 15),
    "dog": Shape(_dog, _dog_face, (0, -16), 9, ((-8, 5.4), (8, 5.4)), ((-5, -9), (5, -9)), 15),
    "bird": Shape(_bird, _bird_face, (-5.5, -15.5), 8, ((-9.5, 0), (4, -2.5)), ((-8.5, -9.5),), 17),
    "teddy": Shape(_teddy, _teddy_face, (0, -15.5), 9.5, ((-8.5, 3), (8.5, 3)), ((-5.4, -9), (5.4, -9)), 15),
    "robot": Shape(_robot, _robot_face, (0, -15), 10, ((-8.5, 2), (8.5, 2)), ((-5.3, -9), (5.3, -9)), 15),
    "rabbit": Shape(_rabbit, _rabbit_face, (0, -9), 8.5, ((-8, 7), (8, 7)), ((-5.2, -3.6), (5.2, -3.6)), 13),
    "mug": Shape(_mug, _mug_face, (-2.5, -13), 10.5, ((-13, 3), (8, 3)), ((-7.5, -3), (2.5, -3)), 17),
    "teapot": Shape(_teapot, _teapot_face, (0, -9), 8.5, ((-9, -3), (9, -3)), ((-5.5, 4), (5.5, 4)), 19),
    "car": Shape(_car, _car_face, (0.5, -12.5), 9, ((-17, 0), (17, 0)), ((-5.5, -6), (5, -6)), 21),
    "fish": Shape(_fish, _fish_face, (-8, -9), 7.5, ((-1, -7.5), (-1, 13.5)), ((-10.5, 0.4),), 19),
}
