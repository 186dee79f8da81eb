"""What the paper's claims are tried on: which toys, which prompts, which seeds. Nothing here was chosen by a result.

Tables and tuning share no toy, no prompt and no seed. No prompt asks for a pair that Toyland's training left out
(`world.HELD_OUT`): a base model that cannot draw a cat in the snow would say nothing about a method.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from perfusion.data.prompts import fill
from perfusion.toyland.captions import asked, described, parse
from perfusion.toyland.world import HELD_OUT, SUPERCLASSES, Instance, sample_instance

Alternatives = tuple[str, ...]  # of one prompt: the first that a toy allows is used


@dataclass(frozen=True)
class Toy:
    """One concept to learn."""

    superclass: str
    instance: int  # seed of its looks, as `concept.toyland.instance`

    @property
    def name(self) -> str:
        return f"{self.superclass}-{self.instance}"

    @property
    def placeholder(self) -> str:
        return f"<{self.superclass}*>"

    @property
    def looks(self) -> Instance:
        return sample_instance(np.random.default_rng(self.instance), self.superclass)

    @property
    def description(self) -> str:
        """All of its looks in words, before its noun: "green-eyed red striped blue cat"."""
        return described(self.looks)


def toys(superclasses: Sequence[str], first: int) -> tuple[Toy, ...]:
    """A toy of each superclass: seeds from `first` on, one after the other, without those of plain toys, which are
    little more than their colour."""
    found: list[Toy] = []
    seed = first
    for superclass in superclasses:
        while Toy(superclass, seed).looks.pattern == "plain":
            seed += 1
        found.append(Toy(superclass, seed))
        seed += 1
    return tuple(found)


TABLE_TOYS = toys(SUPERCLASSES * 4, first=100)  # what varies is the toy; experiments.md reckons how many it takes
TUNING_TOYS = toys((*SUPERCLASSES[8:], *SUPERCLASSES[:4]), first=200)

# Five places, three worn things, four things to be on or in, two styles, two pairs of objects.
TABLE_PROMPTS: tuple[Alternatives, ...] = (
    ("a photo of a {} on the beach", "a photo of a {} in the meadow"),
    ("a {} in the snow", "a {} in the kitchen"),
    ("a photo of a {} in the forest", "a photo of a {} in the kitchen"),
    ("a {} at night",),
    ("a photo of a {} in the city",),
    ("a {} wearing a hat", "a {} wearing a scarf"),
    ("a {} wearing a crown in the city", "a {} wearing a scarf in the city"),
    ("a {} wearing sunglasses in the desert", "a {} wearing a hat in the desert", "a {} wearing a hat in the meadow"),
    ("a {} on a skateboard",),
    ("a {} in a boat at night",),
    ("a photo of a {} in a box",),
    ("a {} on a skateboard in the city",),
    ("a sketch of a {}",),
    ("a mosaic of a {} in the forest", "a mosaic of a {} at night"),
    ("a photo of a {} and a dog", "a photo of a {} and a bird"),
    ("a {} next to a teddy on the beach", "a {} next to a teddy in the city", "a {} next to a mug on the beach"),
)
TUNING_PROMPTS: tuple[Alternatives, ...] = (
    ("a photo of a {} in the desert", "a picture of a {} in the meadow"),
    ("a picture of a {} on the beach",),
    ("a {} wearing a crown",),
    ("a {} wearing sunglasses at night",),
    ("a {} in a box in the forest",),
    ("a {} in a boat",),
    ("a sketch of a {} in the city",),
    ("a {} and a robot in the meadow",),
)
PAIR_PROMPTS: tuple[Alternatives, ...] = (
    ("a photo of a {} and a {}",),
    ("a {} and a {} on the beach", "a {} and a {} in the meadow"),
    ("a {} next to a {} in the snow", "a {} next to a {} in the desert"),
    ("a photo of a {} and a {} in the city",),
    ("a {} next to a {} at night",),
    ("a sketch of a {} and a {}",),
)
TABLE_SEEDS = (0,)
TUNING_SEEDS = (100,)
SCHEDULER = "DPMSolverMultistepScheduler"  # of diffusers, for all pictures


@dataclass(frozen=True)
class Protocol:
    """What is drawn of every setting.

    Attributes:
        steps: of DPM-Solver++, in bfloat16 where the machine is faster at it. Fewer than for a good picture are enough
            to count attributes: of 256 pictures of toys that were told in words, the reader finds identity 0.995 and
            prompt accuracy 0.996 after 12, and 0.994 and 0.996 after 50 steps of DDIM, which take 4 times as long.
        guidance: of classifier-free guidance, Toyland's own.
    """

    toys: tuple[Toy, ...] = TABLE_TOYS
    prompts: tuple[Alternatives, ...] = TABLE_PROMPTS
    pair_prompts: tuple[Alternatives, ...] = PAIR_PROMPTS
    seeds: tuple[int, ...] = TABLE_SEEDS
    steps: int = 12
    guidance: float = 4.0

    def seeds_of(self, times: int) -> tuple[int, ...]:
        """The seeds of an experiment that draws so many times as many pictures as others."""
        return tuple(range(self.seeds[0], self.seeds[0] + times * len(self.seeds)))

    @property
    def pairs(self) -> tuple[tuple[Toy, Toy], ...]:
        """Neighbours in the list of toys; each toy is in one pair at most."""
        return tuple(zip(self.toys[::2], self.toys[1::2], strict=False))

    def templates(self, *of: Toy) -> tuple[str, ...]:
        """The prompts of one toy, or of two together, with a `{}` for each."""
        asked_for = self.prompts if len(of) == 1 else self.pair_prompts
        kinds = [toy.superclass for toy in of]
        return tuple(choose(alternatives, *kinds) for alternatives in asked_for)


TUNING = Protocol(toys=TUNING_TOYS, prompts=TUNING_PROMPTS, seeds=TUNING_SEEDS)


def choose(alternatives: Alternatives, *superclasses: str) -> str:
    """The first of some templates that suits things of these superclasses."""
    return next(template for template in alternatives if suits(filled(template, *superclasses)))


def filled(template: str, *phrases: str) -> str:
    """`template` with phrases in the places of its `{}`, in their order."""
    for phrase in phrases[:-1]:
        template = template.replace("{}", phrase, 1)
    return fill(template, phrases[-1])


def suits(prompt: str) -> bool:
    """Whether Toyland's training had such scenes: every thing is of its own superclass, and no pair was left out."""
    caption = parse(prompt)
    wanted = asked(caption)
    kinds = [wanted[f"object{k}_superclass"] for k in range(len(caption.nouns))]
    beside = {
        (kind, value)
        for k, kind in enumerate(kinds)
        for value in (wanted.get("place"), wanted.get(f"object{k}_worn"))
        if value is not None
    }
    return len({*kinds}) == len(kinds) and not beside & HELD_OUT
