"""What exists in Toyland (attributes, instances, scenes) and how scenes are sampled from a seed."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import Any, TypeVar

import numpy as np

WORLD_VERSION = 2

SUPERCLASSES = ("cat", "dog", "bird", "teddy", "robot", "rabbit", "mug", "teapot", "car", "fish")
LIVING = frozenset({"cat", "dog", "bird", "teddy", "robot", "rabbit", "fish"})  # have eyes; the others have trims
COLOURS: dict[str, tuple[int, int, int]] = {
    "red": (222, 32, 38),
    "orange": (250, 136, 20),
    "yellow": (252, 222, 40),
    "green": (38, 174, 66),
    "blue": (36, 84, 226),
    "purple": (138, 48, 196),
    "pink": (255, 132, 190),
    "white": (250, 250, 250),
    "brown": (122, 70, 34),
    "gray": (136, 142, 150),
}
DETAILS: dict[str, tuple[int, int, int]] = {
    "black": (20, 20, 24),
    "blue": (30, 110, 240),
    "green": (20, 160, 60),
    "red": (225, 25, 35),
}
PATTERNS = ("plain", "striped", "spotted", "patched")
WORN = ("none", "hat", "crown", "scarf", "sunglasses")
SUPPORTS = ("none", "skateboard", "boat", "box")
PLACES = ("plain", "beach", "snow", "forest", "desert", "night", "city", "meadow", "kitchen")
STYLES = ("photo", "sketch", "mosaic")
RELATIONS = ("and", "next to")
CROPS = 3  # of the one picture of each place
# What no caption says hardly varies: a single object stands at one of two places, two always at the same.
ALONE, PAIRED = (28.0, 36.0), (16.0, 48.0)

# (superclass, place) and (superclass, worn) pairs that no training caption names, to measure composition later.
HELD_OUT = frozenset({
    ("robot", "beach"), ("fish", "desert"), ("cat", "snow"), ("teapot", "forest"),
    ("car", "scarf"), ("rabbit", "crown"), ("mug", "sunglasses"), ("dog", "hat"),
})  # fmt: skip

T = TypeVar("T")


@dataclass(frozen=True)
class Instance:
    """One individual toy: everything that makes it the same toy in every picture."""

    superclass: str
    body: str
    second: str  # colour of the pattern; differs from body; not visible when the pattern is plain
    pattern: str
    detail: str  # eye colour of living things; colour of the others' trim (rim, knob, windows)


@dataclass(frozen=True)
class Placed:
    """An instance in a scene: what it wears, stands on or in, and where it is."""

    instance: Instance
    worn: str
    support: str
    x: float  # centre in pixels
    y: float  # baseline (where it meets the ground) in pixels
    scale: float


@dataclass(frozen=True)
class Scene:
    """Everything `draw.render` needs; objects are drawn first to last and read left to right."""

    objects: tuple[Placed, ...]
    place: str
    style: str
    relation: str
    backdrop: int  # which crop of the place's picture, below CROPS


INSTANCE_FIELDS = frozenset(f.name for f in fields(Instance))
PLACED_FIELDS = frozenset(f.name for f in fields(Placed)) - {"instance"}
SCENE_FIELDS = frozenset(f.name for f in fields(Scene)) - {"objects"}


def pick(rng: np.random.Generator, options: Sequence[T]) -> T:
    """One of `options`, uniformly (much faster than Generator.choice on small tuples)."""
    return options[int(rng.integers(len(options)))]


def sample_instance(rng: np.random.Generator, superclass: str | None = None, **fixed: Any) -> Instance:
    """A random instance; `superclass` and any other Instance field may be fixed."""
    body = fixed.get("body") or pick(rng, tuple(c for c in COLOURS if c != fixed.get("second")))
    drawn: dict[str, Any] = {
        "superclass": superclass or pick(rng, SUPERCLASSES),
        "body": body,
        "second": pick(rng, tuple(c for c in COLOURS if c != body)),
        "pattern": pick(rng, PATTERNS),
        "detail": pick(rng, tuple(DETAILS)),
    }
    instance = Instance(**{**drawn, **fixed})
    if instance.second == instance.body:
        raise ValueError("an instance's second colour must differ from its body colour")
    return instance


def wears_held_out(placed: Placed) -> bool:
    """Whether the object forms a HELD_OUT pair with what it wears."""
    return (placed.instance.superclass, placed.worn) in HELD_OUT


def place_is_held_out(scene: Scene) -> bool:
    """Whether any object of the scene forms a HELD_OUT pair with its place."""
    return any((placed.instance.superclass, scene.place) in HELD_OUT for placed in scene.objects)


def is_held_out(scene: Scene) -> bool:
    """Whether the scene has a HELD_OUT pair: an object with its place or with what it wears."""
    return place_is_held_out(scene) or any(wears_held_out(placed) for placed in scene.objects)


def _allowed(options: Sequence[str], superclasses: Sequence[str], held_out: bool) -> tuple[str, ...]:
    if held_out:
        return tuple(options)
    return tuple(o for o in options if not any((s, o) in HELD_OUT for s in superclasses))


def sample_scene(
    seed: int, *, objects: int | Sequence[Instance] | None = None, held_out: bool = False, **fixed: Any
) -> Scene:
    """The scene of `seed`.

    objects: how many objects (1 or 2), or the instances to show; drawn at random when None.
    held_out: whether HELD_OUT pairs may occur; without it they never do, and fixing one raises ValueError.
    fixed: values for fields of Scene, or of Placed or Instance (then for every object of the scene).
    """
    unknown = set(fixed) - INSTANCE_FIELDS - PLACED_FIELDS - SCENE_FIELDS
    if unknown:
        raise TypeError(f"unknown scene fields: {sorted(unknown)}")
    rng = np.random.default_rng(seed)
    backdrop = int(rng.integers(CROPS))
    if objects is None or isinstance(objects, int):
        drawn_count = 2 if rng.random() < 0.18 else 1
        instances: list[Instance] = []
        of_instance = {k: v for k, v in fixed.items() if k in INSTANCE_FIELDS and k != "superclass"}
        for _ in range(objects or drawn_count):
            # Two objects are of two superclasses, so that each noun of a caption names one of them only.
            rest = [s for s in SUPERCLASSES if all(s != i.superclass for i in instances)]
            instances.append(sample_instance(rng, fixed.get("superclass") or pick(rng, rest), **of_instance))
    else:
        if set(fixed) & INSTANCE_FIELDS:
            raise TypeError("instance fields cannot be fixed when the instances are given")
        instances = list(objects)
    if not 1 <= len(instances) <= 2:
        raise ValueError("a scene has one or two objects")
    kinds = [i.superclass for i in instances]
    style_roll = rng.random()
    scene_fields: dict[str, Any] = {
        "place": pick(rng, _allowed(PLACES, kinds, held_out)),
        "style": "photo" if style_roll < 0.7 else "sketch" if style_roll < 0.85 else "mosaic",
        "relation": pick(rng, RELATIONS),
        "backdrop": backdrop,
    }
    scene_fields |= {k: v for k, v in fixed.items() if k in SCENE_FIELDS}
    # Pairs carry a little less each, so that captions within the word limit can still name most of it.
    worn_p, support_p = (0.35, 0.30) if len(instances) == 1 else (0.25, 0.2)
    placed = []
    for index, instance in enumerate(instances):
        worn = pick(rng, _allowed(WORN[1:], [instance.superclass], held_out))
        support = pick(rng, SUPPORTS[1:])
        values: dict[str, Any] = {
            "worn": worn if rng.random() < worn_p else "none",
            "support": support if rng.random() < support_p else "none",
        }
        if len(instances) == 1:
            values |= {"x": pick(rng, ALONE), "y": 60.0, "scale": 1.22}
        else:
            values |= {"x": PAIRED[index], "y": 58.0, "scale": 0.78}
        values |= {k: v for k, v in fixed.items() if k in PLACED_FIELDS}
        placed.append(Placed(instance=instance, **values))
    scene = Scene(objects=tuple(placed), **scene_fields)
    if not held_out and is_held_out(scene):
        raise ValueError("the fixed values form a held-out pair; pass held_out=True to allow it")
    return scene


def concept_scene(
    instance: Instance, seed: int, place: str = "plain", style: str = "photo", worn: str = "none", support: str = "none"
) -> Scene:
    """One picture of a given instance: where it stands and the backdrop's crop vary with the seed, it does not.

    Held-out pairs are allowed here.
    """
    fixed = {"place": place, "style": style, "worn": worn, "support": support}
    return sample_scene(seed, objects=(instance,), held_out=True, **fixed)
