"""The page of `python -m perfusion.studio`: what it does, without a browser; and the whole of it in Chromium."""

from __future__ import annotations

import dataclasses
import json
import os
import re
import shlex
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from perfusion.backbones.base import Backbone
from perfusion.cli import parse_key_values
from perfusion.concept import Concept, save_concept
from perfusion.concept_file import ConceptFileError
from perfusion.config import ConfigError
from perfusion.data.masks import find_masks, read_mask
from perfusion.generate import USAGE, GenerateConfig, _readable
from perfusion.manifest import read_manifest
from perfusion.methods.base import Word
from perfusion.studio import show
from perfusion.studio.__main__ import StudioConfig, main
from perfusion.studio.drawing import Drawing, Request, spread, values_of
from perfusion.studio.teaching import PAINTED, Lesson, Progress, Teaching
from perfusion.toyland.draw import render
from perfusion.toyland.world import sample_scene
from perfusion.training.run_folder import RunFolder
from tests.concepts import random_concept, untrained_concept
from tests.training import composed

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")
ARGS = ["--no-sandbox", "--disable-gpu", "--disable-background-networking", "--disable-component-update"]
ARGS += ["--disable-sync", "--no-first-run"]


@pytest.fixture
def drawing(toyland: Backbone, tmp_path: Path) -> Iterator[Drawing]:
    """With a cat and a dog below the root."""
    for kind in ("cat", "dog"):
        concept = untrained_concept(toyland, Word(f"<{kind}*>", kind), 0)
        save_concept(tmp_path / "default" / f"{kind}-run" / "concept.safetensors", concept)
    made = Drawing(StudioConfig(root=str(tmp_path)), toyland)
    yield made
    made.leave()


def file_of(drawing: Drawing, kind: str) -> str:
    return next(file for file, one in drawing.concepts().items() if one.superclass == kind)


def pixels(path: Path) -> np.ndarray:
    return np.asarray(Image.open(path)).astype(int)


# --- Drawing --------------------------------------------------------------------------------------------------------


def test_concepts_that_fit_are_found_wherever_they_lie(drawing: Drawing, backbone: Backbone, tmp_path: Path):
    save_concept(tmp_path / "sd.safetensors", untrained_concept(backbone, Word("<sd*>", "cat"), 0))
    (tmp_path / "broken.safetensors").write_bytes(b"no tensors")
    shutil.copytree(tmp_path / "default" / "cat-run", tmp_path / "default" / "cat-run" / ".new")
    shutil.copy(tmp_path / "default" / "dog-run" / "concept.safetensors", tmp_path / "shared.safetensors")
    labels = sorted(one.label for one in drawing.concepts().values())
    assert labels == ["<cat*> · cat-run", "<dog*> · dog-run", "<dog*> · shared.safetensors"]


def test_a_row_over_a_dial_and_the_base_model_from_the_same_noise(drawing: Drawing, tmp_path: Path):
    request = Request(
        (file_of(drawing, "cat"),), "a photo of a <cat*>", ({"tau": 0.2},), seed=3, num=1, steps=2, row="beta",
        values=(0.2, 1.4), base=True,
    )  # fmt: skip
    *_, (row, base) = drawing.draw(request)
    assert row.captions == ["β 0.2", "β 1.4"] and base.title == "base model: a photo of a cat"
    assert np.abs(pixels(row.files[0]) - pixels(row.files[1])).max() > 10
    assert np.abs(pixels(row.files[0]) - pixels(base.files[0])).max() > 10
    records = {record.file: record for record in read_manifest(row.files[0].parent)}
    assert [dict(records[file.name].dials) for file in row.files] == [
        {"beta": beta, "tau": 0.2, "key_lock": "local"} for beta in (0.2, 1.4)
    ]
    assert records[base.files[0].name].concept_hash is None and records[base.files[0].name].seed == 3

    plain = Request((), "a photo of a cat", seed=3, num=1, steps=2)
    ((alone,),) = drawing.draw(plain)
    assert np.array_equal(pixels(alone.files[0]), pixels(base.files[0]))


def test_dials_are_those_of_the_method_whichever_it_is(backbone: Backbone, tmp_path: Path):
    file = tmp_path / "style.safetensors"
    save_concept(file, random_concept(backbone, Word("<cat*>", "cat"), 0, name="lora"))
    drawing = Drawing(StudioConfig(root=str(tmp_path)), backbone)
    (found,) = drawing.concepts().values()
    assert [*found.dials] == ["scale"]
    request = Request((str(file),), "a photo of a <cat*>", num=1, steps=1, row="scale", values=(0.0, 1.0))
    ((row,),) = drawing.draw(request)
    drawing.leave()
    assert row.captions == ["scale 0", "scale 1"] and not np.array_equal(*map(pixels, row.files))


def test_a_picture_that_lies_there_is_not_drawn_again(drawing: Drawing, monkeypatch: pytest.MonkeyPatch):
    request = Request((file_of(drawing, "cat"),), "a photo of a <cat*>", num=2, steps=1)
    ((first,),) = drawing.draw(request)
    monkeypatch.setattr(type(drawing.backbone.pipe), "__call__", lambda *_, **__: pytest.fail("drawn again"))
    ((second,),) = drawing.draw(request)
    assert second.files == first.files


def test_a_change_of_the_choice_leaves_the_model_as_it_was(drawing: Drawing):
    cat, dog = file_of(drawing, "cat"), file_of(drawing, "dog")
    assert [one.concept.placeholder for one in drawing.choose([cat, dog])] == ["<cat*>", "<dog*>"]
    with pytest.raises(ConfigError, match=r"have the same word, <cat\*>"):
        drawing.choose([cat, dog, cat])
    assert not drawing.attached and "<cat*>" not in drawing.backbone.pipe.tokenizer.get_vocab()  # type: ignore[attr-defined]
    assert drawing.choose([dog])[0] is drawing.choose([dog])[0]


@pytest.mark.parametrize("row", ["", "beta"])
def test_the_command_is_one_that_generate_takes(drawing: Drawing, row: str):
    files = (file_of(drawing, "cat"), file_of(drawing, "dog"))
    request = Request(files, "<cat*> and <dog*>", ({"beta": 0.5}, {}), seed=7, num=3, row=row, values=(0.4, 0.9))
    words = shlex.split(drawing.command(request))
    assert words[:3] == ["python", "-m", "perfusion.generate"]
    config = parse_key_values([_readable(word) for word in words[3:]], GenerateConfig, USAGE)
    assert [Path(place) / "concept.safetensors" for place in config.concept] == [Path(file) for file in files]
    assert (config.prompt, config.seed, config.num, config.scheduler) == ("<cat*> and <dog*>", 7, 3, "dpm++")
    assert config.dials["beta"] == ("0.4,0.9" if row else [[0.5, None]])


def test_a_grid_is_scored_against_the_pictures_of_the_training(drawing: Drawing, tmp_path: Path):
    file = file_of(drawing, "cat")
    request = Request((file,), "a photo of a <cat*>", num=1, steps=2)
    with pytest.raises(ConfigError, match="references: not given"):
        list(drawing.compare(request, "beta", [0.3], "tau", [0.1], scored=True))
    RunFolder(Path(file).parent).begin(composed(f"run.dir={Path(file).parent}"))
    *_, rows = drawing.compare(request, "beta", [0.3, 1.4], "tau", [0.1, 0.4], scored=True)
    assert [row.title for row in rows] == ["τ 0.1", "τ 0.4"]
    assert all({*score} == {"clip_i", "clip_t", "harmonic"} for row in rows for score in row.scores)
    best = max(score["harmonic"] for row in rows for score in row.scores)
    assert show.grids([("cat", rows)], tmp_path).count('class="best"') == [
        score["harmonic"] for row in rows for score in row.scores
    ].count(best)


def test_a_file_is_added_once(drawing: Drawing, backbone: Backbone, tmp_path: Path):
    given = Path(file_of(drawing, "dog"))
    assert drawing.add(given) == drawing.add(given) and Path(drawing.add(given)).name == "dog.safetensors"
    foreign = tmp_path / "foreign" / "sd.safetensors"
    save_concept(foreign, untrained_concept(backbone, Word("<sd*>", "cat"), 0))
    with pytest.raises(ConceptFileError, match="another backbone"):
        drawing.add(foreign)


def test_values_of_a_dial(drawing: Drawing):
    beta, lock = (drawing.concepts()[file_of(drawing, "cat")].dials[name] for name in ("beta", "key_lock"))
    assert values_of(beta, "0.4, 1") == [0.4, 1.0] and values_of(lock, "local,global") == ["local", "global"]
    assert values_of(beta, ", ".join(map(str, spread(beta)))) == spread(beta)
    for wrong in ("", "0.4, 0.4", "strong"):
        with pytest.raises(ConfigError, match="beta: found"):
            values_of(beta, wrong)


# --- Teaching -------------------------------------------------------------------------------------------------------


@pytest.fixture
def photos(tmp_path: Path) -> list[Path]:
    """Two of a cat, one of them wide, of one name in two folders."""
    made = []
    for k, size in enumerate([(64, 64), (120, 64)]):
        path = tmp_path / f"upload{k}" / "cat.png"
        path.parent.mkdir()
        Image.fromarray(render(sample_scene(k, superclass="cat", objects=1)).image).resize(size).save(path)
        made.append(path)
    return made


@pytest.fixture
def teaching(tmp_path: Path) -> Teaching:
    from perfusion.backbones import backbone_config

    return Teaching(StudioConfig(root=str(tmp_path / "runs")), backbone_config("toyland"))


def test_the_words_of_a_lesson_are_a_config_of_these_photos(teaching: Teaching, photos: list[Path]):
    mask = np.zeros((64, 120), np.uint8)
    mask[10:50, 90:] = 255
    lesson = Lesson(
        tuple(photos), masks=PAINTED, painted={str(photos[1]): mask}, superclass="cat", placeholder="<my*>",
        method="lora", steps=7, more="seed=3",
    )  # fmt: skip
    words = teaching.words(lesson, write=True)
    assert shlex.split(teaching.command(lesson)) == ["python", "-m", "perfusion.train", *words]
    config = composed(*words)
    assert (config.method["name"], config.method["steps"], config.seed) == ("lora", 7, 3)
    assert (config.concept.superclass, config.concept.placeholder, config.concept.name) == ("cat", "<my*>", "my")
    images = sorted(Path(config.concept.images).glob("*.png"))
    assert [image.read_bytes() for image in images] == [photos[1].read_bytes(), photos[0].read_bytes()]  # cat-2, cat
    painted, whole = (read_mask(file) for file in find_masks(config.concept.masks, images))
    assert np.array_equal(painted > 0, mask > 0) and whole.min() == 1


def test_the_words_for_weights_of_ones_own(photos: list[Path], tmp_path: Path):
    from perfusion.backbones import backbone_config

    options = StudioConfig("sd15", "/models/sd15", root=str(tmp_path), scorer="ViT-B-32", pretrained="openai")
    teaching = Teaching(options, backbone_config("sd15", "/models/sd15"))
    assert not teaching.kinds and teaching.methods["perfusion"] == 400
    lesson = Lesson(superclass="teddy bear", placeholder="<teddy*>", steps=400)
    with pytest.raises(ConfigError, match="no photos yet"):
        teaching.words(lesson)
    config = composed(*teaching.words(dataclasses.replace(lesson, photos=(photos[0],))))
    assert (config.backbone.name, config.backbone.path) == ("stable_diffusion", "/models/sd15")
    assert (config.concept.superclass, config.concept.masks, config.run.root) == ("teddy bear", None, str(tmp_path))
    assert config.callbacks["select"]["scorer"] == "ViT-B-32" and config.method["batch_size"] == 16


def test_what_no_mask_covers_is_pale_in_the_crops(teaching: Teaching, photos: list[Path]):
    mask = np.zeros((64, 120), np.uint8)
    mask[:, 100:] = 255
    lesson = Lesson(tuple(photos), superclass="cat", placeholder="<cat*>")
    central = teaching.crops(lesson)
    painted = teaching.crops(Lesson(tuple(photos), masks=PAINTED, painted={str(photos[1]): mask}))
    assert [square.size for square in painted] == [(64, 64)] * 2 and painted[0].tobytes() == central[0].tobytes()
    wide = np.asarray(Image.open(photos[1]).convert("RGB"))[:, -64:]
    assert np.array_equal(np.asarray(painted[1])[:, -20:], wide[:, -20:]), "the crop goes where the mask is"
    assert np.asarray(painted[1])[:, :40].min() >= 191


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"superclass": " "}, "concept.superclass: what is it"),
        ({"placeholder": ""}, "concept.placeholder"),
        ({"more": "-m seed=1,2"}, "'-m': expected key=value"),
        ({"more": "sede=1"}, "sede: unknown key"),
    ],
)
def test_what_is_wrong_is_said_before_anything_runs(teaching: Teaching, change: dict[str, Any], message: str):
    lesson = Lesson(**{"superclass": "cat", "placeholder": "<cat*>", **change})
    with pytest.raises(ConfigError, match=message):
        teaching.start(lesson)
    assert teaching.training is None


@pytest.mark.slow
def test_a_training_that_is_refused_says_why_and_leaves_nothing(teaching: Teaching):
    teaching.start(Lesson(superclass="cat", placeholder="<cat*>", more="seed=-1"))
    with pytest.raises(ConfigError, match="a training runs already"):
        teaching.start(Lesson(superclass="dog", placeholder="<dog*>"))
    training = teaching.training
    while training.progress().running:
        time.sleep(0.2)
    now = training.progress()
    assert (now.state, now.said) == ("failed", "seed=-1: expected a whole number from 0 to 4294967295")
    assert not training.folder.path.exists() and "seed=-1" in show.progress(now)


def test_what_is_shown_is_text():
    assert show.wrong(ConfigError("<b>")) == '<div class="wrong">&lt;b&gt;</div>'
    with pytest.raises(ZeroDivisionError):
        show.wrong(ZeroDivisionError())
    said = show.progress(Progress("failed", 1.0, 3, 10, None, [0.4, 0.3, 0.2], {}, "<i>"))
    assert "&lt;i&gt;" in said and "<polyline" in said and "width:30.0%" in said


# --- The command and the page ---------------------------------------------------------------------------------------


def test_without_gradio_it_says_what_to_install(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setitem(sys.modules, "gradio", None)
    with pytest.raises(ConfigError, match="extra studio of this package"):
        main([])
    with pytest.raises(ConfigError, match="prot: unknown key"):
        main(["prot=1"])


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    """The studio's page in Chromium, on an empty root."""
    pytest.importorskip("gradio", reason="gradio is not installed (the extra studio)")
    api = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
    if CHROMIUM is None:
        pytest.skip("no chromium is installed here")
    root = tmp_path_factory.mktemp("studio")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    log = root / "log.txt"
    command = [sys.executable, "-m", "perfusion.studio", f"root={root / 'runs'}", f"port={port}", "open=false"]
    with open(log, "w") as file:
        server = subprocess.Popen(command, stdout=file, stderr=subprocess.STDOUT, env={**os.environ, "NO_PROXY": "*"})
    try:
        while "studio: http" not in log.read_text():
            assert server.poll() is None, log.read_text()
            time.sleep(0.2)
        with api.sync_playwright() as playwright:
            browser = playwright.chromium.launch(executable_path=CHROMIUM, args=ARGS)
            page = browser.new_page(viewport={"width": 1400, "height": 1000})
            page.set_default_timeout(240_000)
            page.asked, page.errors, page.root = [], [], root / "runs"
            page.on("request", lambda request: page.asked.append(request.url))
            page.on("pageerror", lambda error: page.errors.append(str(error)))
            page.goto(f"http://127.0.0.1:{port}")
            yield page
            outside = [url for url in page.asked if not url.startswith((f"http://127.0.0.1:{port}/", "data:", "blob:"))]
            assert not outside and not page.errors
            browser.close()
    finally:
        server.terminate()
        server.wait(60)


def first_picture(page: Any) -> str:
    return page.locator("#pictures img").first.get_attribute("src")


def test_a_stranger_teaches_a_toy_and_draws_it(page: Any, photos: list[Path], tmp_path: Path):
    page.get_by_role("tab", name="Teach").click()
    page.locator("input[type=file]").first.set_input_files([str(photos[0]), str(photos[1])])
    page.wait_for_function("() => document.querySelectorAll('#crops img').length == 2")
    page.get_by_role("button", name="Method, steps and more").click()
    more = page.get_by_label("More words of the command line")
    more.fill("sede=1")
    more.press("Tab")
    page.wait_for_function("() => document.body.innerText.includes('sede=1')")
    page.locator("#teach").click()
    page.get_by_text("sede: unknown key").wait_for()  # the command's own sentence

    small = ["method.steps=200", "method.batch_size=1", "callbacks.checkpoint.every=2", "callbacks.select.every=100"]
    small += ["callbacks.select.steps=2", "backbone.steps=2", "backbone.covariance.count=50"]
    more.fill(" ".join([*small, f"backbone.covariance.cache={tmp_path}"]))
    more.press("Tab")
    page.wait_for_function("() => document.body.innerText.includes('covariance.count=50')")
    page.locator("#teach").click()
    page.get_by_text(re.compile(r"^Step ([2-9]|\d\d+) of 200")).wait_for()  # a checkpoint is there
    page.get_by_role("button", name="Stop").click()
    page.get_by_text("Stopped at step").first.wait_for()
    page.get_by_role("button", name="Go on").click()
    page.locator("#use").wait_for()
    (run,) = page.root.glob("default/*")
    assert "going on at step" in (run / "output.log").read_text() and (run / "DONE").exists()
    assert page.locator("#status polyline").count() == 2 and page.locator(".strip img").count() == 2

    page.locator("#use").click()
    page.wait_for_function("() => document.querySelectorAll('#pictures img').length == 4")
    assert "<cat*>" in page.locator("#prompt textarea").input_value()
    before = first_picture(page)
    strength = page.get_by_label("number input for β of <cat*>")
    strength.fill("0.2")
    strength.press("Enter")
    page.wait_for_function("src => document.querySelector('#pictures img').getAttribute('src') != src", arg=before)
    page.get_by_label("Base model beside it").click()
    page.wait_for_function("() => document.querySelectorAll('#pictures img').length == 8")
    (folder,) = (page.root / "studio").glob("cat-*")
    betas = {entry.get("beta") for entry in json.loads((folder / "manifest.json").read_text())}
    assert betas == {0.85, 0.2, None}  # as taught, as set, and the base model's
    assert Concept.load(run / "concept.safetensors").placeholder == "<cat*>"


def test_the_page_serves_nothing_but_what_lies_below_the_root(page: Any):
    (page.root.parent / "secret.txt").write_text("secret")
    (page.root / "link.txt").symlink_to(page.root.parent / "secret.txt")
    (page.root / "open.txt").write_text("open")
    served = {
        name: page.request.get(f"{page.url}files/{name}") for name in ("open.txt", "link.txt", "%2e%2e/secret.txt")
    }
    assert {name: answer.status for name, answer in served.items()} == {
        "open.txt": 200, "link.txt": 404, "%2e%2e/secret.txt": 404,
    }  # fmt: skip
    assert page.request.get(f"{page.url}gradio_api/file={page.root.parent / 'secret.txt'}").status == 403
