"""Toyland's report: what is counted as right, and the table of bars."""

from __future__ import annotations

import copy
import json
import math
from pathlib import Path

import pytest
import torch

from perfusion.cli import run_cli
from perfusion.toyland import measure, report
from perfusion.toyland.captions import Caption, asked
from perfusion.toyland.measure import Toyland, followed, identity_share, pixels_of, share_right
from perfusion.toyland.models import scheduler
from perfusion.toyland.reader import HEADS, Reader, labels
from perfusion.toyland.report import Row, at_least, at_most, table
from perfusion.toyland.train_diffusion import denoising_loss
from perfusion.toyland.world import COLOURS, SUPERCLASSES, Instance, concept_scene
from tests.pipelines import toyland_folder
from tests.scorers import make_scorer

CAT = Instance("cat", "red", "blue", "striped", "green", 1.0, 1.0)


def readings(*rows: dict[str, str]) -> dict[str, torch.Tensor]:
    """What a reader that saw `rows` would answer; the first option where a row is silent."""
    return {
        name: torch.tensor([options.index(row[name]) if name in row else 0 for row in rows])
        for name, options in HEADS.items()
    }


def test_followed_is_what_was_asked_and_is_there() -> None:
    wanted = asked(Caption(("a", "red", "cat", "at", "night"), nouns=(2,), adjectives=((1,),)))
    seen = {"place": "night", "style": "photo", "object0_superclass": "dog", "object0_body": "red"}
    (found,) = followed([wanted], readings(seen))
    assert found == {
        "objects": True, "style": True, "place": True, "object0_superclass": False, "object0_body": True,
    }  # fmt: skip


def test_share_right_takes_objects_in_the_better_order() -> None:
    asks = {
        "objects": "two", "style": "photo", "object0_superclass": "cat", "object0_body": "red",
        "object1_superclass": "dog",
    }  # fmt: skip
    shown = {"objects": "two", "object0_superclass": "dog", "object1_superclass": "cat", "object1_body": "blue"}
    read = {name: int(index[0]) for name, index in readings(shown).items()}
    assert share_right(asks, read) == 0.8
    assert share_right({"objects": "one", "object0_superclass": "cat"}, read) == 0


@pytest.mark.parametrize(
    ("left", "right", "both", "bound"),
    [
        (("cat", "red"), ("dog", "blue"), True, True),
        (("dog", "blue"), ("cat", "red"), True, True),  # sides do not matter
        (("cat", "blue"), ("dog", "red"), True, False),
        (("cat", "red"), ("cat", "blue"), False, False),
    ],
)
def test_colours_belong_to_their_superclass(left, right, both: bool, bound: bool) -> None:
    wanted = {
        "objects": "two", "object0_superclass": "cat", "object0_body": "red", "object1_superclass": "dog",
        "object1_body": "blue",
    }  # fmt: skip
    read = {"objects": 1}
    for i, (kind, colour) in enumerate((left, right)):
        read |= {f"object{i}_superclass": SUPERCLASSES.index(kind), f"object{i}_body": list(COLOURS).index(colour)}
    hits: dict[str, list[bool]] = {}
    measure._count_two(wanted, read, hits)
    assert hits == {"both superclasses": [both], "colours bound": [bound]}


def test_identity_is_the_share_of_an_instance_s_own_attributes() -> None:
    own = {"object0_body": "red", "object0_second": "blue", "object0_pattern": "striped", "object0_detail": "green"}
    read = readings(own, own | {"object0_body": "blue"}, own | {"object0_pattern": "plain"})
    scene = concept_scene(CAT, 5)
    assert [identity_share(read, i, scene) for i in range(3)] == [1.0, 0.75, 0.75]
    plain = Instance("cat", "red", "blue", "plain", "green", 1.0, 1.0)  # its second colour is nowhere
    unlike = readings(own | {"object0_pattern": "plain", "object0_second": "pink"})
    assert identity_share(unlike, 0, concept_scene(plain, 5)) == 1.0
    covered = concept_scene(CAT, 5, worn="sunglasses")  # and so are its eyes
    assert identity_share(readings(own | {"object0_detail": "red"}), 0, covered) == 1.0
    right = labels(scene)
    assert identity_share({name: torch.tensor([index]) for name, index in right.items()}, 0, scene) == 1.0


def test_renders_are_read_at_full_precision() -> None:
    pixels = pixels_of([concept_scene(CAT, 5)])
    assert pixels.shape == (1, 3, 64, 64) and torch.equal((pixels * 127.5 + 127.5).round() / 127.5 - 1, pixels)


def test_bars() -> None:
    assert at_least("x", 0.98, 0.98) == Row("x", 0.98, 0.98, True) and at_least("x", 0.97, 0.98).reached is False
    assert at_most("x", 0.02, 0.02).reached is True and at_most("x", 0.021, 0.02).reached is False
    assert at_least("x", math.nan, 0) == Row("x", None, 0, False) and at_most("x", math.nan, 9).reached is False
    assert at_most("x", 0.8 - 0.7, 0.1).reached is True  # which is a little more than 0.1 in binary
    lines = table([Row("one", 0.5, 0.4, True), Row("another", 0.25, 0.4, False), Row("third", 3.0)]).splitlines()
    assert lines[1:] == ["one        0.5  0.4  reached", "another   0.25  0.4  NOT reached", "third        3"]


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("weights")
    toyland_folder(folder).rename(folder / "pipeline")
    torch.manual_seed(0)
    Reader().save(folder / "reader")
    make_scorer(folder / "scorer")
    return folder


@pytest.fixture(scope="module")
def untrained(weights: Path) -> Toyland:
    return Toyland.load(weights)


def test_a_swap_changes_the_noun_s_encoding_alone(untrained: Toyland, monkeypatch: pytest.MonkeyPatch) -> None:
    given = []

    def generate(pipe, prompts, seed, what=""):
        given.append(prompts)
        return [measure.Image.new("RGB", (64, 64))] * len(prompts)

    monkeypatch.setattr(measure, "generate", generate)
    shares = measure.swapped(untrained, count=6)
    assert given[0].shape[0] == 6 and set(shares) == {"other", "own"}
    captions = []
    monkeypatch.setattr(measure, "_encode", lambda pipe, prompts: captions.append(prompts) or torch.zeros(2, 24, 128))
    measure.swapped(untrained, count=6)
    monkeypatch.undo()
    for mixed, (own, other) in zip(given[0], captions, strict=True):
        (noun,) = [i for i, (a, b) in enumerate(zip(own.split(), other.split(), strict=True)) if a != b]
        plain, changed = measure._encode(untrained.pipe, [own, other])
        assert torch.equal(mixed[noun + 1], changed[noun + 1])
        rest = [i for i in range(len(mixed)) if i != noun + 1]
        assert torch.equal(mixed[rest], plain[rest])


def test_fine_tuning_teaches_the_pipeline_s_own_prediction(untrained: Toyland, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its error on the training picture falls where noise and velocity differ most; the pipeline itself stays."""
    tuned, given = [], []

    def generate(pipe, prompts, seed, what=""):
        tuned.append(copy.deepcopy(pipe.unet))
        return [measure.Image.new("RGB", (64, 64))] * len(prompts)

    def loss(unet, schedule, latents, context, generator):
        given.append((latents, context))
        return denoising_loss(unet, schedule, latents, context, generator)

    before = {name: value.clone() for name, value in untrained.pipe.unet.state_dict().items()}
    monkeypatch.setattr(measure, "generate", generate)
    monkeypatch.setattr(measure, "denoising_loss", loss)
    measure.fine_tuning_curve(untrained, steps=(0, 20), rate=2e-3, images=2)
    (latents, context), steps = given[0], torch.full((8,), 990)
    noise = torch.randn(latents.shape, generator=torch.Generator().manual_seed(2))
    with torch.no_grad():
        noisy, velocity = (make(latents, noise, steps) for make in (scheduler().add_noise, scheduler().get_velocity))
        errors = [float((unet(noisy, steps, context).sample - velocity).square().mean()) for unet in tuned]
    assert errors[-1] < 0.8 * errors[0]
    assert all(torch.equal(value, before[name]) for name, value in untrained.pipe.unet.state_dict().items())


def test_the_command_measures_and_keeps_the_training_record(
    weights: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(measure, "STEPS", 1)
    small = {
        "reader_accuracy": {"count": 40}, "autoencoder_error": {"count": 4}, "retrieval": {"batches": 1, "size": 5},
        "identity_on_renders": {"count": 3}, "swapped": {"count": 2}, "compositions": {"each": 1},
        "images_per_second": {"batch": 1, "rounds": 1}, "fine_tuning_curve": {"steps": (0, 1), "images": 2},
    }  # fmt: skip
    for name, less in small.items():
        full = getattr(measure, name)
        monkeypatch.setattr(measure, name, lambda *args, full=full, less=less: full(*args, **less))
    out = weights / "report.json"
    training = {"reader": {"step": 3, "elapsed": 120.0, "loss": 0.5}}
    history = [{"samples": 1000, "minutes": 1.2, "worn": 0.5}, {"samples": 20000, "minutes": 24.0, "pairs": 0.25}]
    out.write_text(json.dumps({"training": training, "settings": {"scenes": 7}, "history": history}))
    sheet = tmp_path / "sheet.png"
    assert run_cli(report.main, [f"weights={weights}", "prompts=30", f"sheet={sheet}"]) == 0
    with measure.Image.open(sheet) as picture:
        assert picture.size == (2 * (8 * 66 - 2) + 16, 8 * 66 - 2)
        first = measure.Image.fromarray(measure.render(measure.fresh_scenes(1)[0]).image)
        assert picture.crop((0, 0, 64, 64)).tobytes() == first.tobytes()
    written = json.loads(out.read_text())
    assert written["training"] == training and written["world_version"] == 1
    rows = {row["name"]: row for row in written["bars"]}
    assert rows["reader on renders: place"]["bar"] == 0.99 and rows["reader on renders: place"]["reached"] is False
    assert 0 < rows["weights in all, MB"]["value"] < 40 and rows["weights in all, MB"]["reached"] is True
    asks = {"superclass", "body", "place", "photo", "sketch or mosaic", "both superclasses", "colours bound"}
    assert {f"prompts: {name}" for name in asks} <= rows.keys()
    assert [row["steps"] for row in written["details"]["fine_tuning"]] == [0, 1]
    assert "NOT reached" in capsys.readouterr().out
    card = (weights / "README.md").read_text()
    assert "| reader on renders: place | " in card and "| 0.99 | **not reached** |" in card
    assert "; scenes 7.\n" in card and "| reader | 3 | 2.0 | 0.5000 |" in card
    table = card[card.index("| what | 1,000 samples, 1 min | 20,000 samples, 24 min |") :].splitlines()
    assert table[1:4] == ["| --- | --- | --- |", "| worn | 0.5 |  |", "| pairs |  | 0.25 |"]
    elsewhere = tmp_path / "report.json"
    before = (weights / "README.md").stat().st_mtime_ns
    assert run_cli(report.main, [f"weights={weights}", "prompts=2", f"out={elsewhere}"]) == 0
    assert json.loads(elsewhere.read_text()).keys() == {"world_version", "bars", "details", "measured_with"}
    assert set(tmp_path.iterdir()) == {sheet, elsewhere}
    assert (weights / "README.md").stat().st_mtime_ns == before


def test_missing_weights_are_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "pipeline").mkdir()
    assert run_cli(report.main, [f"weights={tmp_path}"]) != 0
    assert f"{tmp_path} has no folder reader/" in capsys.readouterr().err
