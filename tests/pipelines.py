"""Small pipelines for tests: random weights, real block structures, plain diffusers folders."""

import atexit
import functools
import shutil
import tempfile
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKL, PNDMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from torch import nn
from transformers import CLIPTextConfig, CLIPTextModel

from perfusion.backbones.layouts import layout_config
from perfusion.toyland import models
from perfusion.toyland.captions import vocabulary
from perfusion.toyland.tokenizer import build_tokenizer

RESOLUTION = 64  # pixels that the tiny pipeline is made for
_TEXT = """
    a an the of on in at with and my one this photo picture painting sketch drawing good close up cropped bright dark
    rendering rendition clean dirty cool nice small large weird cat dog teddy bear bird man woman car book mug hat crown
    santa scarf box beach snow forest city street house table chair moon night wearing riding sitting standing sleeping
    skateboard cardboard watercolor mosaic front wooden red blue green old young
"""
WORDS = tuple(_TEXT.split())


def tiny_pipeline_folder(tmp_path: Path, **overrides: dict[str, Any]) -> Path:
    """A random `StableDiffusionPipeline` of SD 1.5's block structure with few channels, in `tmp_path`/pipeline.

    `overrides` replaces config values by part, e.g. `scheduler={"prediction_type": "v_prediction"}`. The same in every
    process; without overrides it is built once per process and copied.
    """
    folder = tmp_path / "pipeline"
    if overrides:
        tiny_pipeline(**overrides).save_pretrained(folder)
    else:
        shutil.copytree(_built("tiny"), folder)
    return folder


def toyland_folder(tmp_path: Path) -> Path:
    """Toyland's architecture and tokenizer with random weights, in `tmp_path`/toyland."""
    folder = tmp_path / "toyland"
    shutil.copytree(_built("toyland"), folder)
    return folder


@functools.cache
def _built(kind: str) -> Path:
    folder = Path(tempfile.mkdtemp(prefix=f"perfusion-{kind}-"))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    (tiny_pipeline() if kind == "tiny" else toyland_pipeline()).save_pretrained(folder)
    return folder


def tiny_pipeline(**overrides: dict[str, Any]) -> StableDiffusionPipeline:
    """The pipeline of `tiny_pipeline_folder`, in memory."""
    tokenizer = build_tokenizer(WORDS, positions=77)
    config = {part: layout_config("sd15", part) for part in ("unet", "vae", "text_encoder", "scheduler")}
    config["unet"] |= {"block_out_channels": (8, 16, 16, 16), "attention_head_dim": 2, "norm_num_groups": 4}
    config["unet"] |= {"cross_attention_dim": 32, "sample_size": RESOLUTION // 8}
    config["vae"] |= {"block_out_channels": (8, 8, 8, 8), "norm_num_groups": 4, "sample_size": RESOLUTION}
    config["text_encoder"] |= {"hidden_size": 32, "intermediate_size": 64, "projection_dim": 32}
    config["text_encoder"] |= {"num_hidden_layers": 2, "num_attention_heads": 2, "vocab_size": len(tokenizer)}
    config["text_encoder"] |= {"bos_token_id": tokenizer.bos_token_id, "eos_token_id": tokenizer.eos_token_id}
    for part, values in overrides.items():
        config[part] |= values
    with torch.random.fork_rng():
        torch.manual_seed(0)
        unet = UNet2DConditionModel.from_config(config["unet"])
        vae = AutoencoderKL.from_config(config["vae"])
        text_encoder = _spread(CLIPTextModel(CLIPTextConfig(**config["text_encoder"])))
    scheduler = PNDMScheduler.from_config(config["scheduler"])
    return _pipeline(unet=unet, vae=vae, text_encoder=text_encoder, tokenizer=tokenizer, scheduler=scheduler)


def toyland_pipeline() -> StableDiffusionPipeline:
    """Toyland before its training, in memory."""
    tokenizer = build_tokenizer(vocabulary(), models.TEXT_POSITIONS)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        unet, vae, text_encoder = models.unet(), models.autoencoder(), _spread(models.text_encoder(tokenizer))
    return _pipeline(unet=unet, vae=vae, text_encoder=text_encoder, tokenizer=tokenizer, scheduler=models.scheduler())


def _pipeline(**parts: Any) -> StableDiffusionPipeline:
    for part in ("unet", "vae", "text_encoder"):
        parts[part].requires_grad_(False).eval()
    absent: dict[str, Any] = {"safety_checker": None, "feature_extractor": None}
    pipe = StableDiffusionPipeline(**parts, **absent, requires_safety_checker=False)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def _spread(text_encoder: CLIPTextModel) -> CLIPTextModel:
    """Larger embeddings than CLIP starts training with, so that different words get clearly different encodings."""
    with torch.no_grad():
        for module in text_encoder.modules():
            if isinstance(module, nn.Embedding):
                module.weight.mul_(20)
    return text_encoder
