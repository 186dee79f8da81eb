"""From a concept file to pictures that say where they come from."""

from __future__ import annotations

import dataclasses
import json
import re
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import perfusion
from perfusion import drawing, manifest
from perfusion.backbones import backbone_config
from perfusion.backbones.base import Backbone, BackboneError
from perfusion.cli import run_cli
from perfusion.concept import Concept, save_concept
from perfusion.config import ConfigError
from perfusion.generate import GenerateConfig, generate, main
from perfusion.manifest import ImageRecord, read_manifest, slug
from perfusion.methods.base import Word, build
from tests.concepts import random_concept, toyland_backbone, untrained_concept
from tests.drawing import batch_sizes
from tests.pipelines import toyland_folder

BEACH = "a photo of <cat*> on the beach"
STEPS = 2


@pytest.fixture(scope="module")
def pipeline(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return toyland_folder(tmp_path_factory.mktemp("pipeline"))


@pytest.fixture(scope="module")
def backbone(pipeline: Path, tmp_path_factory: pytest.TempPathFactory) -> Backbone:
    return toyland_backbone(pipeline, tmp_path_factory.mktemp("covariance"))


@pytest.fixture(scope="module")
def concept(backbone: Backbone, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A file whose values are far from the superclass's, so that its pictures are, too."""
    method = build({"name": "perfusion"}, Word("<cat*>", "cat"))
    method.attach(backbone)
    with torch.no_grad():
        for parameter in method.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=torch.Generator().manual_seed(0)))
    path = tmp_path_factory.mktemp("concept") / "concept.safetensors"
    save_concept(path, Concept.of(method, backbone, seed=0))
    method.detach()
    return path


@pytest.fixture(autouse=True)
def loaded(backbone: Backbone, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> list[str]:
    """Nothing is loaded twice, and what is written by default lands in the test's folder. Holds what was asked for."""
    asked: list[str] = []

    def load(config) -> Backbone:
        asked.append(config.path)
        return backbone

    monkeypatch.setattr(type(backbone), "load", load)
    monkeypatch.chdir(tmp_path)
    return asked


def run(concept: Path, *words: str) -> int:
    return run_cli(main, [f"concept={concept}", f"steps={STEPS}", "device=cpu", *words])


def draw(backbone: Backbone, prompts: Sequence[str], seeds: Sequence[int], **settings: float) -> list[bytes]:
    """The same by stock calls, with nothing of ours but the concept."""
    backbone.pipe.set_progress_bar_config(disable=True)
    guidance = settings.pop("guidance", 4.0)
    images = []
    for prompt, seed in zip(prompts, seeds, strict=True):
        generator = torch.Generator().manual_seed(seed)
        images.append(
            backbone.pipe(prompt, generator=generator, num_inference_steps=STEPS, guidance_scale=guidance).images[0]
        )
    return [image.tobytes() for image in images]


def pixels(folder: Path) -> dict[str, bytes]:
    return {record.file: Image.open(folder / record.file).tobytes() for record in read_manifest(folder)}


def shown_last(grid: Path, side: int) -> bytes:
    """The picture at the end of a sheet."""
    image = Image.open(grid)
    gap = round(side / 14)
    right, bottom = image.width - gap, image.height - gap
    return image.crop((right - side, bottom - side, right, bottom)).tobytes()


def enlarged(picture: Image.Image, factor: int) -> bytes:
    return np.asarray(picture).repeat(factor, 0).repeat(factor, 1).tobytes()


def test_pictures_with_their_origin(concept: Path, backbone: Backbone, pipeline: Path, loaded, capsys) -> None:
    assert run(concept, f"prompt={BEACH}", "num=2", "seed=7", f"backbone.path={pipeline}") == 0
    out = Path("generated/cat-a-photo-of-cat-on-the-beach")
    said = capsys.readouterr()
    assert f"pictures: {out} (2 PNG files and manifest.json)" in said.out and str(out / "grid.png") in said.out
    assert f"100%|██████████| {2 * STEPS}/{2 * STEPS}" in said.err and "warning" not in said.err
    assert loaded == [str(pipeline)]

    first, second = read_manifest(out)
    file = Concept.load(concept)
    assert first == ImageRecord(
        file="a-photo-of-cat-on-the-beach-0007.png", prompt=BEACH, seed=7, concept="cat", concept_hash=file.hash,
        placeholder="<cat*>", superclass="cat", method="perfusion", backbone="toyland",
        dials={"beta": 0.7, "tau": 0.15, "key_lock": "local"}, scheduler="DDIMScheduler", steps=STEPS, guidance=4.0,
    )  # fmt: skip
    assert second == dataclasses.replace(first, file="a-photo-of-cat-on-the-beach-0008.png", seed=8)
    with Image.open(out / first.file) as image:
        text = {key: json.loads(image.text[key]) for key in ("seed", "beta", "tau", "steps")}
        assert text == {"seed": 7, "beta": 0.7, "tau": 0.15, "steps": STEPS}
        assert (image.text["prompt"], image.text["concept_hash"]) == (BEACH, file.hash)
    with file.attach(backbone):
        expected = draw(backbone, [BEACH] * 2, [7, 8])
    assert list(pixels(out).values()) == expected
    assert shown_last(out / "grid.png", 192) == enlarged(Image.open(out / second.file), 3)
    assert {path.name for path in out.iterdir()} == {first.file, second.file, "manifest.json", "grid.png"}


def test_picture_k_does_not_depend_on_how_many_are_drawn_nor_in_which_batches(concept: Path) -> None:
    assert run(concept, f"prompt={BEACH}", "num=3", "batch=2", "out=many") == 0
    assert run(concept, f"prompt={BEACH}", "num=1", "seed=2", "batch=1", "out=one") == 0
    name = "a-photo-of-cat-on-the-beach-0002.png"
    assert pixels(Path("many"))[name] == pixels(Path("one"))[name]
    assert len(set(pixels(Path("many")).values())) == 3


def test_a_row_of_pictures_for_every_beta(concept: Path, backbone: Backbone) -> None:
    """Each is the picture that its β gives alone; seeds are shared, and names tell them apart."""
    assert run(concept, f"prompt={BEACH}", "num=2", "beta=0.1,0.5,0.9", "tau=0.05", "guidance=2", "out=o") == 0
    records = read_manifest("o")
    assert [(r.dials["beta"], r.seed) for r in records] == [(b, s) for b in (0.1, 0.5, 0.9) for s in (0, 1)]
    assert {(record.dials["tau"], record.guidance) for record in records} == {(0.05, 2.0)}
    assert records[2].file == "a-photo-of-cat-on-the-beach-0000-beta-0.5.png"
    expected = []
    for beta in (0.1, 0.5, 0.9):
        with Concept.load(concept).attach(backbone, beta=beta, tau=0.05):
            expected += draw(backbone, [BEACH] * 2, [0, 1], guidance=2.0)
    assert list(pixels(Path("o")).values()) == expected and len({*expected}) == 6


@pytest.mark.parametrize("given", ["0.3,inf", "[0.3,.inf]"])
def test_an_infinite_beta_is_the_base_model(concept: Path, backbone: Backbone, given: str) -> None:
    assert run(concept, f"prompt={BEACH}", "num=1", f"beta={given}", "out=o") == 0
    records = read_manifest("o")
    assert [record.dials["beta"] for record in records] == [0.3, "inf"]
    assert records[1].file == "a-photo-of-cat-on-the-beach-0000-beta-inf.png"
    own, plain = pixels(Path("o")).values()
    assert [plain] == draw(backbone, ["a photo of cat on the beach"], [0]) != [own]


def test_several_betas_in_one_batch(
    concept: Path, mug: Path, backbone: Backbone, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As a GPU draws them; the last batch is smaller. Kernels round differently for every batch shape."""
    words = (f"prompt={BEACH} and <mug*>", "num=2", "beta=[[0.1,0.9],[0.5,0.5],[0.9,0.1]]", "batch=4")
    assert run(f"[{concept},{mug}]", *words, "out=one") == 0  # type: ignore[arg-type]
    stream = drawing.stream
    inexact = lambda *given, **settings: stream(*given, **{**settings, "exact": False})  # noqa: E731
    monkeypatch.setattr(drawing, "stream", inexact)
    with batch_sizes(backbone.pipe) as sizes:  # type: ignore[attr-defined]
        assert run(f"[{concept},{mug}]", *words, "out=many") == 0  # type: ignore[arg-type]
    assert sizes == [8] * STEPS + [4] * STEPS, "each prompt, and the empty one of guidance"
    one, many = (np.stack([np.frombuffer(p, np.uint8) for p in pixels(Path(o)).values()]) for o in ("one", "many"))
    assert np.abs(one.astype(int) - many).max() <= 2
    assert np.abs(one[0].astype(int) - one[2]).max() > 10  # the strengths differ visibly


@pytest.fixture
def mug(backbone: Backbone, tmp_path: Path) -> Path:
    """A second concept, trained apart."""
    save_concept(tmp_path / "mug.safetensors", untrained_concept(backbone, Word("<mug*>", "mug"), seed=1))
    return tmp_path / "mug.safetensors"


def test_two_concepts_in_one_picture_each_with_settings_of_its_own(
    concept: Path, mug: Path, backbone: Backbone, capsys
) -> None:
    words = (f"[{concept},{mug}]", "prompt=<cat*> and <mug*> on the beach", "num=1", "out=o")
    for given in ("beta=[[0.3,0.6],[0.5,0.5]]", "tau=[[0.05,0.6]]", "tau=[[0.05,null]]", "tau=0.6"):
        assert run(*words, given) == 0  # type: ignore[arg-type]
    assert "warning" not in capsys.readouterr().err
    records = read_manifest("o")
    first = records[0]
    assert (first.concept, first.placeholder, first.superclass) == ("cat + mug", "<cat*> + <mug*>", "cat + mug")
    assert (first.method, first.file) == ("perfusion", "cat-and-mug-on-the-beach-0000-beta-0.3-0.6.png")
    assert [record.dials["beta"] for record in records[:2]] == ["0.3 + 0.6", 0.5]
    assert [record.dials["tau"] for record in records[2:]] == ["0.05 + 0.6", "0.05 + 0.15", 0.6]
    expected: list[bytes] = []
    betas, taus = ((0.3, 0.6), (0.5, 0.5), (None, None), (None, None), (None, None)), (None, None, 0.05, 0.05, 0.6)
    for (own, other), tau, of_other in zip(betas, taus, (None, None, 0.6, None, 0.6), strict=True):
        with (
            Concept.load(concept).attach(backbone, beta=own, tau=tau),
            Concept.load(mug).attach(backbone, beta=other, tau=of_other),
        ):
            expected += draw(backbone, [first.prompt], [0])
    assert list(pixels(Path("o")).values()) == expected and len({*expected}) == 5


@pytest.fixture
def robot(backbone: Backbone, tmp_path: Path) -> Path:
    """A LoRA: no gate, a scale."""
    path = tmp_path / "robot.safetensors"
    save_concept(path, random_concept(backbone, Word("<robot*>", "robot"), 1, name="lora"))
    return path


def test_concepts_of_different_methods_in_one_picture(concept: Path, robot: Path, backbone: Backbone) -> None:
    """Each takes what its method has."""
    prompt, both = "<cat*> and <robot*>", f"[{concept},{robot}]"
    words = (f"prompt={prompt}", "num=1", "beta=[[0.3,null]]", "tau=0.1", "scale=0.5", "out=o")
    assert run(both, *words) == 0  # type: ignore[arg-type]
    (record,) = read_manifest("o")
    expected = {"beta": "0.3 + none", "tau": "0.1 + none", "key_lock": "local + none", "scale": "none + 0.5"}
    assert (record.method, record.dials) == ("perfusion + lora", expected)
    with Concept.load(concept).attach(backbone, beta=0.3, tau=0.1), Concept.load(robot).attach(backbone, scale=0.5):
        assert list(pixels(Path("o")).values()) == draw(backbone, [prompt], [0])


def test_several_prompts_share_seeds_and_a_grid(concept: Path) -> None:
    assert run(concept, 'prompt=["<cat*>, in a box", a sketch of <cat*>]', "num=2", "out=o") == 0
    made = [(record.file, record.prompt, record.seed) for record in read_manifest("o")]
    assert made == [
        ("cat-in-a-box-0000.png", "<cat*>, in a box", 0),
        ("cat-in-a-box-0001.png", "<cat*>, in a box", 1),
        ("a-sketch-of-cat-0000.png", "a sketch of <cat*>", 0),
        ("a-sketch-of-cat-0001.png", "a sketch of <cat*>", 1),
    ]
    assert shown_last(Path("o/grid.png"), 192) == enlarged(Image.open("o/a-sketch-of-cat-0001.png"), 3)


def test_a_prompt_is_text_as_it_stands(concept: Path, capsys) -> None:
    prompt = "<cat*>: on the ${beach}, 'asleep' # 1"
    assert run(concept, f"prompt={prompt}", "num=1", "out=o") == 0
    assert [record.prompt for record in read_manifest("o")] == [prompt]


def test_a_prompt_without_the_placeholder_is_drawn_with_a_warning(concept: Path, capsys) -> None:
    assert run(concept, "prompt=[a cat* in a box, a sketch of <CAT*>]", "num=1", "out=o") == 0
    warnings = [line for line in capsys.readouterr().err.splitlines() if line.startswith("warning")]
    assert warnings == [
        "warning: 'a cat* in a box' does not name the concept; put its placeholder <cat*> where it shall be"
    ]
    assert len(read_manifest("o")) == 2


def test_a_prompt_that_loses_the_placeholder_at_its_end_is_refused_before_anything_is_drawn(
    concept: Path, backbone: Backbone, capsys
) -> None:
    far = "dog " * (backbone.pipe.tokenizer.model_max_length - 2) + "<cat*>"  # type: ignore[attr-defined]
    assert run(concept, f"prompt=[{BEACH}, {far}]", "num=1", "out=o") == 2
    assert re.search(rf"error: prompt '{re.escape(far)}': '<cat\*>' would be cut off", capsys.readouterr().err)
    assert not Path("o").exists()
    assert run(concept, f"prompt={far.removeprefix('dog ')}", "num=1", "out=o") == 0
    assert len(read_manifest("o")) == 1


def test_no_picture_of_a_former_run_is_lost(concept: Path) -> None:
    for beta in (0.7, 0.2, 0.7):  # the third run draws the first one's picture again
        assert run(concept, f"prompt={BEACH}", "num=1", f"beta={beta}", "out=o") == 0
    first, second = read_manifest("o")
    assert (first.file, first.dials["beta"]) == ("a-photo-of-cat-on-the-beach-0000.png", 0.7)
    assert (second.file, second.dials["beta"]) == ("a-photo-of-cat-on-the-beach-0000-2.png", 0.2)
    Path("o", first.file).unlink()
    assert run(concept, f"prompt={BEACH}", "num=1", "seed=1", "out=o") == 0
    assert [record.seed for record in read_manifest("o")] == [0, 1]


def test_files_of_others_are_not_replaced(concept: Path, backbone: Backbone, tmp_path: Path, capsys) -> None:
    """A user's own, whatever they are, and the grid of another concept; the same concept's grid is made anew."""
    own = [Path("o/a-photo-of-cat-on-the-beach-0000.png"), Path("o/grid.png"), Path("o/grid-2.png")]
    Path("o").mkdir()
    own[0].write_text("mine")
    Image.new("RGB", (8, 8)).save(own[1])
    own[2].mkdir()
    mine = [own[0].read_bytes(), own[1].read_bytes()]
    for seed in (0, 1):
        assert run(concept, f"prompt={BEACH}", "num=1", f"seed={seed}", "out=o") == 0
        assert "all together: o/grid-3.png" in capsys.readouterr().out
    assert [record.file for record in read_manifest("o")] == [
        "a-photo-of-cat-on-the-beach-0000-2.png",
        "a-photo-of-cat-on-the-beach-0001.png",
    ]
    grid = Path("o/grid-3.png").read_bytes()
    save_concept(tmp_path / "concept.safetensors", random_concept(backbone, Word("<cat*>", "cat"), 1, name="perfusion"))
    assert run(tmp_path / "concept.safetensors", f"prompt={BEACH}", "num=1", "out=o") == 0
    assert "all together: o/grid-4.png" in capsys.readouterr().out
    assert Path("o/grid-3.png").read_bytes() == grid and [own[0].read_bytes(), own[1].read_bytes()] == mine
    assert read_manifest("o")[-1].file == "a-photo-of-cat-on-the-beach-0000-3.png"


def test_prompts_that_differ_in_signs_only_get_files_of_their_own(concept: Path) -> None:
    assert run(concept, "prompt=[a <cat*> asleep, 'a <cat*>, asleep!']", "num=1", "out=o") == 0
    assert [r.file for r in read_manifest("o")] == ["a-cat-asleep-0000.png", "a-cat-asleep-0000-2.png"]


def test_what_was_drawn_before_an_interruption_is_in_the_manifest(concept: Path, monkeypatch) -> None:
    saved = manifest.save_png

    def save(folder, image, record, flush) -> None:
        if record.seed == 2:
            raise KeyboardInterrupt
        saved(folder, image, record, flush)

    monkeypatch.setattr(drawing, "save_png", save)
    assert run(concept, f"prompt={BEACH}", "num=4", "out=o") == 130
    assert [record.seed for record in read_manifest("o")] == [0, 1]


def test_the_name_of_a_concept(concept: Path, tmp_path: Path) -> None:
    other = tmp_path / "mittens.safetensors"
    other.write_bytes(concept.read_bytes())
    assert generate(GenerateConfig(str(other), [BEACH], num=1, steps=1)) == Path(
        "generated/mittens-a-photo-of-cat-on-the-beach"
    )


def test_slug() -> None:
    assert slug("A photo of <cat*>, in Zürich!") == "a-photo-of-cat-in-zürich"
    assert slug("<*>") == "image"
    assert slug("x" * 47 + " y" * 40) == "x" * 47


def test_every_preset_of_a_backbone_can_be_named(monkeypatch) -> None:
    sd15 = backbone_config("sd15", "folder", "float16", "cpu")
    assert (sd15.name, sd15.path, sd15.dtype, sd15.device) == ("stable_diffusion", "folder", "float16", "cpu")
    assert (sd15.steps, sd15.guidance, sd15.resolution) == (50, 6.0, 512)
    assert backbone_config("toyland").resolution == 64
    file = backbone_config("sd21", "model.safetensors", layout="sd21_base")
    assert (file.name, file.resolution, file.layout) == ("stable_diffusion", 768, "sd21_base")
    with pytest.raises(BackboneError, match="nowhere"):
        perfusion.load("sd15", "nowhere")
    monkeypatch.setattr("perfusion.backbones.PRESETS", Path("nowhere"))
    assert backbone_config("stable_diffusion").prompts == "imagenet", "by its own name, where there are no presets"
    with pytest.raises(ConfigError, match="no backbone 'sd15'; there are: kolors, pixart, sana, sdxl, stable"):
        backbone_config("sd15")
