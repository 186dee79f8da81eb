"""What counts as right in pictures of captions, given what the reader reads in them (`reader.as_options`)."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from itertools import permutations
from statistics import fmean

from perfusion.toyland.captions import Caption, asked
from perfusion.toyland.reader import LOOKS, OBJECTS, visible
from perfusion.toyland.world import LIVING, Scene

Options = Mapping[str, str]  # by head; what a caption asks for, or what a picture shows


def followed(asks: Options, shown: Options) -> dict[str, bool]:
    """For each attribute that a prompt asks for: whether the picture shows it."""
    return {name: shown[name] == option for name, option in asks.items()}


def hits_by_row(captions: Sequence[Caption], shown: Sequence[Options]) -> dict[str, list[bool]]:
    """Over the captions that ask for it, whether each picture shows it, by the names that the report gives them.

    Attributes are counted in captions of one object; `both superclasses` in those of two, whichever stands where;
    `colours bound` in those that give both objects a colour: each superclass is there with its own. `pattern` is
    striped, spotted and patched; `plain` is counted apart. `eyes` are the details of living things, which count in
    `detail` as well.
    """
    hits: dict[str, list[bool]] = {}
    for source, picture in zip(captions, shown, strict=True):
        asks = asked(source)
        if asks["objects"] == "two":
            found = _of_two(asks, picture)
        else:
            found = {row: right for name, right in followed(asks, picture).items() for row in _rows(name, asks)}
        for row, right in found.items():
            hits.setdefault(row, []).append(right)
    return hits


def _rows(head: str, asks: Options) -> tuple[str, ...]:
    """The rows that an attribute of a caption of one object counts in."""
    name = head.removeprefix("object0_")
    if name == "style":  # a photo is what is drawn unless something else is asked for
        return ("photo",) if asks["style"] == "photo" else ("sketch or mosaic",)
    if name == "pattern" and asks[head] == "plain":
        return ("plain",)
    if name == "detail" and asks["object0_superclass"] in LIVING:
        return ("detail", "eyes")
    return (name,)


def _of_two(asks: Options, shown: Options) -> dict[str, bool]:
    """Objects are found by their superclass, so that it does not matter which one stands on the left."""
    kinds, there = ([of[f"object{i}_superclass"] for i in range(OBJECTS)] for of in (asks, shown))
    both = Counter(kinds) == Counter(there) and shown["objects"] == "two"
    hits = {"both superclasses": both}
    colours = [asks.get(f"object{i}_body") for i in range(OBJECTS)]
    if None not in colours:
        seen = {kind: shown[f"object{i}_body"] for i, kind in enumerate(there)}
        hits["colours bound"] = both and all(seen[kind] == c for kind, c in zip(kinds, colours, strict=True))
    return hits


def share_right(asks: Options, shown: Options) -> float:
    """Share of what was asked that is read in a picture, its objects taken in the order that fits better."""

    def share(order: Sequence[int]) -> float:
        right = 0
        for name, option in asks.items():
            if name.startswith("object") and "_" in name:
                index, _, attribute = name.removeprefix("object").partition("_")
                name = f"object{order[int(index)]}_{attribute}"
            right += shown[name] == option
        return right / len(asks)

    orders = [range(OBJECTS)] if asks["objects"] == "one" else permutations(range(OBJECTS))
    return max(share(tuple(order)) for order in orders)


def identity_share(scene: Scene, shown: Options) -> float:
    """Share of what makes the first object of `scene` an individual, as far as it is to be seen in such a scene, that
    a picture shows."""
    own = visible(scene.objects[0], scene.style)
    return fmean(shown[f"object0_{name}"] == own[name] for name in LOOKS if name in own)
