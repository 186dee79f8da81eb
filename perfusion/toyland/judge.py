"""Is it this toy, and is the rest as the prompt says: scores of pictures whose every attribute is known.

The prompt is read with the superclass in the concept's place. Objects are found by their superclass, so that it does
not matter which one stands on the left.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import permutations

from PIL import Image

from perfusion.toyland.captions import asked, parse
from perfusion.toyland.reader import HEADS, NOT_SHOWN, Reader, as_options, as_pixels, labels
from perfusion.toyland.world import Instance, concept_scene

LOOKS = ("body", "second", "pattern", "detail")  # what makes a toy an individual
_SCENE = ("place", "objects", "style")
_ALONE = {"objects": "one", "style": "photo"}  # what a prompt asks for that asks for nothing


@dataclass(frozen=True)
class Wish:
    """What one picture should show.

    Attributes:
        text: the prompt with superclasses in the places of concepts.
        toys: the concepts in it that Toyland draws, by their superclass.
    """

    text: str
    toys: Mapping[str, Instance]


def judge(reader: Reader, images: Sequence[Image.Image], wishes: Sequence[Wish]) -> list[dict[str, float]]:
    """Scores of each picture, all shares in [0, 1].

    `identity`: of the looks of each toy that can be seen in such a scene, those that are right; looks that the prompt
    changes ("a red <cat*>") belong to the prompt. `prompt`: of what the prompt asks for beside the toys themselves; it
    is left out where a prompt asks for nothing ("a photo of a <cat*>"). `superclass`: of the toys, those in whose place
    a thing of their superclass is read. Where no toy is known there is `prompt` alone, which then counts superclasses.

    Raises:
        CaptionError: a prompt that names no superclass of Toyland, or more than two.
    """
    shown = as_options(reader.read(as_pixels(images)))
    return [_scores(shown_here, wish) for shown_here, wish in zip(shown, wishes, strict=True)]


def _scores(shown: Mapping[str, str], wish: Wish) -> dict[str, float]:
    caption = parse(wish.text)
    wanted = asked(caption)
    kinds = [wanted[f"object{k}_superclass"] for k in range(len(caption.nouns))]
    place = _places(shown, kinds)
    right: dict[str, list[bool]] = {"identity": [], "prompt": [], "superclass": []}
    for name in _SCENE:
        if name in wanted and wanted[name] != _ALONE.get(name):
            right["prompt"].append(shown[name] == wanted[name])
    for k, kind in enumerate(kinds):
        mine = {head.partition("_")[2]: value for head, value in wanted.items() if head.startswith(f"object{k}_")}
        seen = {head: None if place[k] is None else shown[f"object{place[k]}_{head}"] for head in _object_heads()}
        if kind in wish.toys:
            right["superclass"].append(seen["superclass"] == mine.pop("superclass"))
            looks = _visible(wish.toys[kind], wanted, mine)
            right["identity"] += [seen[name] == look for name, look in looks.items() if name not in mine]
        right["prompt"] += [seen[name] == value for name, value in mine.items()]
    return {name: sum(hits) / len(hits) for name, hits in right.items() if hits}


def _places(shown: Mapping[str, str], kinds: Sequence[str]) -> list[int | None]:
    """Which object of the picture stands for each of the prompt's: the order in which most superclasses are right; of
    equal ones that of the prompt. None: the picture has no object left for it."""
    count = 1 if shown["objects"] == "one" else 2
    slots: list[int | None] = [*range(count), *[None] * (len(kinds) - count)]
    orders = dict.fromkeys(order[: len(kinds)] for order in permutations(slots))

    def hits(order: Sequence[int | None]) -> int:
        return sum(
            k is not None and shown[f"object{k}_superclass"] == kind for k, kind in zip(order, kinds, strict=True)
        )

    return list(max(orders, key=hits))


def _visible(instance: Instance, wanted: Mapping[str, str], mine: Mapping[str, str]) -> dict[str, str]:
    """Those of a toy's looks that a picture of it with these things can show."""
    scene = concept_scene(
        instance,
        seed=0,
        style=wanted["style"],
        worn=mine.get("worn", "none"),
        support=mine.get("support", "none"),
    )
    right = labels(scene)
    heads = {name: f"object0_{name}" for name in LOOKS}
    return {name: HEADS[head][right[head]] for name, head in heads.items() if right[head] != NOT_SHOWN}


def _object_heads() -> list[str]:
    return [name.partition("_")[2] for name in HEADS if name.startswith("object0_")]
