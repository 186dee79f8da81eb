"""The ten superclasses as shapes.yaml draws them: silhouettes, features, and the points where things are worn."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from perfusion.toyland.pen import INK, RGB, WHITE, Pen, Point, mix
from perfusion.toyland.world import COLOURS, DETAILS, Instance

# What is called on a pen (`oval`, ...) and with what; of features, the colour's name comes first.
Marks = Sequence[tuple[str, Sequence[Any]]]


@dataclass(frozen=True)
class Shape:
    """How a superclass is drawn (`silhouette`, `features`) and where worn things and supports go; see shapes.yaml."""

    silhouette: Marks
    features: Marks
    top: Point
    head: float
    neck: tuple[Point, Point]
    eyes: tuple[Point, ...]
    half: float

    def draw_silhouette(self, pen: Pen) -> None:
        for kind, where in self.silhouette:
            getattr(pen, kind)(255, *where)

    def draw_features(self, pen: Pen, instance: Instance) -> None:
        colours = _colours(instance)
        for kind, (colour, *where) in self.features:
            getattr(pen, kind)(colours.get(colour, colour), *where)


def _colours(instance: Instance) -> Mapping[str, RGB]:
    """The colours that have a name in shapes.yaml."""
    body = COLOURS[instance.body]
    return {
        "white": WHITE,
        "ink": INK,
        "rose": (240, 120, 140),
        "dark": mix(body, INK, 0.32),
        "pale": mix(body, WHITE, 0.62) if instance.body != "white" else (214, 210, 214),
        "detail": DETAILS[instance.detail],
        "beak": (196, 60, 40) if instance.body in ("orange", "yellow") else (255, 168, 24),
    }


def _marks(lines: Sequence[Sequence[Any]]) -> Iterator[tuple[str, Sequence[Any]]]:
    """Lines of shapes.yaml, with `both` and `eye` spelled out."""
    for kind, *given in lines:
        if kind.startswith("both "):
            kind = kind.removeprefix("both ")
            yield from _marks([[kind, *_mirrored(kind, given)], [kind, *given]])
        elif kind == "eye":
            x, y, r = given
            yield "oval", ("white", x, y, r, r)
            yield "oval", ("detail", x, y + 0.1, r * 0.82, r * 0.82)
            yield "oval", ("white", x - r * 0.25, y - r * 0.3, r * 0.2, r * 0.2)
        else:
            yield kind, given


def _mirrored(kind: str, given: Sequence[Any]) -> Sequence[Any]:
    first, *rest = given
    if isinstance(first, str):
        return [first, *_mirrored(kind, rest)]
    if kind == "box":
        x0, y0, x1, *rest = given
        return [-x1, y0, -x0, *rest]
    return [[(-x, y) for x, y in first] if isinstance(first, list) else -first, *rest]


def _shape(silhouette: Sequence[Sequence[Any]], features: Sequence[Sequence[Any]], **points: Any) -> Shape:
    return Shape(tuple(_marks(silhouette)), tuple(_marks(features)), **points)


SHAPES: dict[str, Shape] = {
    name: _shape(**known)
    for name, known in yaml.safe_load(Path(__file__).with_name("shapes.yaml").read_text(encoding="utf-8")).items()
}
