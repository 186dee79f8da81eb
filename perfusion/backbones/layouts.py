"""Architectures without weights: the public configs of known models, built on the meta device to count and measure.

`layouts/<name>/{unet,text_encoder,vae,scheduler}.json` are the configs as their publishers ship them.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKL, DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from transformers import CLIPTextConfig, CLIPTextModel

from perfusion.backbones.base import BackboneError

_FOLDER = Path(__file__).with_name("layouts")


def available_layouts() -> list[str]:
    """Names of the known layouts."""
    return sorted(path.name for path in _FOLDER.iterdir() if path.is_dir())


def layout_config(layout: str, part: str) -> dict[str, Any]:
    """The config of `part` (`unet`, `text_encoder`, `vae` or `scheduler`) in `layout`.

    Raises:
        BackboneError: no such layout.
    """
    if layout not in available_layouts():
        raise BackboneError(f"no layout {layout!r}; there are: {', '.join(available_layouts())}")
    return json.loads((_FOLDER / layout / f"{part}.json").read_text(encoding="utf-8"))


def meta_denoiser(layout: str) -> UNet2DConditionModel:
    """The UNet of `layout` on the meta device: every shape, no memory, no weights."""
    with torch.device("meta"):
        unet = UNet2DConditionModel.from_config(layout_config(layout, "unet"))
    assert isinstance(unet, UNet2DConditionModel)
    return unet.requires_grad_(False).eval()


def meta_pipeline(layout: str) -> StableDiffusionPipeline:
    """The whole pipeline of `layout` on the meta device, without a tokenizer: a backbone around it can be measured."""
    with torch.device("meta"):
        vae = AutoencoderKL.from_config(layout_config(layout, "vae"))
        text_encoder = CLIPTextModel(CLIPTextConfig(**layout_config(layout, "text_encoder")))
    components: dict[str, Any] = {
        "unet": meta_denoiser(layout),
        "vae": vae,
        "text_encoder": text_encoder.eval(),
        "scheduler": DDIMScheduler.from_config(layout_config(layout, "scheduler")),
        "tokenizer": None,
        "safety_checker": None,
        "feature_extractor": None,
    }
    return StableDiffusionPipeline(**components, requires_safety_checker=False)
