"""Words for scenes: captions over a small fixed vocabulary, with the positions of nouns and adjectives."""

from __future__ import annotations

import re
from dataclasses import dataclass, field, replace

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
    Placed,
    Scene,
    pick,
    place_is_held_out,
    wears_held_out,
)

MAX_WORDS = 20
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


_LOOKS = frozenset({*COLOURS, *PATTERNS})
_ADJECTIVES = _LOOKS | {*NEUTRAL_ADJECTIVES, "sleeping"}


class CaptionError(ValueError):
    """A text that cannot be read as a caption of Toyland; says what was found and expected."""


@dataclass(frozen=True)
class Caption:
    """A caption and where its objects are named (indices into `words`, objects in the order they are named)."""

    words: tuple[str, ...]
    nouns: tuple[int, ...]
    adjectives: tuple[tuple[int, ...], ...]

    @property
    def text(self) -> str:
        return " ".join(self.words)


@dataclass
class _Chunk:
    """Words that are kept or dropped together; a higher `drop` goes first when a caption is too long, 0 never."""

    words: list[str]
    drop: int = 0
    noun: bool = False
    adjective_of: int | None = None
    tie: float = field(default=0.0)


def vocabulary() -> tuple[str, ...]:
    """Every word a caption can contain, sorted, each once."""
    phrases = [*ARTICLES, *SUPERCLASSES, *COLOURS, *DETAILS, *PATTERNS, *WORN[1:], *SUPPORTS[1:], *WORN_PHRASES]
    phrases += [p for group in (*PREFIXES.values(), *PLACE_PHRASES.values()) for p in group]
    phrases += [*NEUTRAL_PREFIXES, *NEUTRAL_ADJECTIVES, *SUPPORT_PHRASES.values()]
    phrases += ["and", "next to", "an", "sleeping", "with eyes"]
    return tuple(sorted({word for phrase in phrases for word in phrase.split()}))


@dataclass(frozen=True)
class Wording:
    """What captions of a scene say of it.

    Attributes:
        name_held_out: whether one may name both halves of a HELD_OUT pair; else place or worn thing is left out.
        thorough: whether one that describes a toy names all that has a word: both colours, the pattern, most eyes.
    """

    name_held_out: bool = True
    thorough: bool = False


def _adjectives(placed: Placed, rng: np.random.Generator, thorough: bool) -> list[list[str]]:
    """Groups of adjectives in order, each kept or dropped as a whole."""
    instance = placed.instance
    groups: list[list[str]] = []
    if placed.asleep and rng.random() < 0.8:
        groups.append(["sleeping"])
    roll = rng.random()
    if roll < (0.1 if thorough else 0.2):
        return groups
    if instance.pattern != "plain":
        if roll < 0.5 or thorough:
            groups.append([instance.second, instance.pattern])
        elif roll < 0.72:
            groups.append([instance.pattern])
    groups.append([instance.body])
    return groups


def _object_chunks(
    index: int, placed: Placed, rng: np.random.Generator, short: bool, neutral: bool, wording: Wording
) -> list[_Chunk]:
    """An object phrase: article, adjectives, noun, then eyes, worn thing and support."""
    instance = placed.instance
    chunks = [_Chunk([pick(rng, ARTICLES)])]
    if neutral and rng.random() < 0.35:
        chunks.append(_Chunk([pick(rng, NEUTRAL_ADJECTIVES)], drop=6))
    if not short:
        for group in _adjectives(placed, rng, wording.thorough):
            drop = 4 if len(group) == 2 else 2
            chunks.append(_Chunk(group, drop=drop, adjective_of=index, tie=rng.random()))
    chunks.append(_Chunk([instance.superclass], noun=True))
    if short:
        return chunks
    eyes_show = instance.superclass in LIVING and not placed.asleep and placed.worn != "sunglasses"
    if eyes_show and rng.random() < (0.6 if wording.thorough else 0.15):
        chunks.append(_Chunk(["with", instance.detail, "eyes"], drop=5, tie=rng.random()))
    after: list[_Chunk] = []
    if placed.worn != "none" and rng.random() < 0.85 and (wording.name_held_out or not wears_held_out(placed)):
        thing = [placed.worn] if placed.worn == "sunglasses" else ["a", placed.worn]
        after.append(_Chunk([pick(rng, WORN_PHRASES), *thing], drop=1, tie=rng.random()))
    if placed.support != "none" and rng.random() < 0.85:
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


def caption(scene: Scene, rng: np.random.Generator, wording: Wording = Wording()) -> Caption:
    """A caption of the scene; wording varies and attributes are left out at random, a non-photo style never is."""
    short = rng.random() < 0.1
    neutral = scene.style == "photo" and not short and rng.random() < 0.1
    prefix = pick(rng, NEUTRAL_PREFIXES if neutral else PREFIXES[scene.style]).split()
    body: list[_Chunk] = []
    for index, placed in enumerate(scene.objects):
        if index:
            body.append(_Chunk(scene.relation.split()))
        body += _object_chunks(index, placed, rng, short, neutral, wording)
    if short and not prefix and len(scene.objects) == 1 and rng.random() < 0.6:
        body = body[1:]
    named = rng.random() < (0.06 if scene.place == "plain" else 0.85)
    if named and not short and (wording.name_held_out or not place_is_held_out(scene)):
        place = _Chunk(pick(rng, PLACE_PHRASES[scene.place]).split(), drop=1, tie=rng.random())
        roll = rng.random()
        last_noun = max(i for i, chunk in enumerate(body) if chunk.noun)
        if roll < 0.1 and not prefix:
            body.insert(0, place)
        elif roll < 0.25 and len(scene.objects) == 1:
            body.insert(last_noun + 1, place)
        else:
            body.append(place)
    return _assemble([_Chunk(prefix), *body] if prefix else body)


def possible_nouns(source: Caption, index: int) -> tuple[str, ...]:
    """The superclasses that could stand in the place of object `index`.

    None that the caption names already; none that makes a HELD_OUT pair with one of its words; only living things where
    it speaks of the object's eyes or sleep.
    """
    words, noun = source.words, source.nouns[index]
    end = source.nouns[index + 1] if index + 1 < len(source.nouns) else len(words)
    living = "eyes" in words[noun:end] or any(words[i] == "sleeping" for i in source.adjectives[index])
    named = {words[n] for n in source.nouns}
    return tuple(
        s
        for s in SUPERCLASSES
        if s not in named and (s in LIVING or not living) and not any((s, w) in HELD_OUT for w in words)
    )


def swap_object(source: Caption, index: int, rng: np.random.Generator) -> Caption:
    """The same caption with object `index` made another one: same length, same positions.

    Its noun becomes another superclass (one of `possible_nouns`), each colour another colour and each pattern another
    pattern; "sleeping" stays, and "a" or "an" follows the new word.
    """
    words = list(source.words)
    mine = source.adjectives[index]
    words[source.nouns[index]] = pick(rng, possible_nouns(source, index))
    used = {words[i] for i in mine}
    for i in mine:
        if words[i] in COLOURS:
            words[i] = pick(rng, tuple(c for c in COLOURS if c not in used))
        elif words[i] in PATTERNS:
            words[i] = pick(rng, tuple(p for p in PATTERNS[1:] if p not in used))
        used.add(words[i])
    return replace(source, words=_with_articles(words))


def parse(text: str) -> Caption:
    """A prompt in Toyland's words as a caption: its nouns are superclasses, its adjectives stand right before them.

    Case and punctuation do not matter; words that Toyland does not know stay where they are and mean nothing.

    Raises:
        CaptionError: it names no superclass, or more than two.
    """
    words = tuple(re.findall(r"[^\W_]+", text.lower()))
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


def asked(source: Caption) -> dict[str, str]:
    """What the caption's words ask for, by the names of `reader.HEADS`; what it leaves out is not in it.

    The style always is: a caption that names none asks for a photo.
    """
    words = source.words
    wanted = {"objects": ("one", "two")[len(source.nouns) - 1]}
    wanted["style"] = next((_STYLE_OF[w] for w in words if w in _STYLE_OF), "photo")
    if place := next((_PLACE_OF[w] for w in words if w in _PLACE_OF), None):
        wanted["place"] = place
    for i, noun in enumerate(source.nouns):
        end = source.nouns[i + 1] if i + 1 < len(source.nouns) else len(words)
        said = {"superclass": words[noun]}
        before = ""
        for word in (words[a] for a in source.adjectives[i]):
            if word == "sleeping":
                said["sleep"] = "asleep"
            elif word in PATTERNS:
                said["pattern"] = word
                if before in COLOURS:
                    said["second"] = before
            before = word
        if before in COLOURS:
            said["body"] = before
        for k, word in enumerate(words[noun:end], noun):
            if word in WORN[1:]:
                said["worn"] = word
            elif word in SUPPORTS[1:]:
                said["support"] = word
            elif word == "eyes" and wanted["style"] != "mosaic":  # whose tiles are larger than eyes
                said["detail"] = words[k - 1]
        wanted |= {f"object{i}_{name}": option for name, option in said.items()}
    return wanted
