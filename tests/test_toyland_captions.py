"""Prompts as people write them are read back as the captions that they are."""

import numpy as np
import pytest

from perfusion.toyland.captions import CaptionError, Wording, asked, caption, parse
from perfusion.toyland.world import sample_scene


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
            "a cat with blue eyes next to a small red sleeping dog",
            {
                "objects": "two",
                "object0_detail": "blue",
                "object1_superclass": "dog",
                "object1_body": "red",
                "object1_sleep": "asleep",
            },
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


def test_thorough_captions_name_the_looks() -> None:
    scenes = [sample_scene(seed, objects=1) for seed in range(600)]
    scenes = [scene for scene in scenes if scene.objects[0].instance.pattern != "plain"]

    def share(wording: Wording) -> float:
        rng = np.random.default_rng(0)
        named = 0
        for scene in scenes:
            looks = scene.objects[0].instance
            named += {looks.body, looks.second, looks.pattern} <= set(caption(scene, rng, wording).words)
        return named / len(scenes)

    assert share(Wording()) < 0.35 and share(Wording(thorough=True)) > 0.75
