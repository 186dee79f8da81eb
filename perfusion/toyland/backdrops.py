"""The places of Toyland: static backdrops drawn once per variant and cropped at random."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache

import numpy as np
from PIL import Image, ImageDraw

from perfusion.toyland.pen import RGB, SUPERSAMPLE, mix

SIZE = 64
FULL = SIZE * SUPERSAMPLE
WIDE = FULL * 3 // 2  # extra width, so that one cached picture gives many crops
STEP = 2 * 8 * SUPERSAMPLE  # between crops: two latent cells, so that a place is the same few latents
HORIZON = 74  # in supersampled pixels
PASTELS: tuple[RGB, ...] = ((250, 232, 214), (222, 236, 250), (226, 244, 224))


def _beach(d: ImageDraw.ImageDraw, r: np.random.Generator) -> None:
    d.rectangle((0, 44, WIDE, HORIZON), fill=(24, 128, 206))
    for x in range(-10, WIDE, 24):
        d.ellipse((x, HORIZON - 6, x + 30, HORIZON + 8), fill=(240, 250, 255))
    d.rectangle((0, HORIZON + 2, WIDE, FULL), fill=(244, 218, 156))
    for x in (20, 116):
        x += int(r.integers(-14, 14))
        d.ellipse((x + 30, 6, x + 50, 26), fill=(255, 240, 120))
        d.line((x, 34, x, 96), fill=(250, 250, 250), width=3)
        d.pieslice((x - 26, 14, x + 26, 60), 180, 360, fill=(236, 70, 70))
        d.pieslice((x - 10, 14, x + 10, 60), 180, 360, fill=(255, 255, 255))


def _snow(d: ImageDraw.ImageDraw, r: np.random.Generator) -> None:
    for x in range(-10, WIDE, 34):
        x, h = x + int(r.integers(-8, 8)), int(r.integers(34, 54))
        for k, y in enumerate((HORIZON - h, HORIZON - h * 2 // 3, HORIZON - h // 3)):
            low, w = y + h // 3 + 4, 9 + 3 * k
            d.polygon([(x, y - 6), (x - w, low), (x + w, low)], fill=(44, 100, 96))
            d.polygon([(x, y - 6), (x - 5 - k, y + 8), (x + 5 + k, y + 8)], fill=(255, 255, 255))
    for x in range(-30, WIDE, 60):
        d.ellipse((x, HORIZON - 6, x + 90, HORIZON + 40), fill=(232, 242, 252))
    d.rectangle((0, HORIZON + 8, WIDE, FULL), fill=(232, 242, 252))
    for _ in range(34):
        x, y = int(r.integers(WIDE)), int(r.integers(FULL))
        d.ellipse((x, y, x + 4, y + 4), fill=(255, 255, 255))


def _forest(d: ImageDraw.ImageDraw, r: np.random.Generator) -> None:
    for x in range(-6, WIDE, 26):
        x, w = x + int(r.integers(-6, 6)), int(r.integers(7, 12))
        d.rectangle((x, 10, x + w, HORIZON + 8), fill=(84, 56, 36))
    for x in range(-20, WIDE, 18):
        x, y, s = x + int(r.integers(-6, 6)), int(r.integers(-14, 10)), int(r.integers(16, 24))
        d.ellipse((x - s, y - s, x + s, y + s), fill=((30, 84, 46), (44, 102, 54))[int(r.integers(2))])
    d.rectangle((0, HORIZON + 4, WIDE, FULL), fill=(72, 104, 58))
    for x in range(-10, WIDE, 22):
        d.ellipse((x, HORIZON - 8, x + 26, HORIZON + 14), fill=(38, 88, 46))


def _desert(d: ImageDraw.ImageDraw, r: np.random.Generator) -> None:
    x = int(r.integers(50, 140))
    d.ellipse((x - 14, 4, x + 14, 32), fill=(255, 250, 220))
    for x in range(-40, WIDE, 70):
        x += int(r.integers(-10, 10))
        d.polygon([(x, HORIZON + 8), (x + 46, HORIZON - 30), (x + 100, HORIZON + 8)], fill=(214, 130, 70))
    d.rectangle((0, HORIZON, WIDE, FULL), fill=(230, 160, 90))
    for x in (18, 84, 150):
        x, y, g = x + int(r.integers(-14, 14)), HORIZON + int(r.integers(2, 12)), (40, 122, 70)
        d.rounded_rectangle((x - 5, y - 48, x + 5, y), 5, fill=g)
        d.rounded_rectangle((x - 16, y - 36, x - 10, y - 18), 3, fill=g)
        d.rectangle((x - 14, y - 23, x, y - 18), fill=g)
        d.rounded_rectangle((x + 10, y - 42, x + 16, y - 24), 3, fill=g)
        d.rectangle((x, y - 29, x + 14, y - 24), fill=g)


def _night(d: ImageDraw.ImageDraw, r: np.random.Generator) -> None:
    for _ in range(26):
        x, y, s = int(r.integers(WIDE)), int(r.integers(HORIZON - 8)), int(r.integers(2, 5))
        d.ellipse((x, y, x + s, y + s), fill=(255, 246, 190))
    for x in (16, 116):
        x, y = x + int(r.integers(-10, 10)), int(r.integers(6, 16))
        d.ellipse((x, y, x + 26, y + 26), fill=(255, 240, 170))
        d.ellipse((x + 9, y - 4, x + 31, y + 20), fill=(28, 34, 84))
    for x in range(-40, WIDE, 60):
        d.ellipse((x, HORIZON - 12, x + 90, HORIZON + 40), fill=(34, 44, 70))
    d.rectangle((0, HORIZON + 4, WIDE, FULL), fill=(34, 44, 70))


def _city(d: ImageDraw.ImageDraw, r: np.random.Generator) -> None:
    x = -6
    while x < WIDE:
        w, h = int(r.integers(20, 32)), int(r.integers(36, 74))
        colour = ((112, 122, 150), (146, 116, 126), (96, 108, 124), (160, 146, 140))[int(r.integers(4))]
        d.rectangle((x, HORIZON + 6 - h, x + w, HORIZON + 8), fill=colour)
        for wy in range(HORIZON + 12 - h, HORIZON - 4, 11):
            for wx in range(x + 4, x + w - 5, 9):
                d.rectangle((wx, wy, wx + 4, wy + 5), fill=(255, 234, 150))
        x += w + 2
    d.rectangle((0, HORIZON + 8, WIDE, HORIZON + 14), fill=(186, 186, 192))
    d.rectangle((0, HORIZON + 14, WIDE, FULL), fill=(100, 102, 112))
    for x in range(int(r.integers(-20, 0)), WIDE, 34):
        d.rectangle((x, 106, x + 18, 110), fill=(246, 246, 246))


def _meadow(d: ImageDraw.ImageDraw, r: np.random.Generator) -> None:
    for x in (10, 80, 150):
        x, y = x + int(r.integers(-16, 16)), int(r.integers(8, 26))
        for dx in (0, 10, 20):
            d.ellipse((x + dx, y - (4 if dx == 10 else 0), x + dx + 18, y + 12), fill=(255, 255, 255))
    for x in range(-50, WIDE, 74):
        d.ellipse((x + int(r.integers(-8, 8)), HORIZON - 20, x + 110, HORIZON + 50), fill=(116, 190, 88))
    d.rectangle((0, HORIZON + 6, WIDE, FULL), fill=(142, 210, 100))
    for _ in range(30):
        x, y = int(r.integers(WIDE)), int(r.integers(HORIZON + 8, FULL - 4))
        colour = ((255, 255, 255), (255, 236, 90), (250, 130, 170))[int(r.integers(3))]
        d.ellipse((x, y, x + 6, y + 6), fill=colour)


def _kitchen(d: ImageDraw.ImageDraw, r: np.random.Generator) -> None:
    for x in range(0, WIDE, 16):
        d.line((x, 0, x, HORIZON + 10), fill=(240, 248, 246), width=2)
    for y in range(0, HORIZON + 10, 16):
        d.line((0, y, WIDE, y), fill=(240, 248, 246), width=2)
    for x in (0, 100):
        x += int(r.integers(-10, 20))
        d.rectangle((x, 12, x + 44, 46), fill=(250, 250, 250))
        d.rectangle((x + 4, 16, x + 40, 42), fill=(140, 206, 248))
        d.rectangle((x + 20, 14, x + 23, 44), fill=(250, 250, 250))
        d.rectangle((x + 50, 10, x + 88, 14), fill=(120, 78, 46))
        for k, colour in enumerate(((222, 110, 80), (90, 130, 180), (236, 190, 80))):
            d.line((x + 56 + 12 * k, 14, x + 56 + 12 * k, 24), fill=(90, 90, 96), width=2)
            d.ellipse((x + 51 + 12 * k, 22, x + 61 + 12 * k, 32), fill=colour)
    d.rectangle((0, HORIZON + 8, WIDE, FULL), fill=(190, 140, 96))
    d.rectangle((0, HORIZON + 8, WIDE, HORIZON + 13), fill=(146, 98, 62))


# What is behind all else, the painter of the rest, and the colour of shadows.
_PLACES: dict[str, tuple[RGB, Callable[[ImageDraw.ImageDraw, np.random.Generator], None], RGB]] = {
    "beach": ((150, 216, 250), _beach, (206, 176, 116)),
    "snow": ((148, 186, 222), _snow, (178, 200, 226)),
    "forest": ((120, 168, 116), _forest, (50, 78, 44)),
    "desert": ((254, 214, 150), _desert, (196, 128, 66)),
    "night": ((28, 34, 84), _night, (18, 22, 46)),
    "city": ((204, 212, 232), _city, (78, 80, 90)),
    "meadow": ((168, 222, 252), _meadow, (98, 158, 66)),
    "kitchen": ((188, 222, 214), _kitchen, (150, 104, 66)),
}


@cache
def _picture(place: str) -> Image.Image:
    behind, paint, _ = _PLACES[place]
    picture = Image.new("RGB", (WIDE, FULL), behind)
    paint(ImageDraw.Draw(picture), np.random.default_rng((7, 0)))
    return picture


def backdrop(place: str, crop: int) -> tuple[Image.Image, RGB]:
    """A fresh (128, 128) RGB picture of `place`, one of its `world.CROPS`, and the colour of shadows on its ground."""
    if place == "plain":
        base = PASTELS[crop]
        picture = Image.new("RGB", (FULL, FULL), base)
        picture.paste(mix(base, (120, 110, 120), 0.14), (0, HORIZON + 6, FULL, FULL))
        return picture, mix(base, (90, 84, 96), 0.4)
    return _picture(place).crop((crop * STEP, 0, crop * STEP + FULL, FULL)), _PLACES[place][2]
