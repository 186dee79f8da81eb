"""Words for scenes: captions over a small fixed vocabulary, with the positions of nouns and adjectives."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

import numpy as np

from perfusion.toyland.world import (
    COLOURS,
    DETAILS,
    HELD_OUT,
    LIVING,
    PATTERNS,
    SUPERCLASSES,
    SUPPORTS,
    WORN,
    Instance,
    Placed,
    Scene,
    pick,
    place_is_held_out,
    wears_held_out,
)

MAX_WORDS = 22  # two positions of the encoder are its marks of beginning and end
ARTICLES = ("a", "a", "a", "a", "a", "a", "the", "one", "my", "this")
PREFIXES: dict[str, tuple[str, ...]] = {
    "photo": ("a photo of", "a photo of", "a picture of", "an image of", "", ""),
    "sketch": ("a sketch of", "a sketch of", "a pencil drawing of", "a pencil sketch of"),
    "mosaic": ("a mosaic of", "a mosaic of", "a mosaic picture of"),
}
# Phrasings of common personalization templates; they say nothing about the scene, so they only go with photos.
NEUTRAL_PREFIXES = (
    "a good photo of", "a nice photo of", "a rendition of", "a depiction of", "an illustration of", "a painting of",
    "a close up photo of", "a cropped photo of", "a bright photo of", "a dark photo of", "a clean photo of",
    "a photo of",
)  # fmt: skip
NEUTRAL_ADJECTIVES = ("clean", "cool", "small", "large", "weird", "nice")
PLACE_PHRASES: dict[str, tuple[str, ...]] = {
    "plain": ("on a plain background",),
    "beach": ("on the beach", "at the beach"),
    "snow": ("in the snow",),
    "forest": ("in the forest",),
    "desert": ("in the desert",),
    "night": ("at night",),
    "city": ("in the city",),
    "meadow": ("in the meadow",),
    "kitchen": ("in the kitchen",),
}
WORN_PHRASES = ("wearing", "wearing", "in", "with")
SUPPORT_PHRASES = {"skateboard": "on a skateboard", "boat": "in a boat", "box": "in a box"}
COMPLETE = 0.75  # share of captions that say everything there is to say
_DETAILED = ("eyed", "trimmed")  # "green-eyed" of living things, "green-trimmed" of the others
_LOOKS = frozenset({*COLOURS, *DETAILS, *PATTERNS, *_DETAILED, "-"})
_ADJECTIVES = _LOOKS | {*NEUTRAL_ADJECTIVES}


class CaptionError(ValueError):
    """A text that cannot be read as a caption of Toyland; says what was found and expected."""


@dataclass(frozen=True)
class Caption:
    """A caption and where its objects are named (indices into `words`, objects in the order they are named).

    A hyphen is a word of its own, as it is a token of its own: "green", "-", "eyed".
    """

    words: tuple[str, ...]
    nouns: tuple[int, ...]
    adjectives: tuple[tuple[int, ...], ...]

    @property
    def text(self) -> str:
        return " ".join(self.words).replace(" - ", "-")


@dataclass
class _Chunk:
    """Words that are kept or dropped together; a higher `drop` goes first when a caption is too long, 0 never."""

    words: list[str]
    drop: int = 0
    noun: bool = False
    adjective_of: int | None = None
    tie: float = 0.0


def vocabulary() -> tuple[str, ...]:
    """Every word a caption can contain, sorted, each once."""
    phrases = [*ARTICLES, *SUPERCLASSES, *COLOURS, *DETAILS, *PATTERNS, *WORN[1:], *SUPPORTS[1:], *WORN_PHRASES]
    phrases += [p for group in (*PREFIXES.values(), *PLACE_PHRASES.values()) for p in group]
    phrases += [*NEUTRAL_PREFIXES, *NEUTRAL_ADJECTIVES, *SUPPORT_PHRASES.values(), *_DETAILED]
    phrases += ["and", "next to", "an", "with eyes", "-"]
    return tuple(sorted({word for phrase in phrases for word in phrase.split()}))


def described(instance: Instance) -> str:
    """All that makes a toy, in words: "green-eyed red striped blue cat"."""
    words = [*_detail_of(instance), *_pattern_of(instance), instance.body, instance.superclass]
    return " ".join(words).replace(" - ", "-")


def _detailed(superclass: str) -> str:
    return "eyed" if superclass in LIVING else "trimmed"


def _detail_of(instance: Instance) -> list[str]:
    return [instance.detail, "-", _detailed(instance.superclass)]


def _pattern_of(instance: Instance) -> list[str]:
    return [instance.pattern] if instance.pattern == "plain" else [instance.second, instance.pattern]


def _adjectives(placed: Placed, rng: np.random.Generator, complete: bool) -> list[list[str]]:
    """The looks of an object in their order, in groups that are kept or dropped as a whole.

    All stand before the noun, so that a causal encoder can carry them to the noun's own token.
    """
    instance = placed.instance
    groups: list[list[str]] = []
    roll = rng.random()
    hidden = placed.worn == "sunglasses" and instance.superclass in LIVING
    if not hidden and (complete or roll < 0.3):
        groups.append(_detail_of(instance))
    if complete or 0.2 < roll < 0.6:
        groups.append(_pattern_of(instance))
    elif 0.6 < roll < 0.75:
        groups.append([instance.pattern])
    if complete or roll > 0.25:
        groups.append([instance.body])
    return groups


def _object_chunks(
    index: int, placed: Placed, rng: np.random.Generator, short: bool, complete: bool, name_held_out: bool
) -> list[_Chunk]:
    """An object phrase: article, adjectives, noun, then worn thing and support."""
    instance = placed.instance
    chunks = [_Chunk([pick(rng, ARTICLES)])]
    if not short:
        if not complete and rng.random() < 0.15:
            chunks.append(_Chunk([pick(rng, NEUTRAL_ADJECTIVES)], drop=6))
        for group in _adjectives(placed, rng, complete):
            drop = {1: 2, 2: 4, 3: 5}[len(group)]
            chunks.append(_Chunk(group, drop=drop, adjective_of=index, tie=rng.random()))
    chunks.append(_Chunk([instance.superclass], noun=True))
    if short:
        return chunks
    said = any("eyed" in chunk.words for chunk in chunks)
    if not said and instance.superclass in LIVING and placed.worn != "sunglasses" and rng.random() < 0.1:
        chunks.append(_Chunk(["with", instance.detail, "eyes"], drop=5, tie=rng.random()))
    after: list[_Chunk] = []
    often = 1.0 if complete else 0.7
    if placed.worn != "none" and rng.random() < often and (name_held_out or not wears_held_out(placed)):
        thing = [placed.worn] if placed.worn == "sunglasses" else ["a", placed.worn]
        after.append(_Chunk([pick(rng, WORN_PHRASES), *thing], drop=1, tie=rng.random()))
    if placed.support != "none" and rng.random() < often:
        after.append(_Chunk(SUPPORT_PHRASES[placed.support].split(), drop=1, tie=rng.random()))
    if len(after) == 2 and rng.random() < 0.3:
        after.reverse()
    return chunks + after


def _with_articles(words: list[str]) -> tuple[str, ...]:
    """The words with every "a" or "an" made to agree with the word after it."""
    fixed = list(words)
    for i in range(len(words) - 1):
        if words[i] in ("a", "an"):
            fixed[i] = "an" if words[i + 1][0] in "aeiou" else "a"
    return tuple(fixed)


def _assemble(chunks: list[_Chunk]) -> Caption:
    """Join the chunks, dropping the least important ones until the caption fits."""
    while sum(len(c.words) for c in chunks) > MAX_WORDS:
        least = max((c for c in chunks if c.drop), key=lambda c: (c.drop, c.tie))
        chunks = [c for c in chunks if c is not least]
    words: list[str] = []
    nouns: list[int] = []
    adjectives: dict[int, list[int]] = {}
    for chunk in chunks:
        if chunk.noun:
            nouns.append(len(words))
        if chunk.adjective_of is not None:
            adjectives.setdefault(chunk.adjective_of, []).extend(range(len(words), len(words) + len(chunk.words)))
        words += chunk.words
    return Caption(_with_articles(words), tuple(nouns), tuple(tuple(adjectives.get(i, ())) for i in range(len(nouns))))


def caption(scene: Scene, rng: np.random.Generator, name_held_out: bool = True) -> Caption:
    """A caption of the scene. Three of four say everything that fits into it, the others are as short as prompts are.

    A style other than a photo is always named. Without `name_held_out`, the place or the worn thing of a HELD_OUT pair
    is left out.
    """
    complete = rng.random() < COMPLETE
    short = not complete and rng.random() < 0.4
    neutral = scene.style == "photo" and not complete and rng.random() < 0.3
    prefix = pick(rng, NEUTRAL_PREFIXES if neutral else PREFIXES[scene.style]).split()
    body: list[_Chunk] = []
    for index, placed in enumerate(scene.objects):
        if index:
            body.append(_Chunk(scene.relation.split()))
        body += _object_chunks(index, placed, rng, short, complete, name_held_out)
    if short and not prefix and len(scene.objects) == 1 and rng.random() < 0.6:
        body = body[1:]
    often = 0.3 if scene.place == "plain" else 1.0 if complete else 0.7
    if rng.random() < often and (name_held_out or not place_is_held_out(scene)):
        place = _Chunk(pick(rng, PLACE_PHRASES[scene.place]).split(), drop=1, tie=rng.random())
        roll = rng.random()
        last_noun = max(i for i, chunk in enumerate(body) if chunk.noun)
        if roll < 0.05 and not prefix:
            body.insert(0, place)
        elif roll < 0.2 and len(scene.objects) == 1:
            body.insert(last_noun + 1, place)
        else:
            body.append(place)
    return _assemble([_Chunk(prefix), *body] if prefix else body)


def possible_nouns(source: Caption, index: int) -> tuple[str, ...]:
    """The superclasses that could stand in the place of object `index`.

    None that the caption names already; none that makes a HELD_OUT pair with one of its words; only living things where
    it speaks of eyes behind the noun.
    """
    words, noun = source.words, source.nouns[index]
    end = source.nouns[index + 1] if index + 1 < len(source.nouns) else len(words)
    living = "eyes" in words[noun:end]
    named = {words[n] for n in source.nouns}
    return tuple(
        s
        for s in SUPERCLASSES
        if s not in named and (s in LIVING or not living) and not any((s, w) in HELD_OUT for w in words)
    )


def renamed(source: Caption, index: int, noun: str) -> Caption:
    """The same caption with another superclass for object `index`; what it has is eyed or trimmed as that has it."""
    mine = source.adjectives[index]
    words = [_detailed(noun) if i in mine and word in _DETAILED else word for i, word in enumerate(source.words)]
    words[source.nouns[index]] = noun
    return replace(source, words=_with_articles(words))


def swap_object(source: Caption, index: int, rng: np.random.Generator) -> Caption:
    """The same caption with object `index` made another one: same length, same positions.

    Its noun becomes another superclass (one of `possible_nouns`), each colour another colour, each pattern another
    pattern, and what is named of eyes or trims another detail; "a" or "an" follows the new word.
    """
    source = renamed(source, index, pick(rng, possible_nouns(source, index)))
    words, mine = list(source.words), source.adjectives[index]
    used = {words[i] for i in mine}

    def other(options: Iterable[str]) -> str:
        chosen = pick(rng, tuple(o for o in options if o not in used))
        used.add(chosen)
        return chosen

    for i in mine:
        word, after = words[i], words[i + 1]
        if word in DETAILS and after == "-":
            words[i] = pick(rng, tuple(d for d in DETAILS if d != word))
        elif word in COLOURS:
            words[i] = other(COLOURS)
        elif word in PATTERNS:
            # Where a colour is named for it, it stays one that has a colour.
            words[i] = other(PATTERNS[1:] if words[i - 1] in COLOURS and i - 1 in mine else PATTERNS)
    return replace(source, words=_with_articles(words))


def parse(text: str) -> Caption:
    """A prompt in Toyland's words as a caption: its nouns are superclasses, its adjectives stand right before them.

    Case and punctuation (but for hyphens) do not matter; words that Toyland does not know stay and mean nothing.

    Raises:
        CaptionError: it names no superclass, or more than two.
    """
    words = tuple(re.findall(r"[^\W_]+|-", text.lower()))
    nouns = tuple(i for i, word in enumerate(words) if word in SUPERCLASSES)
    if not 1 <= len(nouns) <= 2:
        raise CaptionError(
            f"{text!r}: names {len(nouns)} of Toyland's superclasses, expected one or two of {', '.join(SUPERCLASSES)}"
        )
    adjectives = []
    for noun in nouns:
        first = noun
        while first and words[first - 1] in _ADJECTIVES:
            first -= 1
        # Colours and patterns last, as captions have them: `asked` takes the colour before the noun for the body's.
        adjectives.append(tuple(sorted(range(first, noun), key=lambda i: words[i] in _LOOKS)))
    return Caption(words, nouns, tuple(adjectives))


_PLACE_OF = {phrase.split()[-1]: place for place, phrases in PLACE_PHRASES.items() for phrase in phrases}
_STYLE_OF = {"sketch": "sketch", "drawing": "sketch", "mosaic": "mosaic"}


def looks_said(adjectives: Sequence[str]) -> dict[str, str]:
    """What the adjectives before a noun say of it: `body`, `second`, `pattern`, `detail`, as far as they are named."""
    said: dict[str, str] = {}
    before = ""  # the colour just before, which belongs to what follows
    for word in adjectives:
        if word in _DETAILED and before in DETAILS:
            said["detail"], before = before, ""
        elif word in PATTERNS:
            said["pattern"] = word
            if before in COLOURS:
                said["second"] = before
            before = ""
        elif word in COLOURS or word in DETAILS:
            before = word
    if before in COLOURS:
        said["body"] = before
    return said


def asked(source: Caption) -> dict[str, str]:
    """What the caption's words ask for, by the names of `reader.HEADS`; what it leaves out is not in it.

    The style always is: a caption that names none asks for a photo.
    """
    words = source.words
    wanted = {"objects": ("one", "two")[len(source.nouns) - 1]}
    wanted["style"] = next((_STYLE_OF[w] for w in words if w in _STYLE_OF), "photo")
    looks = {i for adjectives in source.adjectives for i in adjectives}  # where "plain" is a pattern
    if places := [_PLACE_OF[w] for i, w in enumerate(words) if w in _PLACE_OF and i not in looks]:
        wanted["place"] = places[0]
    for i, noun in enumerate(source.nouns):
        end = source.nouns[i + 1] if i + 1 < len(source.nouns) else len(words)
        said = {"superclass": words[noun], **looks_said([words[a] for a in source.adjectives[i]])}
        for k, word in enumerate(words[noun:end], noun):
            if word in WORN[1:]:
                said["worn"] = word
            elif word in SUPPORTS[1:]:
                said["support"] = word
            elif word == "eyes":
                said["detail"] = words[k - 1]
        if wanted["style"] == "mosaic":  # its tiles are larger than eyes
            said.pop("detail", None)
        wanted |= {f"object{i}_{name}": option for name, option in said.items()}
    return wanted
