"""The pipelines that benchmarks run on, and a concept in them: the method as it is trained, whose size alone counts;
and what attaching one takes.

`toyland` is the shipped pipeline; `sd15` is Stable Diffusion 1.5 in full size with random weights.
"""

from __future__ import annotations

import dataclasses
from tempfile import TemporaryDirectory
from typing import Any

import torch
from diffusers import DDIMScheduler, StableDiffusionPipeline
from safetensors.torch import save_file
from torch import Tensor

import perfusion
from benchmarks.timing import Sides
from perfusion.backbones import Backbone, around, default_config
from perfusion.backbones.fingerprint import forget
from perfusion.backbones.layouts import untrained_pipeline
from perfusion.backbones.single_file import clip_tokenizer
from perfusion.concept import Concept
from perfusion.config import CovarianceConfig
from perfusion.data.prompts import fill, templates
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


def attached(
    model: str, pipe: StableDiffusionPipeline, training: bool, word: Word = WORD, checkpointing: bool = False
) -> tuple[Backbone, Method]:
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
    return backbone, method


def attaching(model: str, device: torch.device, anew: bool = False) -> Sides:
    """A loaded concept put into a pipeline and taken out again, against what no first attaching can do without.

    Subject: `Concept.attach` and `detach`: all checks, the fingerprint of the weights included, the word, the edit; on
    a model of which nothing is known yet if `anew`, else on one that had a concept of the same superclass, so the
    fingerprint and the superclass's encoding are known. Baseline: encoding the superclass in the prompt templates,
    which gives the locked keys; it returns the encoding (d,).
    """
    pipe = pipeline(model, device)
    backbone, method = attached(model, pipe, training=True)
    trained = Concept.of(method, backbone, seed=0)
    method.detach()

    def attach() -> None:
        if anew:
            forget(pipe.unet, pipe.text_encoder)
        trained.attach(pipe).detach()

    @torch.no_grad()
    def encode() -> Tensor:
        prompts = [fill(template, WORD.superclass) for template in templates(backbone.config.prompts)]
        return backbone.encode(prompts, WORD.superclass, padded=False).mean_at_word()

    return Sides(attach, encode)


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
