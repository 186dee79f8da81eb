"""Identity and prompt accuracy of pictures whose every attribute is known, through a reader that is told them."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from PIL import Image

from perfusion.toyland.captions import CaptionError
from perfusion.toyland.reader import HEADS, Wish, judge, labels, shown
from perfusion.toyland.world import Instance, Scene, concept_scene, sample_scene

CAT = Instance("cat", "purple", "pink", "striped", "blue")
DOG = Instance("dog", "brown", "white", "spotted", "black")


class Told:
    """A reader that sees just these scenes, whatever the pixels."""

    def __init__(self, *scenes: Scene, **wrong: str) -> None:
        self.rows = [labels(shown(scene) | wrong) for scene in scenes]

    def read(self, pixels: torch.Tensor) -> dict[str, torch.Tensor]:
        assert pixels.shape == (len(self.rows), 3, 64, 64)
        # What cannot be seen is guessed, as the true reader does.
        return {name: torch.tensor([max(row[name], 0) for row in self.rows]) for name in HEADS}


def scores(reader: Any, text: str, **toys: Instance) -> dict[str, float]:
    (found,) = judge(reader, [Image.new("RGB", (64, 64))], [Wish(text, toys)])
    return found


def test_a_picture_as_it_should_be():
    reader = Told(concept_scene(CAT, 0, place="beach", worn="crown", support="boat"))
    assert scores(reader, "a photo of a cat on the beach wearing a crown, in a boat", cat=CAT) == {
        "identity": 1.0,
        "prompt": 1.0,
        "superclass": 1.0,
    }


def test_each_wrong_look_costs_its_share():
    scene = concept_scene(CAT, 0, place="beach")
    for name, wrong in (("body", "red"), ("second", "red"), ("pattern", "spotted"), ("detail", "black")):
        found = scores(Told(scene, **{f"object0_{name}": wrong}), "a photo of a cat on the beach", cat=CAT)
        assert found == {"identity": 0.75, "prompt": 1.0, "superclass": 1.0}


def test_what_cannot_be_seen_does_not_count():
    plain = replace(CAT, pattern="plain")
    assert scores(Told(concept_scene(plain, 0), object0_second="red"), "a photo of a cat", cat=plain)["identity"] == 1.0
    mosaic = Told(concept_scene(CAT, 0, style="mosaic"), object0_detail="red", object0_body="red")
    assert scores(mosaic, "a mosaic of a cat", cat=CAT) == {"identity": 2 / 3, "prompt": 1.0, "superclass": 1.0}
    hidden = Told(concept_scene(CAT, 0, worn="sunglasses"), object0_detail="red")
    assert scores(hidden, "a cat wearing sunglasses", cat=CAT)["identity"] == 1.0
    mug = replace(CAT, superclass="mug")
    trimmed = Told(concept_scene(mug, 0, worn="sunglasses"), object0_detail="red")
    assert scores(trimmed, "a mug wearing sunglasses", mug=mug)["identity"] == 0.75, "they hide no trim"


def test_each_wish_counts_once_and_a_prompt_without_wishes_not_at_all():
    reader = Told(concept_scene(CAT, 0, place="snow", worn="hat"))
    assert scores(reader, "a sketch of a cat in the snow wearing a scarf", cat=CAT)["prompt"] == pytest.approx(1 / 3)
    assert scores(reader, "a photo of a cat", cat=CAT) == {"identity": 1.0, "superclass": 1.0}


def test_looks_that_the_prompt_changes_belong_to_the_prompt():
    found = scores(Told(concept_scene(CAT, 0), object0_body="red"), "a photo of a red cat", cat=CAT)
    assert found == {"identity": 1.0, "prompt": 1.0, "superclass": 1.0}
    assert scores(Told(concept_scene(CAT, 0)), "a photo of a red cat", cat=CAT)["prompt"] == 0.0
    eyes = Told(concept_scene(CAT, 0), object0_detail="green")
    for prompt in ("a photo of a green-eyed cat", "a photo of a green eyed cat", "a photo of a cat with green eyes"):
        assert scores(eyes, prompt, cat=CAT) == {"identity": 1.0, "prompt": 1.0, "superclass": 1.0}


def test_another_kind_of_thing():
    found = scores(Told(concept_scene(replace(CAT, superclass="dog"), 0)), "a photo of a cat", cat=CAT)
    assert found == {"identity": 1.0, "superclass": 0.0}, "its looks may be right all the same"


def two(left: Instance, right: Instance) -> Scene:
    bare: dict[str, Any] = {"worn": "none", "support": "none", "style": "photo"}
    return sample_scene(0, objects=(left, right), held_out=True, **bare)


def test_it_does_not_matter_who_stands_on_the_left():
    for scene in (two(CAT, DOG), two(DOG, CAT)):
        found = scores(Told(scene), "a photo of a cat and a white spotted brown dog", cat=CAT)
        assert found == {"identity": 1.0, "prompt": 1.0, "superclass": 1.0}
        both = scores(Told(scene), "a photo of a cat and a dog", cat=CAT, dog=DOG)
        assert both == {"identity": 1.0, "prompt": 1.0, "superclass": 1.0}
        alone = scores(Told(scene), "a photo of a dog", dog=DOG)
        assert alone == {"identity": 1.0, "superclass": 1.0}, "found among two, though one was asked for"


def test_a_missing_second_thing_is_missed():
    found = scores(Told(concept_scene(CAT, 0)), "a photo of a brown dog and a cat", cat=CAT)
    assert found == {"identity": 1.0, "prompt": 0.0, "superclass": 1.0}, "two things, a dog, a brown one: none is there"
    both = scores(Told(concept_scene(CAT, 0)), "a photo of a cat and a dog", cat=CAT, dog=DOG)
    assert both == {"identity": 0.5, "prompt": 0.0, "superclass": 0.5}


def test_without_a_known_toy_the_prompt_alone_counts():
    reader = Told(concept_scene(DOG, 0, place="beach"))
    assert scores(reader, "a photo of a cat on the beach") == {"prompt": 0.5}


def test_pictures_are_judged_each_by_its_own_wish():
    reader: Any = Told(concept_scene(CAT, 0, place="beach"), concept_scene(CAT, 0, place="snow"))
    wishes = [Wish("a cat on the beach", {"cat": CAT}), Wish("a cat on the beach", {"cat": DOG})]
    first, second = judge(reader, [Image.new("RGB", (64, 64))] * 2, wishes)
    assert (first["identity"], first["prompt"]) == (1.0, 1.0)
    assert (second["identity"], second["prompt"]) == (0.0, 0.0)


def test_a_prompt_outside_of_toyland():
    with pytest.raises(CaptionError, match="names 0 of Toyland's superclasses"):
        scores(Told(concept_scene(CAT, 0)), "a photo of a hamster")
