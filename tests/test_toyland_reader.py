"""The attribute reader: its labels say what is drawn, captions say what they ask, and it can learn."""

from __future__ import annotations

import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from perfusion.toyland.build.train_autoencoder import draw_scenes
from perfusion.toyland.build.train_reader import reading_loss
from perfusion.toyland.captions import asked, caption
from perfusion.toyland.draw import render
from perfusion.toyland.reader import (
    HEADS,
    NOT_SHOWN,
    OBJECT_HEADS,
    OBJECTS,
    SCENE_HEADS,
    Reader,
    accuracy,
    as_options,
    as_pixels,
    label_tensors,
    labels,
    shown,
)
from perfusion.toyland.world import concept_scene, sample_instance, sample_scene


def test_labels_say_what_is_shown() -> None:
    toy = sample_instance(np.random.default_rng(0), "cat", body="red", second="blue", pattern="striped", detail="green")
    seen = shown(concept_scene(toy, 1, place="beach", style="sketch", worn="hat", support="boat"))
    assert seen == {name: HEADS[name][index] for name, index in labels(seen).items() if index != NOT_SHOWN}
    assert seen == {
        "objects": "one", "place": "beach", "style": "sketch", "object0_superclass": "cat", "object0_body": "red",
        "object0_second": "blue", "object0_pattern": "striped", "object0_detail": "green", "object0_worn": "hat",
        "object0_support": "boat",
    }  # fmt: skip


@pytest.mark.parametrize(
    ("superclass", "pattern", "fixed", "hidden"),
    [
        ("cat", "plain", {}, {"second"}),
        ("cat", "spotted", {}, set()),
        ("cat", "spotted", {"worn": "sunglasses"}, {"detail"}),
        ("mug", "spotted", {"worn": "sunglasses"}, set()),
        ("cat", "spotted", {"style": "mosaic"}, {"detail"}),
    ],
)
def test_what_cannot_be_seen_has_no_label(superclass: str, pattern: str, fixed: dict, hidden: set[str]) -> None:
    toy = sample_instance(np.random.default_rng(0), superclass, pattern=pattern)
    seen = labels(shown(concept_scene(toy, 1, **fixed)))
    assert {name for name in OBJECT_HEADS if seen[f"object0_{name}"] == NOT_SHOWN} == hidden


def test_captions_ask_only_for_what_their_scenes_show_and_for_every_attribute_now_and_then() -> None:
    found: set[str] = set()
    for seed in range(400):
        scene = sample_scene(seed)
        right = shown(scene)
        wanted = asked(caption(scene, np.random.default_rng(seed)))
        assert {"objects", "style", "object0_superclass"} <= wanted.keys()
        for name, option in wanted.items():
            assert right[name] == option, (seed, name)
        found |= wanted.keys()
    assert found == HEADS.keys()


@pytest.mark.slow
def test_it_learns_to_read() -> None:
    torch.manual_seed(0)
    model = Reader()
    scenes = [sample_scene(s) for s in range(32)]
    pixels, right = draw_scenes(scenes)[0], label_tensors(map(shown, scenes))
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3)
    first = float(reading_loss(model(pixels), right).detach())
    for _ in range(40):
        optimizer.zero_grad()
        reading_loss(model(pixels), right).backward()
        optimizer.step()
    found = accuracy(model.eval().read(pixels), right)
    assert found.keys() == {*SCENE_HEADS, *OBJECT_HEADS}
    assert float(reading_loss(model(pixels), right).detach()) < first / 4
    assert min(found.values()) > 0.7


def test_readings_have_names() -> None:
    options = {name: torch.tensor([len(values) - 1, 0]) for name, values in HEADS.items()}
    last, first = as_options(options)
    assert (last["objects"], first["objects"]) == ("two", "one")
    assert last == {name: values[-1] for name, values in HEADS.items()}


def test_accuracy_counts_only_what_is_shown() -> None:
    scenes = [sample_scene(s, objects=n) for s, n in [(1, 1), (2, 2)]]
    right = label_tensors(map(shown, scenes))
    assert {value for value in accuracy(right, right).values() if value == value} == {1.0}
    plain = label_tensors([shown(sample_scene(3, objects=1, pattern="plain"))])
    assert math.isnan(accuracy(plain, plain)["second"])  # nowhere to be seen
    wrong = {name: torch.where(index == NOT_SHOWN, index, index + 1) for name, index in right.items()}
    assert accuracy(wrong, right)["superclass"] == 0
    right_for_absent = {name: index.clone() for name, index in wrong.items()}
    right_for_absent["object1_superclass"][0] = NOT_SHOWN  # there is no second object in the first picture
    assert accuracy(right_for_absent, right)["superclass"] == 0
    assert len(right["objects"]) == 2 and OBJECTS == 2


def test_a_reader_is_saved_and_loaded(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = Reader()
    model.save(tmp_path)
    again = Reader.load(tmp_path)
    pixels = draw_scenes([sample_scene(1), sample_scene(2)])[0]
    for name, logits in again(pixels).items():
        torch.testing.assert_close(logits, model(pixels)[name], atol=1e-2, rtol=1e-2)  # float16 in the file
    known = json.loads((tmp_path / "reader.json").read_text())
    known["heads"]["place"].remove("beach")
    (tmp_path / "reader.json").write_text(json.dumps(known))
    with pytest.raises(ValueError, match="heads \\['place'\\] are not those of world 2"):
        Reader.load(tmp_path)
    (tmp_path / "reader.json").write_text(json.dumps({**known, "world_version": 1}))
    with pytest.raises(ValueError, match="found world 1, expected world 2"):
        Reader.load(tmp_path)


def test_pictures_of_any_size_become_pixels() -> None:
    drawn = render(sample_scene(3)).image
    exact = as_pixels([Image.fromarray(drawn)])
    assert torch.equal(exact, draw_scenes([sample_scene(3)])[0])
    assert as_pixels([Image.new("L", (200, 128))]).shape == (1, 3, 64, 64)
