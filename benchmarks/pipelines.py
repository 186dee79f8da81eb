"""The pipelines that benchmarks run on, and a concept in them: the method as it is trained, whose size alone counts.

`toyland` is the shipped pipeline; `sd15` is Stable Diffusion 1.5 in full size with random weights.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from contextlib import contextmanager
from tempfile import TemporaryDirectory
from typing import Any

import torch
from diffusers import DDIMScheduler, StableDiffusionPipeline
from safetensors.torch import save_file

import perfusion
from perfusion.backbones import Backbone, around, default_config
from perfusion.backbones.layouts import untrained_pipeline
from perfusion.backbones.single_file import clip_tokenizer
from perfusion.config import CovarianceConfig
from perfusion.methods.base import Method, Word, build

WORD = Word("<cat*>", "cat")
CAPTIONS = 256  # of Toyland's C, whose size costs no time later
BACKBONES = {"toyland": "toyland", "sd15": "stable_diffusion"}


def pipeline(model: str, device: torch.device) -> StableDiffusionPipeline:
    """A pipeline of its own at each call, with the same weights: float32, frozen, without a progress bar."""
    pipe: Any = _stable_diffusion(device) if model == "sd15" else perfusion.load("toyland", device=str(device))
    pipe.set_progress_bar_config(disable=True)
    assert isinstance(pipe, StableDiffusionPipeline)
    return pipe


@contextmanager
def concept(
    model: str, pipe: StableDiffusionPipeline, training: bool, word: Word = WORD, checkpointing: bool = False
) -> Iterator[tuple[Backbone, Method]]:
    """`pipe`, which is `pipeline(model)`, as a backbone, with the method perfusion attached for training or drawing."""
    method = build({"name": "perfusion"}, word).train(training)
    with TemporaryDirectory() as folder:
        # A `C` that is quickly there: of few captions, or, where they would take long, some ready matrix.
        covariance = CovarianceConfig(captions="toyland", count=CAPTIONS, cache=folder)
        if model != "toyland":
            covariance.matrix = f"{folder}/C.safetensors"
            save_file({"second_moment": torch.eye(pipe.text_encoder.config.hidden_size) + 0.1}, covariance.matrix)
        config = default_config(BACKBONES[model])
        backbone = around(
            pipe, dataclasses.replace(config, covariance=covariance, gradient_checkpointing=checkpointing)
        )
        backbone.second_moment(progress=False)
        method.attach(backbone)
        method.state()  # makes the method ask for C, if it has not yet
    try:
        yield backbone, method
    finally:
        method.detach()


def _stable_diffusion(device: torch.device) -> StableDiffusionPipeline:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        pipe: Any = untrained_pipeline("sd15", device)
    for part in (pipe.unet, pipe.vae, pipe.text_encoder):
        part.requires_grad_(False).eval()
    pipe.register_modules(
        tokenizer=clip_tokenizer("<|endoftext|>"), scheduler=DDIMScheduler.from_config(pipe.scheduler.config)
    )
    return pipe
