"""Toyland's report: what is counted as right, what is measured, and the table of bars."""

from __future__ import annotations

import copy
import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import open_clip
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

from perfusion.cli import run_cli
from perfusion.toyland.build import following, measure, probes, report, shipped
from perfusion.toyland.build.counting import followed, hits_by_row, identity_share, share_right
from perfusion.toyland.build.following import Drawn, edge_gradient, sharpness, told_template
from perfusion.toyland.build.measure import picture
from perfusion.toyland.build.report import BARS, row, table
from perfusion.toyland.build.shipped import Toyland
from perfusion.toyland.build.train_diffusion import denoising_loss
from perfusion.toyland.captions import asked, described, parse, vocabulary
from perfusion.toyland.models import TEXT_POSITIONS, scheduler, scorer_config
from perfusion.toyland.reader import HEADS, Reader, Wish
from perfusion.toyland.tokenizer import build_tokenizer
from perfusion.toyland.world import HELD_OUT, LIVING, Instance, concept_scene, sample_instance, sample_scene
from tests.pipelines import toyland_folder

CAT = Instance("cat", "red", "blue", "striped", "green")


def shown(**options: str) -> dict[str, str]:
    """What a reader sees that was told `options`; the first option of every head that they leave out."""
    return {name: values[0] for name, values in HEADS.items()} | options


def test_followed_is_what_was_asked_and_is_there() -> None:
    asks = asked(parse("a red cat at night"))
    seen = shown(place="night", object0_superclass="dog", object0_body="red")
    assert followed(asks, seen) == {
        "objects": True, "style": True, "place": True, "object0_superclass": False, "object0_body": True,
    }  # fmt: skip


def test_share_right_takes_objects_in_the_better_order() -> None:
    asks = {
        "objects": "two", "style": "photo", "object0_superclass": "cat", "object0_body": "red",
        "object1_superclass": "dog",
    }  # fmt: skip
    seen = shown(objects="two", object0_superclass="dog", object1_superclass="cat", object1_body="blue")
    assert share_right(asks, seen) == 0.8
    assert share_right({"objects": "one", "object0_superclass": "cat"}, seen) == 0


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
    seen = shown(objects="two")
    for i, (kind, colour) in enumerate((left, right)):
        seen |= {f"object{i}_superclass": kind, f"object{i}_body": colour}
    source = parse("a red cat and a blue dog")
    assert hits_by_row([source], [seen]) == {"both superclasses": [both], "colours bound": [bound]}
    alone = hits_by_row([source], [{**seen, "objects": "one"}])
    assert alone == {"both superclasses": [False], "colours bound": [False]}
    assert hits_by_row([parse("a red cat and a dog")], [seen]) == {"both superclasses": [both]}, "one colour named"


def test_rows_count_the_captions_that_ask_for_them() -> None:
    texts = ("a green-eyed plain red cat", "a red-trimmed blue spotted pink mug", "a mosaic of a striped teddy")
    seen = [
        shown(object0_superclass="cat", object0_body="red", object0_pattern="plain", object0_detail="blue"),
        shown(object0_superclass="mug", object0_body="pink", object0_pattern="patched", object0_second="blue",
              object0_detail="red"),
        shown(style="mosaic", object0_superclass="teddy", object0_pattern="striped"),
    ]  # fmt: skip
    assert hits_by_row([parse(text) for text in texts], seen) == {
        "objects": [True] * 3, "superclass": [True] * 3, "photo": [True] * 2, "sketch or mosaic": [True],
        "body": [True] * 2, "plain": [True], "pattern": [False, True], "second": [True],
        "eyes": [False], "detail": [False, True],
    }  # fmt: skip


def test_identity_is_the_share_of_an_instance_s_own_attributes() -> None:
    own = shown(object0_body="red", object0_second="blue", object0_pattern="striped", object0_detail="green")
    scene = concept_scene(CAT, 5)
    changed = [own, own | {"object0_body": "blue"}, own | {"object0_pattern": "plain"}]
    assert [identity_share(scene, seen) for seen in changed] == [1.0, 0.75, 0.75]
    plain = concept_scene(Instance("cat", "red", "blue", "plain", "green"), 5)  # its second colour is nowhere
    assert identity_share(plain, own | {"object0_pattern": "plain", "object0_second": "pink"}) == 1.0
    covered = concept_scene(CAT, 5, worn="sunglasses")  # and so are its eyes
    assert identity_share(covered, own | {"object0_detail": "red"}) == 1.0


def test_outlines_of_pictures_are_compared_with_those_of_their_renders() -> None:
    half = torch.zeros(1, 3, 40, 40)
    half[..., 20:] = 0.6  # an edge of 39 of 39 x 39 gradients, fewer than those that count
    step = 0.6 * 3**0.5
    counted = round(following.EDGES * 39 * 39)
    assert edge_gradient(half) == pytest.approx(step * 39 / counted, rel=1e-5)
    scenes = [sample_scene(i, style="photo") for i in range(4)] + [sample_scene(9, style="mosaic")]
    images = [picture(scene) for scene in scenes]
    same = Drawn(scenes, [], images, [])
    assert sharpness(same) == pytest.approx(1)
    soft = [image.resize((16, 16), Image.Resampling.BOX).resize((64, 64), Image.Resampling.BICUBIC) for image in images]
    assert sharpness(Drawn(scenes, [], soft, [])) < 0.6
    assert sharpness(Drawn(scenes, [], [*images[:4], soft[4]], [])) == pytest.approx(1), "photos alone"


def test_toys_are_told_with_one_thing_more() -> None:
    rng = np.random.default_rng(0)
    kinds = []
    for i in range(400):
        kind, template = told_template(i, rng)
        toy = sample_instance(rng, kind)
        plain, told = asked(parse(template.format(kind))), asked(parse(template.format(described(toy))))
        beside = {n: v for n, v in plain.items() if n not in ("objects", "object0_superclass") and v != "photo"}
        assert len(beside) == 1 and plain.items() <= told.items()
        (thing,) = beside.values()
        assert (kind, thing) not in HELD_OUT
        kinds.append(next(iter(beside)))
        looks = {name: getattr(toy, name) for name in ("body", "pattern")}
        looks |= {} if toy.pattern == "plain" else {"second": toy.second}
        looks |= {} if thing == "mosaic" else {"detail": toy.detail}
        assert {name: told.get(f"object0_{name}") for name in looks} == looks, template
    assert all(kinds.count(name) == 100 for name in ("place", "object0_worn", "object0_support", "style"))


def test_bars() -> None:
    assert row("sharpness", 0.7) == {"name": "sharpness", "value": 0.7, "bar": 0.7, "reached": True}
    assert row("sharpness", 0.6999)["reached"] is False
    assert row("weights in all, MB", 30.0)["reached"] is True and row("weights in all, MB", 30.1)["reached"] is False
    assert row("compositions, seen minus unseen", 0.8 - 0.7)["reached"] is True, "a little more than 0.1 in binary"
    assert row("reader on reconstructions, drop: place", 0.021)["reached"] is False
    for name in ("sharpness", "weights in all, MB"):
        assert row(name, math.nan) == {"name": name, "value": None, "bar": BARS[name], "reached": False}
    assert row("prompts: photo", 0.123456) == {"name": "prompts: photo", "value": 0.1235, "bar": None, "reached": None}
    lines = table([row("sharpness", 0.75), row("images per second", 2.5), row("third", 3.0)]).splitlines()
    assert lines[1:] == [
        "sharpness           0.75  0.7  reached",
        "images per second    2.5    8  NOT reached",
        "third                  3",
    ]


def make_scorer(folder: Path) -> None:
    """The scorer before its training, as `train_scorer` would leave it."""
    config = scorer_config()
    shape = config["model_cfg"]
    model = open_clip.CLIP(shape["embed_dim"], shape["vision_cfg"], shape["text_cfg"])
    folder.mkdir()
    save_file(model.state_dict(), folder / "open_clip_model.safetensors")
    (folder / "open_clip_config.json").write_text(json.dumps(config))
    build_tokenizer(vocabulary(), TEXT_POSITIONS).save_pretrained(folder)


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
    return Toyland(weights, steps=2)


class Fake:
    """In the place of `Toyland`: keeps what it is asked to draw, and draws the render of each prompt's scene."""

    def __init__(self, toyland: Toyland) -> None:
        self.reader, self.encode = toyland.reader, toyland.encode
        self.asked: list[Any] = []

    def draw(self, prompts: Any, seed: int, what: str = "") -> list[Image.Image]:
        self.asked.append(prompts)
        return [Image.new("RGB", (64, 64))] * len(prompts)


def test_a_swap_changes_the_noun_s_encoding_alone(untrained: Toyland, monkeypatch: pytest.MonkeyPatch) -> None:
    given: list[Any] = []
    fake: Any = Fake(untrained)
    monkeypatch.setattr(fake, "encode", lambda captions: given.append(captions) or untrained.encode(captions))
    assert set(following.swapped(fake, count=6)) == {"other", "own"}
    (mixed,), (sources, others) = fake.asked, given
    plain, changed = untrained.encode(sources), untrained.encode(others)
    for i, (source, other) in enumerate(zip(sources, others, strict=True)):
        noun = source.nouns[0]
        assert source.words[noun] != other.words[noun]
        differ = {a for a, b in zip(source.words, other.words, strict=True) if a != b} - {source.words[noun]}
        assert differ <= {"a", "an", "eyed", "trimmed"}
        assert (set(other.words) & {"eyed", "trimmed"} == {"eyed"}) == (
            "-" in other.words and other.words[noun] in LIVING
        )
        assert torch.equal(mixed[i, noun + 1], changed[i, noun + 1])
        rest = [k for k in range(mixed.shape[1]) if k != noun + 1]
        assert torch.equal(mixed[i, rest], plain[i, rest])


def test_told_toys_are_judged_as_scores_judge_them(untrained: Toyland, monkeypatch: pytest.MonkeyPatch) -> None:
    judged: list[Wish] = []

    def judge(reader: Reader, images: list[Image.Image], wishes: list[Wish]) -> list[dict[str, float]]:
        judged.extend(wishes)
        return [{"identity": 0.5, "prompt": i / 2, "superclass": 1.0} for i in range(len(wishes))]

    monkeypatch.setattr(following, "judge", judge)
    fake: Any = Fake(untrained)
    assert following.told_all_looks(fake, 3) == {"identity": 0.5, "prompt": 0.5, "superclass": 1.0}
    for text, wish in zip(fake.asked[0], judged, strict=True):
        ((kind, toy),) = wish.toys.items()
        assert text == wish.text.replace(kind, described(toy)) and toy.superclass == kind


@pytest.mark.slow
def test_processes_draw_what_one_draws(weights: Path, untrained: Toyland, monkeypatch: pytest.MonkeyPatch) -> None:
    prompts = [f"a photo of a {colour} cat" for colour in ("red", "blue", "green")] * 6  # two batches
    alone = untrained.draw(prompts, 7)
    assert len(alone) == 18 and alone[0].tobytes() != alone[3].tobytes() != alone[16].tobytes()
    together = Toyland(weights, processes=2, steps=2).draw(prompts, 7)
    apart = [np.abs(np.asarray(a, int) - np.asarray(b, int)).max() for a, b in zip(alone, together, strict=True)]
    assert max(apart) <= 2
    embedded = untrained.encode([parse(prompt) for prompt in prompts[:2]])
    few = untrained.draw(embedded, 7)
    assert np.abs(np.asarray(few[1], int) - np.asarray(untrained.draw(prompts[:2], 7)[1], int)).max() <= 2


def test_speed_is_that_of_few_steps_on_two_threads(untrained: Toyland, monkeypatch: pytest.MonkeyPatch) -> None:
    steps, threads = [], []
    forward = untrained.pipe.unet.forward

    def spy(noisy: torch.Tensor, step: torch.Tensor, **rest: Any) -> Any:
        steps.append(noisy.shape[0])
        threads.append(torch.get_num_threads())
        return forward(noisy, step, **rest)

    before = torch.get_num_threads()
    monkeypatch.setattr(untrained.pipe.unet, "forward", spy)
    assert measure.images_per_second(untrained.pipe, batch=3, rounds=1) > 0
    assert steps == [6] * 24 and {*threads} == {2}, "12 steps, one round to warm up, with guidance"
    assert torch.get_num_threads() == before and type(untrained.pipe.scheduler).__name__ == "DDIMScheduler"


@pytest.mark.slow
def test_fine_tuning_teaches_the_pipeline_s_own_prediction(untrained: Toyland, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its error on the training picture falls where noise and velocity differ most; the pipeline itself stays."""
    tuned, given = [], []

    def generate(pipe, prompts, seed, what=""):
        tuned.append(copy.deepcopy(pipe.unet))
        return [Image.new("RGB", (64, 64))] * len(prompts)

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


@pytest.mark.slow
def test_the_command_measures_and_keeps_the_training_record(
    weights: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(shipped, "Toyland", lambda *args: Toyland(*args, steps=1))
    small: dict[Any, dict[str, Any]] = {
        measure: {
            "reader_accuracy": {"count": 40}, "autoencoder_error": {"count": 4}, "retrieval": {"batches": 1, "size": 5},
            "identity_on_renders": {"count": 3}, "images_per_second": {"batch": 1, "rounds": 1},
            "fine_tuning_curve": {"steps": (0, 1), "images": 1},
        },
        following: {"told_all_looks": {"count": 4}, "swapped": {"count": 2}, "compositions": {"each": 1}},
        probes: {"noun_says": {"count": 40}, "read_at_noun": {"count": 4}},
    }  # fmt: skip
    for module, functions in small.items():
        for name, less in functions.items():
            full = getattr(module, name)
            monkeypatch.setattr(module, name, lambda *args, full=full, less=less: full(*args, **less))
    out = weights / "report.json"
    training = {"reader": {"step": 3, "elapsed": 120.0, "loss": 0.5}}
    out.write_text(json.dumps({"training": training, "settings": {"scenes": 7}}))
    sheet = tmp_path / "sheet.png"
    assert run_cli(report.main, [f"weights={weights}", "prompts=30", f"sheet={sheet}", "processes=1"]) == 0
    with Image.open(sheet) as drawn:
        assert drawn.size == (2 * (8 * 66 - 2) + 16, 8 * 66 - 2)
        assert drawn.crop((0, 0, 64, 64)).tobytes() == picture(measure.fresh_scenes(1)[0]).tobytes()
    written = json.loads(out.read_text())
    assert written["training"] == training and written["world_version"] == 2
    rows = {row["name"]: row for row in written["bars"]}
    assert rows["reader on renders: place"]["bar"] == 0.98 and rows["reader on renders: place"]["reached"] is False
    assert rows["weights in all, MB"]["value"] > 0 and rows["weights in all, MB"]["reached"] is False  # float32
    assert {name: row["bar"] for name, row in rows.items() if row["bar"] is not None} == BARS
    asks = {"photo", "plain", "eyes", "clip_t_correlation, less the render's", "clip_i_correlation"}
    assert {f"prompts: {name}" for name in asks} <= rows.keys()
    assert {f"noun's token says{which}, in the scorer: pattern" for which in ("", ", two toys")} <= rows.keys()
    assert [row["steps"] for row in written["details"]["fine_tuning"]] == [0, 1]
    assert "NOT reached" in capsys.readouterr().out
    card = (weights / "README.md").read_text()
    assert "| reader on renders: place | " in card and "| 0.98 | **not reached** |" in card
    assert f"two threads on {written['measured_with']['cpu']}." in " ".join(card.split())
    assert "; scenes 7.\n" in card and "| reader | 3 | 2.0 | 0.5000 |" in card
    elsewhere = tmp_path / "report.json"
    before = (weights / "README.md").stat().st_mtime_ns
    assert run_cli(report.main, [f"weights={weights}", "prompts=2", "processes=1", f"out={elsewhere}"]) == 0
    assert json.loads(elsewhere.read_text()).keys() == {"world_version", "bars", "details", "measured_with"}
    assert set(tmp_path.iterdir()) == {sheet, elsewhere}
    assert (weights / "README.md").stat().st_mtime_ns == before


def test_missing_weights_are_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "pipeline").mkdir()
    assert run_cli(report.main, [f"weights={tmp_path}"]) != 0
    assert f"{tmp_path} has no folder reader/" in capsys.readouterr().err
