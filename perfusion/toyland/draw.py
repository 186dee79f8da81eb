"""Renders a scene: backdrop, objects with their patterns, what they wear and stand on, and the picture's style."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from PIL import Image, ImageChops

from perfusion.toyland.backdrops import FULL, SIZE, backdrop
from perfusion.toyland.pen import INK, RGB, SUPERSAMPLE, Pen
from perfusion.toyland.props import LIFT, draw_behind, draw_front, draw_worn
from perfusion.toyland.shapes import SHAPES
from perfusion.toyland.world import COLOURS, Placed, Scene

TILE = 4
_GROUT = np.ones((SIZE, SIZE, 1), dtype=np.float32)
_GROUT[TILE - 1 :: TILE] = 0.74
_GROUT[:, TILE - 1 :: TILE] = 0.74
# In an object's own units, of which a latent cell is 6.6: stripes and spots are nearly as large, and most of the body
# keeps its colour.
_STRIPES = (-15.0, 1.5, 14.0)
_SPOTS = ((-11, -15), (11, -14), (0, -1), (-13, 3), (13, 3), (-6, 11), (7, 12), (0, 19), (-17, 13), (18, 12), (0, -22))


@dataclass(frozen=True)
class Rendered:
    """image: uint8 (64, 64, 3). masks: uint8 (n_objects, 64, 64), 0..255 coverage of each object's visible pixels.

    Masks hold the object itself (ears, tail, handle and face included), not what it wears or stands on or in.
    """

    image: np.ndarray
    masks: np.ndarray


def _draw_pattern(pen: Pen, pattern: str) -> None:
    if pattern == "striped":
        for y in _STRIPES:
            pen.poly(255, [(-26, y - 1), (26, y - 4.5), (26, y + 1), (-26, y + 4.5)])
    elif pattern == "spotted":
        for x, y in _SPOTS:
            pen.oval(255, x, y, 3.9, 3.9)
    elif pattern == "patched":
        pen.poly(255, [(2, -30), (26, -30), (26, 1), (12, 3), (2, -2)])
        pen.oval(255, -6, 13, 7, 6)


def _rim(mask: Image.Image, box: tuple[int, int, int, int]) -> Image.Image:
    """The silhouette within `box`, one supersampled pixel larger: in ink, it parts every colour from every backdrop."""
    x0, y0, x1, y1 = box
    rim = mask.crop(box)
    for dx, dy in ((-1, 0), (1, 0), (0, -1), (0, 1)):
        rim = ImageChops.lighter(rim, mask.crop((x0 + dx, y0 + dy, x1 + dx, y1 + dy)))
    return rim


def _draw_object(canvas: Image.Image, placed: Placed, masks: list[Image.Image], shadow: RGB) -> None:
    """Paint one object on the canvas and append its mask to `masks`; what it hides is taken out of all masks."""
    instance = placed.instance
    shape = SHAPES[instance.superclass]
    y = placed.y - (20 + LIFT[placed.support]) * placed.scale
    pose = (placed.x, y, placed.scale)
    half = max(15.0, shape.half + 1)
    Pen(canvas, placed.x, placed.y, placed.scale).oval(shadow, 0, 0, half + 3, 3)
    draw_behind(Pen(canvas, *pose, masks), placed.support, half)

    mask = Image.new("L", (FULL, FULL))
    shape.draw_silhouette(Pen(mask, *pose))
    x0, y0, x1, y1 = mask.getbbox() or (0, 0, 1, 1)
    # Pasting dominates the time of a scene, so it is done within the object's box only, with room for the rim.
    box = (max(x0 - 1, 0), max(y0 - 1, 0), min(x1 + 1, FULL), min(y1 + 1, FULL))
    body = mask.crop(box)
    canvas.paste(INK, box, _rim(mask, box))
    canvas.paste(COLOURS[instance.body], box, body)
    if instance.pattern != "plain":
        marks = Image.new("L", body.size)
        at = (placed.x - box[0] / SUPERSAMPLE, y - box[1] / SUPERSAMPLE, placed.scale)
        _draw_pattern(Pen(marks, *at), instance.pattern)
        canvas.paste(COLOURS[instance.second], box, ImageChops.multiply(body, marks))
    for index, other in enumerate(masks):
        masks[index] = ImageChops.subtract(other, mask)
    shape.draw_features(Pen(canvas, *pose), instance)

    masks.append(mask)
    in_front = Pen(canvas, *pose, masks)
    draw_worn(in_front, placed.worn, shape)
    draw_front(in_front, placed.support, half)  # last: a scarf hangs inside a boat or a box, not over its side


def _sketch(image: np.ndarray, inside: np.ndarray) -> np.ndarray:
    """Pencil on white paper: dark edges, a pale tint, a little stronger where `inside` (0..1) is set."""
    x = image.astype(np.int16)
    edge = np.zeros((SIZE, SIZE), dtype=np.float32)
    edge[:, :-1] += np.abs(x[:, 1:] - x[:, :-1]).max(axis=2)
    edge[:-1] += np.abs(x[1:] - x[:-1]).max(axis=2)
    # Fainter lines around the object leave it the strongest thing on the sheet.
    ink = (np.clip((edge - 24) / 150, 0, 0.85) * (0.6 + 0.4 * inside))[..., None]
    tint = (0.14 + 0.36 * inside)[..., None]
    paper = 252 * (1 - tint) + image * tint
    return paper * (1 - ink) + 40 * ink


def _mosaic(image: np.ndarray) -> np.ndarray:
    """Square tiles of the mean colour, with darker grout between them."""
    n = SIZE // TILE
    tiles = image.reshape(n, TILE, n, TILE, 3).mean(axis=(1, 3), dtype=np.float32)
    return tiles.repeat(TILE, axis=0).repeat(TILE, axis=1) * _GROUT


def render(scene: Scene) -> Rendered:
    """Draw the scene at twice the size and reduce it; the same scene always gives the same pixels."""
    canvas, shadow = backdrop(scene.place, scene.backdrop)
    masks: list[Image.Image] = []
    for placed in scene.objects:
        _draw_object(canvas, placed, masks, shadow)
    image = np.asarray(canvas.reduce(SUPERSAMPLE))
    small = np.stack([np.asarray(m.reduce(SUPERSAMPLE)) for m in masks])
    if scene.style == "sketch":
        image = _sketch(image, small.max(axis=0).astype(np.float32) / 255)
    elif scene.style == "mosaic":
        image = _mosaic(image)
    return Rendered(np.clip(image, 0, 255).astype(np.uint8), small)
