"""A concept in pipelines that draw otherwise on the same weights: from an image, into a mask, along a ControlNet."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import (
    ControlNetModel,
    StableDiffusionControlNetImg2ImgPipeline,
    StableDiffusionControlNetInpaintPipeline,
    StableDiffusionControlNetPipeline,
    StableDiffusionImg2ImgPipeline,
    StableDiffusionInpaintPipeline,
    StableDiffusionXLControlNetImg2ImgPipeline,
    StableDiffusionXLControlNetInpaintPipeline,
    StableDiffusionXLControlNetPipeline,
    StableDiffusionXLImg2ImgPipeline,
    StableDiffusionXLInpaintPipeline,
)
from torch import Tensor

from perfusion.backbones import around
from perfusion.backbones.base import Backbone
from perfusion.methods.base import Word
from tests.concepts import tiny_backbone, tiny_sdxl_backbone, untrained_concept
from tests.drawing import CLOSED, PLAIN, PROMPT, call
from tests.pipelines import RESOLUTION, tiny_pipeline, tiny_sdxl

FAMILIES: dict[str, tuple[Callable[[Path], Backbone], Callable[[], Any], dict[str, Any]]] = {
    "SD": (tiny_backbone, tiny_pipeline, {"requires_safety_checker": False}),
    "SDXL": (tiny_sdxl_backbone, tiny_sdxl, {"add_watermarker": False}),
}


def picture() -> Tensor:
    return torch.rand(1, 3, RESOLUTION, RESOLUTION, generator=torch.Generator().manual_seed(1))


SIZE = {"height": RESOLUTION, "width": RESOLUTION}
IMAGE = {"image": picture(), "strength": 1.0}
MASKED = {**IMAGE, **SIZE, "mask_image": torch.ones(1, 1, RESOLUTION, RESOLUTION)}
CONTROLLED = {"control_image": picture()}

# What it does -> the class in each family, and what its calls take.
PIPELINES: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "image to image": ({"SD": StableDiffusionImg2ImgPipeline, "SDXL": StableDiffusionXLImg2ImgPipeline}, IMAGE),
    "inpainting": ({"SD": StableDiffusionInpaintPipeline, "SDXL": StableDiffusionXLInpaintPipeline}, MASKED),
    "ControlNet": (
        {"SD": StableDiffusionControlNetPipeline, "SDXL": StableDiffusionXLControlNetPipeline},
        {"image": picture()},
    ),
    "ControlNet, image to image": (
        {"SD": StableDiffusionControlNetImg2ImgPipeline, "SDXL": StableDiffusionXLControlNetImg2ImgPipeline},
        {**IMAGE, **CONTROLLED},
    ),
    "ControlNet, inpainting": (
        {"SD": StableDiffusionControlNetInpaintPipeline, "SDXL": StableDiffusionXLControlNetInpaintPipeline},
        {**MASKED, **CONTROLLED},
    ),
}


@pytest.fixture(scope="module", params=list(FAMILIES))
def family(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[str, Backbone]:
    make, _, _ = FAMILIES[request.param]
    return request.param, make(tmp_path_factory.mktemp("covariance"))


@pytest.mark.parametrize("kind", list(PIPELINES))
def test_pipelines_on_the_same_weights(family: tuple[str, Backbone], kind: str) -> None:
    """The concept is attached to the pipeline itself, or to the one that it is made of afterwards."""
    name, backbone = family
    concept = untrained_concept(backbone, Word("<cat*>", "cat"), 0)
    pipe, given = made_of(backbone.pipe, name, kind), PIPELINES[kind][1]
    before = call(pipe, PLAIN, **given)
    with concept.attach(around(pipe, backbone.config)) as attached:
        found = call(pipe, PROMPT, **given)
        attached.beta = CLOSED
        assert (found - call(pipe, PROMPT, **given)).abs().amax() > 1e-3
    assert torch.equal(call(pipe, PLAIN, **given), before)
    with concept.attach(backbone):
        assert torch.equal(call(made_of(backbone.pipe, name, kind), PROMPT, **given), found)


def made_of(stock: Any, family: str, kind: str) -> Any:
    """A pipeline of that kind around the parts of a stock one."""
    _, random, settings = FAMILIES[family]
    parts = dict(stock.components)
    if "ControlNet" in kind:
        parts["controlnet"] = ControlNetModel.from_unet(random().unet)
    pipe = PIPELINES[kind][0][family](**parts, **settings)
    pipe.set_progress_bar_config(disable=True)
    return pipe
