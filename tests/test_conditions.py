"""`generate` from a picture, into a mask, along a ControlNet: each is seen in a picture, beside the concept."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import ControlNetModel, StableDiffusionImg2ImgPipeline
from PIL import Image

import perfusion
from perfusion.backbones.sdxl import StableDiffusionXLBackbone
from perfusion.backbones.stable_diffusion import StableDiffusionBackbone
from perfusion.backbones.toyland import WEIGHTS
from perfusion.cli import run_cli
from perfusion.concept import Concept, save_concept
from perfusion.conditions import read_conditions
from perfusion.drawing import sample, stream
from perfusion.generate import main
from perfusion.manifest import ImageRecord, read_manifest
from perfusion.methods.base import Word
from perfusion.toyland.draw import render
from perfusion.toyland.world import sample_scene
from tests.concepts import tiny_backbone, toyland_backbone, untrained_concept
from tests.pipelines import tiny_pipeline, tiny_pipeline_folder, tiny_sdxl

STEPS = 4
pytestmark = pytest.mark.usefixtures("here")


@pytest.fixture(scope="module")
def given(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model, a concept of it, pictures, masks, and ControlNets for this model and for another."""
    root = tmp_path_factory.mktemp("given")
    tiny_pipeline_folder(root)
    concept = untrained_concept(tiny_backbone(root / "covariance"), Word("<cat*>", "cat"), 0)
    save_concept(root / "cat.safetensors", concept)
    for name, pipe in (("net", tiny_pipeline()), ("net_xl", tiny_sdxl())):
        controlnet(pipe).save_pretrained(root / name)
    pictures(root)
    return root


@pytest.fixture(scope="module")
def toyland(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("toyland")
    concept = untrained_concept(toyland_backbone(WEIGHTS, root / "covariance"), Word("<cat*>", "cat"), 0)
    save_concept(root / "cat.safetensors", concept)
    pictures(root)
    Image.fromarray(render(sample_scene(3)).image).save(root / "toys.png")
    return root


def controlnet(pipe: Any) -> ControlNetModel:
    """One that says something: a new one's outputs are zero."""
    net = ControlNetModel.from_unet(pipe.unet)
    draw = torch.Generator().manual_seed(0)
    for block in (*net.controlnet_down_blocks, net.controlnet_mid_block, net.controlnet_cond_embedding):
        for value in block.parameters():
            value.data = torch.randn(value.shape, generator=draw) * 0.2
    return net


def pictures(root: Path) -> None:
    """A square, a wide one, another file of the square's name, and masks of the square's left half."""
    draw = np.random.default_rng(0)
    for name, (width, height) in (("room.png", (64, 64)), ("wide.jpg", (190, 96)), ("line.png", (500, 20))):
        small = draw.integers(0, 256, (4, 4, 3), dtype=np.uint8)
        Image.fromarray(small).resize((width, height), Image.Resampling.BICUBIC).save(root / name)
    (root / "other").mkdir()
    Image.new("RGB", (64, 64), "teal").save(root / "other" / "room.png")
    left = np.zeros((128, 128), np.uint8)
    left[:, :64] = 200
    Image.fromarray(left).save(root / "left.png")
    Image.fromarray(left[:, :90]).save(root / "narrow.png")
    Image.new("L", (64, 64)).save(root / "black.png")


def run(given: Path, *words: str) -> int:
    path = [f"path={given}/pipeline"] if (given / "pipeline").exists() else []
    command = [f"concept={given}/cat.safetensors", *path, "device=cpu", f"steps={STEPS}", "num=1"]
    return run_cli(main, [*command, "prompt=a photo of a <cat*>", *words])


def drawn(given: Path, out: str, *words: str) -> tuple[np.ndarray, ImageRecord]:
    """The last picture that a command draws, and what is known of it."""
    assert run(given, *words, f"out={out}") == 0
    record = read_manifest(out)[-1]
    with Image.open(Path(out) / record.file) as image:
        said: Any = image
        for key in ("image", "mask", "controlnet", "control_image", "strength"):
            value = getattr(record, key)
            assert said.text.get(key) == (None if value is None else str(value))
        assert record.width is None or image.size == (record.width, record.height)
        return np.asarray(image).astype(int), record


def differ(one: np.ndarray, other: np.ndarray) -> bool:
    return one.shape != other.shape or bool((one != other).any())


def test_from_a_picture(given: Path) -> None:
    image = f"image={given}/room.png"
    plain, record = drawn(given, "plain")
    assert record.image is None and record.strength is None
    some, record = drawn(given, "some", image)
    assert differ(some, plain) and record.strength == 0.8 and (record.width, record.height) == (64, 64)
    assert record.image is not None and record.image.startswith("room.png ")
    assert differ(drawn(given, "less", image, "strength=0.5")[0], some)
    assert differ(drawn(given, "base", image, "beta=inf")[0], some), "the concept is to be seen"
    second, _ = drawn(given, "two", image, "num=2", "seed=4")
    assert not differ(second, drawn(given, "one", image, "seed=5")[0]), "a picture depends on its own seed"
    other, of_other = drawn(given, "some", f"image={given}/other/room.png")
    assert differ(other, some) and of_other.image != record.image
    assert [found.file[-6:] for found in read_manifest("some")] == ["00.png", "-2.png"], "neither replaces the other"


def test_it_is_the_picture_of_the_stock_call(given: Path) -> None:
    found, _ = drawn(given, "found", f"image={given}/room.png", "strength=0.75", "seed=3", "guidance=5")
    pipe: Any = perfusion.load("sd15", str(given / "pipeline"), device="cpu")
    with Concept.load(given / "cat.safetensors").attach(pipe), Image.open(given / "room.png") as image:
        stock = StableDiffusionImg2ImgPipeline(**pipe.components, requires_safety_checker=False)
        generator = torch.Generator().manual_seed(3)
        call = {"num_inference_steps": STEPS, "guidance_scale": 5.0, "strength": 0.75, "generator": generator}
        expected = stock("a photo of a <cat*>", image=image, **call).images[0]
    assert not differ(found, np.asarray(expected).astype(int))


def test_pictures_have_the_shape_of_the_one_they_start_from_or_the_size_that_is_asked_for(given: Path) -> None:
    wide, record = drawn(given, "wide", f"image={given}/wide.jpg")
    assert wide.shape == (64, 128, 3) and (record.width, record.height) == (128, 64)
    assert drawn(given, "cropped", f"image={given}/wide.jpg", "width=64", "height=72")[0].shape == (72, 64, 3)
    along = [f"controlnet={given}/net", f"control_image={given}/wide.jpg"]
    assert drawn(given, "along", *along)[0].shape == (64, 128, 3)


def test_along_a_controlnet(given: Path) -> None:
    plain, _ = drawn(given, "plain")
    along = [f"controlnet={given}/net", f"control_image={given}/room.png"]
    found, record = drawn(given, "along", *along)
    assert differ(found, plain) and record.controlnet == "net 1" and record.image is None
    assert record.control_image is not None and record.control_image.startswith("room.png ")
    assert not differ(drawn(given, "off", *along, "controlnet_scale=0")[0], plain)
    other = drawn(given, "other", along[0], f"control_image={given}/other/room.png")[0]
    assert differ(other, found), "it is the picture that is followed"
    assert differ(drawn(given, "base", *along, "beta=inf")[0], found), "the concept is to be seen"
    image, mask = f"image={given}/room.png", f"mask={given}/left.png"
    from_image = drawn(given, "image", image, "strength=1")[0]
    assert differ(drawn(given, "both", image, "strength=1", *along)[0], from_image)
    into_mask = drawn(given, "mask", image, mask)[0]
    assert differ(drawn(given, "all", image, mask, *along)[0], into_mask)


def test_toyland_draws_into_a_mask_and_leaves_the_rest(toyland: Path) -> None:
    image, mask = f"image={toyland}/toys.png", f"mask={toyland}/left.png"
    with Image.open(toyland / "toys.png") as opened:
        room = np.asarray(opened).astype(int)
    found, record = drawn(toyland, "found", image, mask)
    assert record.strength == 1.0 and record.mask is not None and record.mask.startswith("left.png ")
    left, right = (np.abs(found - room)[:, half].mean() for half in (slice(0, 24), slice(40, 64)))
    assert right < 12 < 30 < left, "what is not masked is the picture, but for the autoencoder"
    assert differ(drawn(toyland, "base", image, mask, "beta=inf")[0], found), "the concept is to be seen"
    alone, _ = drawn(toyland, "one", image, mask, "seed=5")
    between = np.abs(alone - found)
    assert between[:, 40:].mean() < between[:, :24].mean() / 4, "only what is masked is drawn by the seed"
    second, _ = drawn(toyland, "two", image, mask, "num=2", "seed=4")
    assert not differ(second, alone), "a picture depends on its own seed"


@pytest.mark.parametrize("kind", ["image", "mask", "controlnet", "image controlnet", "mask controlnet"])
def test_pipelines_of_sdxl(kind: str, given: Path) -> None:
    """Of the classes that the backbone knows, on the very same parts."""
    stock = tiny_sdxl()
    asked: dict[str, Any] = dict.fromkeys(("image", "strength", "mask", "controlnet", "control_image"))
    asked["image"] = str(given / "room.png") if "image" in kind or "mask" in kind else None
    asked["mask"] = str(given / "left.png") if "mask" in kind else None
    if "controlnet" in kind:
        asked |= {"controlnet": str(given / "net_xl"), "control_image": str(given / "room.png")}
    conditions = read_conditions(**asked, controlnet_scale=None)
    size = conditions.size(None, 64)
    call = {"steps": STEPS, "guidance": 4.0, "size": size}
    (plain,) = sample(stock, ["a photo of a cat"], [0], **call)
    with conditions.pipeline(stock) as pipe:
        assert type(pipe) in StableDiffusionXLBackbone.kin and pipe.unet is stock.unet and pipe.watermark is None
        (found,) = stream(pipe, ["a photo of a cat"], [0], **call, given=conditions.arguments(size))
    assert found.size == (64, 64) and differ(np.asarray(found), np.asarray(plain))
    (again,) = sample(stock, ["a photo of a cat"], [0], **call)
    assert not differ(np.asarray(again), np.asarray(plain)), "the stock pipeline is as it was"


@pytest.mark.parametrize(
    ("words", "says"),
    [
        ("image={given}/no.png", "image: {given}/no.png: cannot be opened: No such file"),
        ("image={given}/cat.safetensors", "image: {given}/cat.safetensors: expected a JPEG, PNG"),
        ("image={given}/room.png strength=0", "strength: found 0, expected more than 0"),
        ("image={given}/room.png strength=1.5", "strength: found 1.5, expected more than 0"),
        ("image={given}/room.png strength=0.1", "strength: found 0.1 of 4 steps, which leaves none, expected 0.25"),
        ("image={given}/line.png", "image: found 500x20 pixels, expected a longer side of at most 4 times"),
        ("strength=0.5", "strength: found 0.5 without image, expected image= beside it"),
        ("mask={given}/left.png", "mask: found '{given}/left.png' without image, expected image= beside it"),
        ("image={given}/room.png mask={given}/no.png", "mask: {given}/no.png: cannot be opened: No such file"),
        ("image={given}/room.png mask={given}/black.png", "mask: {given}/black.png: the mask is zero everywhere"),
        ("image={given}/room.png mask={given}/narrow.png", "mask: {given}/narrow.png: the mask is 90x128, its image"),
        ("controlnet={given}/net", "controlnet: found '{given}/net' without control_image"),
        ("control_image={given}/room.png", "control_image: found '{given}/room.png' without controlnet"),
        ("controlnet_scale=1", "controlnet_scale: found 1.0 without controlnet, expected controlnet= beside it"),
        ("{along} controlnet_scale=-1", "controlnet_scale: found -1, expected a finite number, at least 0"),
        ("{along}_xl", "controlnet: found one with cross_attention_dim 80, expected 32, that of the model"),
        ("{along}/no", "controlnet: {given}/net/no cannot be read: found no such folder. Expected the folder or hub"),
        ("{along}/../pipeline/unet", "controlnet: {given}/net/../pipeline/unet cannot be read: it is a UNet2D"),
    ],
)
def test_mistakes_are_found_before_the_model_is_loaded(
    words: str, says: str, given: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    early = "line.png" not in words  # its size depends on the model's
    if early:
        monkeypatch.setattr(StableDiffusionBackbone, "load", classmethod(lambda *_: pytest.fail("it is loaded")))
    along = f"control_image={given}/room.png controlnet={given}/net"
    scaled = words.replace("{along} ", f"{along} ")
    assert run(given, *scaled.format(given=given, along=along).split()) == 2
    assert f"error: {says.format(given=given)}" in capsys.readouterr().err and not Path("generated").exists()
