"""Toyland's pipeline for the benchmarks: the shipped one, else one of its architecture with random weights, which takes
as long. And a concept in it: the method as it is trained, with a small `C`, whose size costs no time later."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from contextlib import contextmanager
from tempfile import TemporaryDirectory
from typing import Any

import torch
from diffusers import StableDiffusionPipeline

import perfusion
from perfusion.backbones import Backbone, around, default_config
from perfusion.backbones.toyland import WEIGHTS
from perfusion.config import CovarianceConfig
from perfusion.methods.base import Method, Word, build
from perfusion.toyland import models
from perfusion.toyland.captions import vocabulary
from perfusion.toyland.tokenizer import build_tokenizer

WORD = Word("<cat*>", "cat")
CAPTIONS = 256  # of C


def pipeline(device: torch.device) -> StableDiffusionPipeline:
    """A pipeline of its own at each call, with the same weights: float32, frozen, without a progress bar."""
    if (WEIGHTS / "model_index.json").is_file():
        pipe = perfusion.load("toyland", device=str(device))
        assert isinstance(pipe, StableDiffusionPipeline)
    else:
        pipe = _untrained().to(device)
    pipe.set_progress_bar_config(disable=True)
    return pipe


@contextmanager
def concept(pipe: StableDiffusionPipeline, training: bool, word: Word = WORD) -> Iterator[tuple[Backbone, Method]]:
    """`pipe` as a backbone, with the method perfusion attached in training or in eval mode."""
    method = build({"name": "perfusion"}, word).train(training)
    with TemporaryDirectory() as cache:
        captions = CovarianceConfig(captions="toyland", count=CAPTIONS, cache=cache)
        backbone = around(pipe, dataclasses.replace(default_config("toyland"), covariance=captions))
        backbone.second_moment(progress=False)
        method.attach(backbone)
        method.state()  # makes the method ask for C, if it has not yet
    try:
        yield backbone, method
    finally:
        method.detach()


def _untrained() -> StableDiffusionPipeline:
    tokenizer = build_tokenizer(vocabulary(), models.TEXT_POSITIONS)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        unet, vae, text_encoder = models.unet(), models.autoencoder(), models.text_encoder(tokenizer)
    parts: dict[str, Any] = {"unet": unet, "vae": vae, "text_encoder": text_encoder}
    for part in parts.values():
        part.requires_grad_(False).eval()
    parts |= {"tokenizer": tokenizer, "scheduler": models.scheduler()}
    absent: dict[str, Any] = {"safety_checker": None, "feature_extractor": None}
    return StableDiffusionPipeline(**parts, **absent, requires_safety_checker=False)
