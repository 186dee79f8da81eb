"""What the claims are tried on: how many, chosen how, and nothing that tuning has seen."""

import pytest

from eval.folder_scores import toy as known_toy
from experiments.protocol import (
    PAIR_PROMPTS,
    TABLE_PROMPTS,
    TABLE_SEEDS,
    TABLE_TOYS,
    TUNING,
    Protocol,
    filled,
    suits,
    toys,
)
from perfusion.data.prompts import fill
from perfusion.toyland.captions import asked, looks_said, parse
from perfusion.toyland.world import PLACES, STYLES, SUPERCLASSES, SUPPORTS, WORN

WHOLE = Protocol()


def test_counts() -> None:
    assert len(TABLE_TOYS) >= 40 and {toy.superclass for toy in TABLE_TOYS} == {*SUPERCLASSES}
    assert len(TABLE_PROMPTS) >= 16 and len(TABLE_SEEDS) == 1
    assert WHOLE.seeds_of(2) == (0, 1) and TUNING.seeds_of(1) == TUNING.seeds
    assert len({toy.name for toy in (*TABLE_TOYS, *TUNING.subjects)}) == len(TABLE_TOYS) + len(TUNING.subjects)
    assert len(WHOLE.pairs) == 20 and len({toy for pair in WHOLE.pairs for toy in pair}) == 40


def test_toys_are_more_than_their_colour_and_chosen_by_a_rule() -> None:
    for toy in (*TABLE_TOYS, *TUNING.subjects):
        assert toy.looks.pattern != "plain" and toy.looks == known_toy(toy.instance, toy.superclass)
        assert toy.instance not in (3, 7, 11, 16), "those of examples and presets"
    first, second = toys(("cat", "dog"), 100)
    assert first.instance < second.instance, "two toys of one seed would have the same colours"
    assert toys(("cat", "dog"), 100) == (first, second)


def test_a_toy_described_has_all_of_its_looks_before_its_noun() -> None:
    for toy in (*TABLE_TOYS, *TUNING.subjects):
        words = toy.description.split()
        assert words[-1] == toy.superclass
        source = parse(f"a photo of a {toy.description}")
        said = looks_said([source.words[i] for i in source.adjectives[0]])
        assert said == {name: getattr(toy.looks, name) for name in ("body", "second", "pattern", "detail")}


def test_tuning_sees_nothing_of_the_tables() -> None:
    assert not {toy.instance for toy in TABLE_TOYS} & {toy.instance for toy in TUNING.subjects}
    assert not {*TABLE_SEEDS} & {*TUNING.seeds}
    tables = {template for alternatives in TABLE_PROMPTS for template in alternatives}
    assert not tables & {template for alternatives in TUNING.prompts for template in alternatives}


@pytest.mark.parametrize("protocol", [WHOLE, TUNING])
def test_every_prompt_can_be_read_and_was_in_training(protocol: Protocol) -> None:
    for toy in protocol.subjects:
        templates = protocol.templates(toy)
        assert len({*templates}) == len(protocol.prompts), "no prompt twice"
        for template in templates:
            prompt = fill(template, toy.superclass)
            assert suits(prompt), prompt
            said = asked(parse(prompt))
            beside = {name: value for name, value in said.items() if not name.endswith("superclass")}
            assert beside != {"objects": "one", "style": "photo"}, f"{prompt} asks for nothing"


def test_prompts_are_of_all_kinds() -> None:
    for toy in TABLE_TOYS:
        wanted = [asked(parse(fill(template, toy.superclass))) for template in WHOLE.templates(toy)]
        values = [{*said.values()} for said in wanted]
        for kind, least in ((PLACES, 8), (WORN[1:], 3), (SUPPORTS[1:], 4), (STYLES[1:], 2), (("two",), 2)):
            assert sum(bool(found & {*kind}) for found in values) >= least, (toy.name, kind)


def test_pairs() -> None:
    for pair in WHOLE.pairs:
        templates = WHOLE.templates(*pair)
        assert len({*templates}) == len(PAIR_PROMPTS)
        for template in templates:
            prompt = filled(template, *(toy.superclass for toy in pair))
            assert suits(prompt) and asked(parse(prompt))["objects"] == "two"
    assert filled("a {} and a {}", "x", "y") == "a x and a y"


@pytest.mark.parametrize(
    ("prompt", "fair"),
    [
        ("a cat in the snow", False),
        ("a dog and a cat in the snow", False),
        ("a dog wearing a hat", False),
        ("a cat wearing a hat", True),
        ("a dog and a dog", False),
        ("a dog next to a cat on the beach", True),
    ],
)
def test_pairs_that_training_left_out(prompt: str, fair: bool) -> None:
    assert suits(prompt) == fair
