"""Small pipelines for tests: random weights, real block structures, plain diffusers folders."""

import atexit
import functools
import shutil
import tempfile
from pathlib import Path
from typing import Any

import diffusers
import torch
from diffusers import (
    AutoencoderKL,
    EulerDiscreteScheduler,
    StableDiffusionPipeline,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
)
from torch import nn
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

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


def sd21_folder(tmp_path: Path) -> Path:
    """A random pipeline of SD 2.1's structure with few channels: velocity, padding of its own, linear projections."""
    folder = tmp_path / "sd21"
    shutil.copytree(_built("sd21"), folder)
    return folder


def sdxl_folder(tmp_path: Path) -> Path:
    """The pipeline of `tiny_sdxl` in `tmp_path`/sdxl."""
    folder = tmp_path / "sdxl"
    shutil.copytree(_built("sdxl"), folder)
    return folder


@functools.cache
def _built(kind: str) -> Path:
    folder = Path(tempfile.mkdtemp(prefix=f"perfusion-{kind}-"))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    sd21 = functools.partial(tiny_pipeline, "sd21")
    build = {"tiny": tiny_pipeline, "toyland": toyland_pipeline, "sd21": sd21, "sdxl": tiny_sdxl}[kind]
    build().save_pretrained(folder)
    return folder


_UNET = {"attention_head_dim": 2, "norm_num_groups": 4, "sample_size": RESOLUTION // 8}
_VAE = {"block_out_channels": (8, 8, 8, 8), "norm_num_groups": 4, "sample_size": RESOLUTION}
_ENCODER = {"hidden_size": 32, "intermediate_size": 64, "projection_dim": 32, "num_hidden_layers": 2}
_ENCODER |= {"num_attention_heads": 2}


def tiny_pipeline(layout: str = "sd15", **overrides: dict[str, Any]) -> StableDiffusionPipeline:
    """The pipeline of `tiny_pipeline_folder` in memory; with `layout="sd21"` that of `sd21_folder`."""
    tokenizer = build_tokenizer(WORDS, positions=77)
    config = {part: layout_config(layout, part) for part in ("unet", "vae", "text_encoder", "scheduler")}
    config["unet"] |= _UNET | {"block_out_channels": (8, 16, 16, 16), "cross_attention_dim": 32}
    if layout == "sd21":
        tokenizer.pad_token = "!"
        config["unet"]["attention_head_dim"] = [1, 2, 2, 2]
    config["vae"] |= _VAE
    config["text_encoder"] |= _ENCODER | _ids(tokenizer)
    for part, values in overrides.items():
        config[part] |= values
    with torch.random.fork_rng():
        torch.manual_seed(0)
        unet = UNet2DConditionModel.from_config(config["unet"])
        vae = AutoencoderKL.from_config(config["vae"])
        text_encoder = _spread(CLIPTextModel(CLIPTextConfig(**config["text_encoder"])))
    scheduler = getattr(diffusers, config["scheduler"]["_class_name"]).from_config(config["scheduler"])
    return _pipeline(unet=unet, vae=vae, text_encoder=text_encoder, tokenizer=tokenizer, scheduler=scheduler)


def tiny_sdxl(**overrides: dict[str, Any]) -> StableDiffusionXLPipeline:
    """SDXL's structure with few channels, in memory: encoders of 32 and 48, contexts of 80, `overrides` by part.

    The second encoder looks for the end of text as that of SDXL does, at the largest id.
    """
    tokenizer, second = build_tokenizer(WORDS, positions=77), build_tokenizer(WORDS, positions=77)
    second.pad_token = "!"
    parts = ("unet", "vae", "text_encoder", "text_encoder_2", "scheduler")
    config = {part: layout_config("sdxl", part) for part in parts}
    config["unet"] |= _UNET | {"block_out_channels": (8, 16, 16), "attention_head_dim": [1, 2, 2]}
    config["unet"] |= {"cross_attention_dim": 80, "transformer_layers_per_block": [1, 1, 2]}
    config["unet"] |= {"addition_time_embed_dim": 8, "projection_class_embeddings_input_dim": 6 * 8 + 40}
    config["vae"] |= _VAE
    config["text_encoder"] |= _ENCODER | _ids(tokenizer)
    config["text_encoder_2"] |= _ENCODER | {"hidden_size": 48, "projection_dim": 40, "vocab_size": len(second)}
    for part, values in overrides.items():
        config[part] |= values
    with torch.random.fork_rng():
        torch.manual_seed(0)
        unet = UNet2DConditionModel.from_config(config["unet"])
        vae = AutoencoderKL.from_config(config["vae"])
        text_encoder = _spread(CLIPTextModel(CLIPTextConfig(**config["text_encoder"])))
        text_encoder_2 = _spread(CLIPTextModelWithProjection(CLIPTextConfig(**config["text_encoder_2"])))
    pipe = StableDiffusionXLPipeline(
        unet=_frozen(unet),
        vae=_frozen(vae),
        text_encoder=_frozen(text_encoder),
        text_encoder_2=_frozen(text_encoder_2),
        tokenizer=tokenizer,
        tokenizer_2=second,
        scheduler=EulerDiscreteScheduler.from_config(config["scheduler"]),
        add_watermarker=False,
    )
    pipe.set_progress_bar_config(disable=True)
    return pipe


def toyland_pipeline() -> StableDiffusionPipeline:
    """Toyland before its training, in memory."""
    tokenizer = build_tokenizer(vocabulary(), models.TEXT_POSITIONS)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        unet, vae, text_encoder = models.unet(), models.autoencoder(), _spread(models.text_encoder(tokenizer))
    return _pipeline(unet=unet, vae=vae, text_encoder=text_encoder, tokenizer=tokenizer, scheduler=models.scheduler())


def _pipeline(**parts: Any) -> StableDiffusionPipeline:
    for part in ("unet", "vae", "text_encoder"):
        _frozen(parts[part])
    absent: dict[str, Any] = {"safety_checker": None, "feature_extractor": None}
    pipe = StableDiffusionPipeline(**parts, **absent, requires_safety_checker=False)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def _frozen(module: Any) -> Any:
    return module.requires_grad_(False).eval()


def _ids(tokenizer: Any) -> dict[str, int]:
    special = {"bos_token_id": tokenizer.bos_token_id, "eos_token_id": tokenizer.eos_token_id}
    return {"vocab_size": len(tokenizer), **special}


def _spread(text_encoder: Any) -> Any:
    """Larger embeddings than CLIP starts training with, so that different words get clearly different encodings."""
    with torch.no_grad():
        for module in text_encoder.modules():
            if isinstance(module, nn.Embedding):
                module.weight.mul_(20)
    return text_encoder
