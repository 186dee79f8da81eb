"""Masks by CLIPSeg, a small one with random weights: what they are, how they are kept, and what is said without it."""

import json
import logging
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from transformers import CLIPSegForImageSegmentation, CLIPSegProcessor

from perfusion.config import ConceptConfig
from perfusion.data import clipseg
from perfusion.data.clipseg import SIDE, ClipSeg
from perfusion.data.images import ConceptImageError
from perfusion.data.masks import read_mask
from perfusion.training.module import examples_of
from tests.hub import put_in_hub_cache
from tests.segmenters import clipseg_folder

RESOLUTION = 32


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return clipseg_folder(tmp_path_factory.mktemp("models"))


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder, rng = tmp_path_factory.mktemp("photos"), np.random.default_rng(0)
    for name, size in (("a.png", (90, 60)), ("b.png", (40, 64))):
        pixels = Image.fromarray(rng.integers(0, 256, (4, 6, 3), dtype=np.uint8))
        pixels.resize(size, Image.Resampling.BICUBIC).save(folder / name)
    return folder


def concept(photos: Path, model: Path | str, cache: Path, superclass: str = "cat") -> ConceptConfig:
    return ConceptConfig(
        "x", superclass, "<x>", images=str(photos), masks="clipseg", clipseg=str(model), masks_cache=str(cache)
    )


def opened(path: Path) -> Image.Image:
    with Image.open(path) as image:
        return image.convert("RGB")


def directly(model: Path, image: Image.Image, prompt: str) -> np.ndarray:
    """The model's own probabilities, brought to the picture's aspect ratio, divided by their maximum."""
    processor = CLIPSegProcessor.from_pretrained(model)
    network: Any = CLIPSegForImageSegmentation.from_pretrained(model).eval()
    with torch.no_grad():
        logits = network(**processor(text=[prompt], images=[image], return_tensors="pt")).logits  # type: ignore
    soft = Image.fromarray(torch.sigmoid(logits).reshape(64, 64).numpy())
    scale = SIDE / max(image.size)
    soft = soft.resize((round(image.width * scale), round(image.height * scale)), Image.Resampling.BILINEAR)
    return np.asarray(soft) / np.asarray(soft).max()


@pytest.mark.parametrize("name", ["a.png", "b.png"])
def test_a_mask_is_what_the_model_says(name: str, model: Path, photos: Path, tmp_path: Path) -> None:
    image = opened(photos / name)
    mask = ClipSeg(str(model), "cat", tmp_path)(image, photos / name)
    assert mask.dtype == np.float32 and max(mask.shape) == SIDE and mask.max() == 1
    assert mask.shape[1] / mask.shape[0] == pytest.approx(image.width / image.height, rel=0.01)
    np.testing.assert_allclose(mask, directly(model, image, "cat"), atol=2e-3)
    assert mask.min() < 0.9, "soft, and no constant"
    other = ClipSeg(str(model), "teddy bear", tmp_path)(image, photos / name)
    assert np.abs(other - mask).max() > 1e-3, "the superclass matters"


def test_training_sees_the_masks(model: Path, photos: Path, tmp_path: Path) -> None:
    examples = examples_of(concept(photos, model, tmp_path), RESOLUTION)
    assert examples.masks is not None and examples.masks.shape == (2, 1, RESOLUTION, RESOLUTION)
    given = tmp_path / "given"
    given.mkdir()
    for name in ("a.png", "b.png"):
        mask = ClipSeg(str(model), "cat", tmp_path)(opened(photos / name), photos / name)
        Image.fromarray((mask * 65535).round().astype(np.uint16)).save(given / name)
    own = examples_of(ConceptConfig("x", "cat", "<x>", images=str(photos), masks=str(given)), RESOLUTION)
    assert own.masks is not None and torch.equal(own.masks, examples.masks), "as masks of one's own would be"
    assert torch.equal(own.pixels, examples.pixels)
    without = examples_of(ConceptConfig("x", "cat", "<x>", images=str(photos)), RESOLUTION)
    assert without.masks is None


def test_a_hub_id_is_read_from_the_hubs_cache(
    model: Path, photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    put_in_hub_cache("owner/clipseg", model, tmp_path / "hub", monkeypatch)
    examples = examples_of(concept(photos, "owner/clipseg", tmp_path / "masks"), RESOLUTION)
    expected = examples_of(concept(photos, model, tmp_path / "others"), RESOLUTION)
    assert examples.masks is not None and expected.masks is not None
    assert torch.equal(examples.masks, expected.masks)


def test_a_folder_called_clipseg_can_be_named(photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("clipseg").mkdir()
    for name in ("a.png", "b.png"):
        Image.new("L", opened(photos / name).size, 128).save(Path("clipseg") / name)
    examples = examples_of(ConceptConfig("x", "cat", "<x>", images=str(photos), masks="./clipseg"), RESOLUTION)
    assert examples.masks is not None and torch.allclose(examples.masks, torch.tensor(128 / 255))


def test_kept_masks_need_no_model(model: Path, photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = examples_of(concept(photos, model, tmp_path / "deep" / "cache"), RESOLUTION)
    files = sorted((tmp_path / "deep" / "cache").iterdir())
    assert len(files) == 2 and all(file.suffix == ".png" and len(file.stem) == 16 for file in files)
    monkeypatch.setattr(CLIPSegForImageSegmentation, "from_pretrained", lambda *_, **__: pytest.fail("it was loaded"))
    again = examples_of(concept(photos, model, tmp_path / "deep" / "cache"), RESOLUTION)
    assert first.masks is not None and again.masks is not None and torch.equal(first.masks, again.masks)
    with Image.open(files[0]) as image:
        about = json.loads(image.text["perfusion.clipseg"])  # type: ignore[attr-defined]
    assert about["prompt"] == "cat" and about["image"] and about["model"]
    assert read_mask(files[0]).max() == 1, "a person can use it as a mask"


def test_another_picture_prompt_or_model_is_drawn_anew(
    model: Path, photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    drawn: list[str] = []

    def draw(self: ClipSeg, image: Image.Image, path: Path) -> np.ndarray:
        drawn.append(self.prompt)
        return np.full((2, 2), 65535, np.uint16)

    monkeypatch.setattr(ClipSeg, "_draw", draw)
    image, path = opened(photos / "a.png"), photos / "a.png"
    other = shutil.copytree(model, tmp_path / "other")
    ClipSeg(str(model), "cat", tmp_path / "cache")(image, path)
    ClipSeg(str(other), "cat", tmp_path / "cache")(image, Path("renamed.png"))
    assert drawn == ["cat"], "neither the names of the model and of the picture matter, but what is in them"
    ClipSeg(str(model), "dog", tmp_path / "cache")(image, path)
    touched = image.copy()
    touched.putpixel((0, 0), (1, 2, 3))
    ClipSeg(str(model), "cat", tmp_path / "cache")(touched, path)
    weights = other / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1] + b"\x07")
    ClipSeg(str(other), "cat", tmp_path / "cache")(image, path)
    ClipSeg("owner/model", "cat", tmp_path / "cache")(image, path)
    assert len(drawn) == 5 == len(list((tmp_path / "cache").iterdir()))


def truncated(file: Path) -> None:
    file.write_bytes(file.read_bytes()[:-60])


def of_another(file: Path) -> None:
    Image.new("L", (4, 4), 255).save(file)


@pytest.mark.parametrize("damage", [truncated, of_another])
def test_a_damaged_mask_is_drawn_anew(
    damage: Any, model: Path, photos: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    draw = ClipSeg(str(model), "cat", tmp_path)
    first = draw(opened(photos / "a.png"), photos / "a.png")
    (file,) = tmp_path.iterdir()
    whole = file.read_bytes()
    damage(file)
    with caplog.at_level(logging.WARNING):
        again = draw(opened(photos / "a.png"), photos / "a.png")
    assert np.array_equal(first, again) and file.name in caplog.text and "drawing it anew" in caplog.text
    assert file.read_bytes() == whole and list(tmp_path.iterdir()) == [file], "mended, and nothing left beside it"


def test_a_folder_that_cannot_be_written_costs_only_the_cache(
    model: Path, photos: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "cache").write_text("a file where the folder should be")
    with caplog.at_level(logging.WARNING):
        examples = examples_of(concept(photos, model, tmp_path / "cache"), RESOLUTION)
    assert examples.masks is not None and "mask not kept" in caplog.text


def test_an_unsure_answer_is_warned_of(
    model: Path, photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(clipseg, "UNSURE", 1.1)
    with caplog.at_level(logging.WARNING):
        ClipSeg(str(model), "cat", tmp_path)(opened(photos / "a.png"), photos / "a.png")
    assert "a.png: CLIPSeg hardly sees a 'cat' there" in caplog.text


def without(name: str, source: Path, target: Path) -> Path:
    return shutil.copytree(source, target, ignore=shutil.ignore_patterns(name))


def pickled(model: Path, tmp_path: Path) -> Path:
    folder = without("model.safetensors", model, tmp_path / "pickled")
    torch.save(load_file(model / "model.safetensors"), folder / "pytorch_model.bin")  # whole, but a pickle
    return folder


def half(model: Path, tmp_path: Path) -> Path:
    folder = without("model.safetensors", model, tmp_path / "half")
    weights = load_file(model / "model.safetensors")
    kept = {name: value for name, value in weights.items() if not name.startswith("decoder.film")}
    save_file(kept, folder / "model.safetensors", {"format": "pt"})
    return folder


def with_nan(model: Path, tmp_path: Path) -> Path:
    folder = without("model.safetensors", model, tmp_path / "nan")
    weights = load_file(model / "model.safetensors")
    weights["decoder.film_mul.bias"][0] = float("nan")
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    return folder


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda model, tmp: "no/such/folder", r"concept\.clipseg: no folder no/such/folder; expected the folder of"),
        (
            lambda model, tmp: "nobody/nothing",
            r"concept\.clipseg: nobody/nothing is no folder here, and the hub cannot be reached",
        ),
        (lambda model, tmp: without("model.safetensors", model, tmp / "x"), r"concept\.clipseg: cannot load .*/x \("),
        (lambda model, tmp: without("config.json", model, tmp / "x"), r"concept\.clipseg: cannot load .*/x \("),
        (lambda model, tmp: without("tokenizer.json", model, tmp / "x"), r"concept\.clipseg: cannot load .*/x \("),
        (pickled, r"concept\.clipseg: cannot load .*/pickled \(.* Masks of your own, concept\.masks=<folder>"),
        (half, r"cannot load .*/half \(4 of its weights are missing, such as decoder\.film_add\.bias\)"),
        (with_nan, r"a\.png: CLIPSeg's answer to 'cat' has the maximum nan, expected a number above zero"),
    ],
)
def test_without_the_model_the_training_does_not_start(
    make: Any, message: str, model: Path, photos: Path, tmp_path: Path
) -> None:
    source = make(model, tmp_path)
    with pytest.raises(ConceptImageError, match=message):
        examples_of(concept(photos, source, tmp_path / "cache"), RESOLUTION)
    assert not list((tmp_path / "cache").glob("*"))
