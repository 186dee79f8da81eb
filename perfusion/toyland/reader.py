"""The attribute reader: says what a Toyland picture shows, attribute by attribute, so that pictures can be counted; and
the scores that follow: is it this toy, and is the rest as the prompt says?

A prompt is read with the superclass in the concept's place. Objects are found by their superclass, so that it does not
matter which one stands on the left.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise, permutations
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from safetensors.torch import load_file, save
from torch import Tensor, nn

from perfusion.files import atomic_write_bytes, atomic_write_text
from perfusion.toyland.captions import asked, parse
from perfusion.toyland.models import IMAGE_SIZE
from perfusion.toyland.world import (
    COLOURS,
    DETAILS,
    LIVING,
    PATTERNS,
    PLACES,
    STYLES,
    SUPERCLASSES,
    SUPPORTS,
    WORLD_VERSION,
    WORN,
    Instance,
    Placed,
    Scene,
)

OBJECTS = 2
SCENE_HEADS: dict[str, tuple[str, ...]] = {"objects": ("one", "two"), "place": PLACES, "style": STYLES}
OBJECT_HEADS: dict[str, tuple[str, ...]] = {
    "superclass": SUPERCLASSES,
    "body": tuple(COLOURS),
    "second": tuple(COLOURS),
    "pattern": PATTERNS,
    "detail": tuple(DETAILS),
    "worn": WORN,
    "support": SUPPORTS,
}
# Objects are numbered from left to right: object0_superclass, ..., object1_support.
HEADS: dict[str, tuple[str, ...]] = SCENE_HEADS | {
    f"object{i}_{name}": options for i in range(OBJECTS) for name, options in OBJECT_HEADS.items()
}
NOT_SHOWN = -1  # label of what cannot be seen: the second colour of a plain toy, eyes behind sunglasses
_CHANNELS = (32, 64, 128, 128)
_HIDDEN = 256
_WEIGHTS, _CONFIG = "reader.safetensors", "reader.json"


class _Block(nn.Module):
    """Halves the side, then adds two convolutions to it."""

    def __init__(self, inside: int, outside: int) -> None:
        super().__init__()
        self.down = nn.Conv2d(inside, outside, 4, 2, 1)
        self.body = nn.Sequential(
            nn.GroupNorm(8, outside),
            nn.SiLU(),
            nn.Conv2d(outside, outside, 3, padding=1),
            nn.GroupNorm(8, outside),
            nn.SiLU(),
            nn.Conv2d(outside, outside, 3, padding=1),
        )

    def forward(self, x: Tensor) -> Tensor:
        x = self.down(x)
        return x + self.body(x)


class Reader(nn.Module):
    """A small residual network with one linear head per attribute and object."""

    def __init__(self) -> None:
        super().__init__()
        channels = (3, *_CHANNELS)
        side = IMAGE_SIZE >> len(_CHANNELS)
        self.trunk = nn.Sequential(
            *(_Block(a, b) for a, b in pairwise(channels)),
            nn.GroupNorm(8, channels[-1]),
            nn.SiLU(),
            nn.Flatten(),
            nn.Linear(channels[-1] * side**2, _HIDDEN),
            nn.SiLU(),
        )
        self.heads = nn.ModuleDict({name: nn.Linear(_HIDDEN, len(options)) for name, options in HEADS.items()})

    def forward(self, pixels: Tensor) -> dict[str, Tensor]:
        """(B, 3, 64, 64) in [-1, 1] to logits (B, options) for each head."""
        features = self.trunk(pixels)
        return {name: head(features) for name, head in self.heads.items()}

    @torch.no_grad()
    def read(self, pixels: Tensor) -> dict[str, Tensor]:
        """(B, 3, 64, 64) in [-1, 1] to the index (B,) of the likeliest option for each head."""
        parts = [self(part) for part in pixels.split(256)]
        return {name: torch.cat([part[name].argmax(1) for part in parts]) for name in HEADS}

    @classmethod
    def load(cls, folder: Path) -> Reader:
        """The reader that `save` wrote, in float32 and eval mode.

        Raises:
            ValueError: it was trained for another world, other attributes or options.
        """
        known = json.loads((folder / _CONFIG).read_text())
        if known["world_version"] != WORLD_VERSION:
            found = f"found world {known['world_version']}, expected world {WORLD_VERSION}"
            raise ValueError(f"{folder / _CONFIG}: {found}")
        expected = {name: list(options) for name, options in HEADS.items()}
        if known["heads"] != expected:
            differing = sorted(n for n in {*known["heads"], *expected} if known["heads"].get(n) != expected.get(n))
            raise ValueError(f"{folder / _CONFIG}: its heads {differing} are not those of world {WORLD_VERSION}")
        reader = cls()
        reader.load_state_dict({name: value.float() for name, value in load_file(folder / _WEIGHTS).items()})
        return reader.eval().requires_grad_(False)

    def save(self, folder: Path) -> None:
        """Weights in float16, and the heads with their options beside them."""
        folder.mkdir(parents=True, exist_ok=True)
        state = {name: value.half().contiguous() for name, value in self.state_dict().items()}
        atomic_write_bytes(folder / _WEIGHTS, save(state))
        config = {"world_version": WORLD_VERSION, "heads": HEADS}
        atomic_write_text(folder / _CONFIG, json.dumps(config, indent=1) + "\n")


def labels(options: Mapping[str, str]) -> dict[str, int]:
    """The option's index for each head, NOT_SHOWN for heads that are not in `options`."""
    return {name: known.index(options[name]) if name in options else NOT_SHOWN for name, known in HEADS.items()}


def shown(scene: Scene) -> dict[str, str]:
    """What a picture of the scene shows: the right option for each head, without those that cannot be seen."""
    options = {"objects": SCENE_HEADS["objects"][len(scene.objects) - 1], "place": scene.place, "style": scene.style}
    for i, placed in enumerate(scene.objects):
        options |= {f"object{i}_{name}": option for name, option in visible(placed, scene.style).items()}
    return options


def visible(placed: Placed, style: str) -> dict[str, str]:
    """What can be seen of an object, by the names of OBJECT_HEADS."""
    instance = placed.instance
    found = {name: getattr(instance, name) for name in ("superclass", "body", "pattern")}
    found |= {"worn": placed.worn, "support": placed.support}
    if instance.pattern != "plain":
        found["second"] = instance.second
    # Sunglasses hide eyes, and a mosaic's tiles are larger than they are.
    if style != "mosaic" and not (instance.superclass in LIVING and placed.worn == "sunglasses"):
        found["detail"] = instance.detail
    return found


def label_tensors(pictures: Iterable[Mapping[str, str]]) -> dict[str, Tensor]:
    """`labels` of what each of n pictures shows, or should show, as int64 (n,) for each head."""
    rows = [labels(options) for options in pictures]
    return {name: torch.tensor([row[name] for row in rows]) for name in HEADS}


def as_options(read: Mapping[str, Tensor]) -> list[dict[str, str]]:
    """What `Reader.read` says of each of n pictures, as the options' names for each head."""
    names = {name: [HEADS[name][int(k)] for k in index] for name, index in read.items()}
    return [dict(zip(names, row, strict=True)) for row in zip(*names.values(), strict=True)]


def accuracy(read: Mapping[str, Tensor], right: Mapping[str, Tensor]) -> dict[str, float]:
    """Share of right answers for each attribute, over the objects that show it; NaN where none does."""
    result = {}
    for name in (*SCENE_HEADS, *OBJECT_HEADS):
        heads = [name] if name in SCENE_HEADS else [f"object{i}_{name}" for i in range(OBJECTS)]
        pairs = [(read[head] == right[head])[right[head] != NOT_SHOWN] for head in heads]
        result[name] = float(torch.cat(pairs).float().mean())
    return result


def as_pixels(images: Sequence[Image.Image]) -> Tensor:
    """RGB pictures of any size to (n, 3, 64, 64) in [-1, 1]."""
    small = [image.convert("RGB").resize((IMAGE_SIZE, IMAGE_SIZE), Image.Resampling.BOX) for image in images]
    return torch.from_numpy(np.stack([np.asarray(s) for s in small])).permute(0, 3, 1, 2).float() / 127.5 - 1


# --- scores -----------------------------------------------------------------------------------------------------------

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
        seen = {head: None if place[k] is None else shown[f"object{place[k]}_{head}"] for head in OBJECT_HEADS}
        if kind in wish.toys:
            right["superclass"].append(seen["superclass"] == mine.pop("superclass"))
            toy = Placed(wish.toys[kind], mine.get("worn", "none"), mine.get("support", "none"), x=0, y=0, scale=1)
            looks = visible(toy, wanted["style"])
            right["identity"] += [seen[name] == looks[name] for name in LOOKS if name in looks and name not in mine]
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
