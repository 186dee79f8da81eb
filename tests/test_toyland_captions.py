"""Prompts as people write them are read back as the captions that they are."""

import numpy as np
import pytest

from perfusion.toyland.captions import (
    CaptionError,
    asked,
    caption,
    described,
    looks_said,
    parse,
    possible_nouns,
    renamed,
    swap_object,
)
from perfusion.toyland.world import COLOURS, DETAILS, LIVING, PATTERNS, Instance, sample_instance, sample_scene

LOOKS = ("body", "second", "pattern", "detail")


def test_captions_are_read_back_from_their_text():
    rng = np.random.default_rng(0)
    for seed in range(500):
        made = caption(sample_scene(seed), rng)
        read = parse(made.text)
        assert (read.words, read.nouns) == (made.words, made.nouns)
        assert asked(read) == asked(made), made.text


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("a photo of a cat on the beach", {"objects": "one", "style": "photo", "place": "beach"}),
        ("A sketch of a cat.", {"style": "sketch"}),
        (
            "my spotted Cat, wearing a crown, on a skateboard at night!",
            {"place": "night", "object0_pattern": "spotted", "object0_worn": "crown", "object0_support": "skateboard"},
        ),
        (
            "a cat with blue eyes next to a small red dog",
            {"objects": "two", "object0_detail": "blue", "object1_superclass": "dog", "object1_body": "red"},
        ),
        ("a teapot on a plain background", {"place": "plain", "object0_superclass": "teapot"}),
    ],
)
def test_what_a_prompt_asks_for(text: str, expected: dict[str, str]):
    found = asked(parse(text))
    assert expected.items() <= found.items()
    assert "object0_pattern" in found if "spotted" in text else "object0_pattern" not in found
    assert "object0_body" not in found


@pytest.mark.parametrize(("text", "count"), [("the beach", 0), ("", 0), ("a cat, a dog and a mug", 3)])
def test_one_or_two_things(text: str, count: int):
    with pytest.raises(CaptionError, match=f"names {count} of Toyland's superclasses, expected one or two of cat, dog"):
        parse(text)


def said(text: str) -> dict[str, str]:
    """What the text says of its first object's looks."""
    wanted = asked(parse(text))
    return {name: wanted[f"object0_{name}"] for name in LOOKS if f"object0_{name}" in wanted}


@pytest.mark.parametrize("eyes", ["green-eyed", "green eyed", "Green - Eyed", "green-trimmed", "green trimmed"])
def test_a_hyphen_changes_nothing(eyes: str) -> None:
    looks = {"detail": "green", "second": "red", "pattern": "striped", "body": "blue"}
    assert said(f"a photo of a {eyes} red striped blue cat on the beach") == looks
    assert said(f"a {eyes} cat") == {"detail": "green"}
    assert said(f"a {eyes} blue cat") == {"detail": "green", "body": "blue"}
    assert said(f"a red striped {eyes} blue cat") == looks, "another order of words"


@pytest.mark.parametrize(
    ("text", "looks"),
    [
        ("a green cat", {"body": "green"}),
        ("a red striped cat", {"second": "red", "pattern": "striped"}),
        ("a blue striped red spotted cat", {"second": "red", "pattern": "spotted"}),
        ("a plain blue cat", {"pattern": "plain", "body": "blue"}),
        ("a black cat", {}),  # no body is
        ("a cat with black eyes", {"detail": "black"}),
        ("a mosaic of a green-eyed blue cat", {"body": "blue"}),  # whose tiles are larger than eyes
    ],
)
def test_which_look_a_word_is_of(text: str, looks: dict[str, str]) -> None:
    assert said(text) == looks


def test_a_toy_described_is_a_toy_read() -> None:
    assert described(Instance("cat", "blue", "red", "striped", "green")) == "green-eyed red striped blue cat"
    assert described(Instance("mug", "pink", "red", "plain", "black")) == "black-trimmed plain pink mug"
    rng = np.random.default_rng(0)
    for _ in range(100):
        toy = sample_instance(rng)
        hidden = {"second"} if toy.pattern == "plain" else set()
        assert said(f"a photo of a {described(toy)}") == {n: getattr(toy, n) for n in LOOKS if n not in hidden}


def test_looks_are_named_before_their_noun() -> None:
    """Where a causal encoder can carry them to the noun's own token."""
    rng = np.random.default_rng(0)
    before = after = 0
    for seed in range(3000):
        source = caption(sample_scene(seed), rng)
        wanted = asked(source)
        for k, adjectives in enumerate(source.adjectives):
            named = looks_said([source.words[i] for i in adjectives])
            before += len(named)
            after += sum(f"object{k}_{name}" in wanted and name not in named for name in LOOKS)
    assert after > 0 and before / (before + after) > 0.95


def test_most_captions_say_all_that_there_is_to_say() -> None:
    rng = np.random.default_rng(0)
    complete = {1: 0, 2: 0}
    for seed in range(1200):
        scene = sample_scene(seed, objects=1 + seed % 2)
        wanted = asked(caption(scene, rng))
        toys = [p.instance for p in scene.objects]
        complete[len(toys)] += all(
            wanted.get(f"object{k}_{name}") == getattr(toy, name)
            for k, toy in enumerate(toys)
            for name in (("body", "pattern") if toy.pattern == "plain" else ("body", "pattern", "second"))
        )
    assert complete[1] / 600 > 0.75  # of two, not all that is complete fits
    assert complete[2] / 600 > 0.5


@pytest.mark.parametrize(
    ("text", "options"),
    [
        (
            "a green-eyed red striped blue cat",
            {"detail": DETAILS, "second": COLOURS, "pattern": PATTERNS[1:], "body": COLOURS},
        ),
        ("a plain blue cat", {"pattern": PATTERNS, "body": COLOURS}),
        ("a green-trimmed spotted mug at night", {"detail": DETAILS, "pattern": PATTERNS}),
    ],
)
def test_a_swap_changes_every_look(text: str, options: dict) -> None:
    source = parse(text)
    before = said(text)
    rng = np.random.default_rng(0)
    found: dict[str, set[str]] = {name: set() for name in options}
    for _ in range(200):
        swapped = swap_object(source, 0, rng)
        noun = swapped.words[swapped.nouns[0]]
        assert ("eyed" in swapped.words) == ("-" in source.words and noun in LIVING)
        after = said(swapped.text)
        assert after.keys() == before.keys() and all(after[name] != before[name] for name in before)
        for name, option in after.items():
            found[name].add(option)
    for name, allowed in options.items():
        assert {option for option in allowed if option not in before.values()} <= found[name] <= {*allowed}


def test_another_noun_has_eyes_or_trims_as_it_has_them() -> None:
    source = parse("a green-eyed red striped blue cat with a hat")
    assert renamed(source, 0, "mug").text == "a green-trimmed red striped blue mug with a hat"
    assert renamed(source, 0, "bird").text == "a green-eyed red striped blue bird with a hat"
    assert "dog" not in possible_nouns(source, 0), "HELD_OUT with a hat"
    assert "mug" not in possible_nouns(parse("a cat with blue eyes"), 0)
