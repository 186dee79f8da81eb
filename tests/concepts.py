"""Backbones for tests that attach concepts, and concepts that were never trained."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import torch
from torch import nn

from perfusion.backbones import backbone_class, default_config
from perfusion.backbones.base import Backbone
from perfusion.backbones.sdxl import StableDiffusionXLBackbone
from perfusion.backbones.stable_diffusion import StableDiffusionBackbone
from perfusion.concept import Concept
from perfusion.config import BackboneConfig, CovarianceConfig
from perfusion.methods.base import Word, build
from perfusion.methods.perfusion import Perfusion
from tests.pipelines import tiny_pipeline, tiny_sdxl

CAPTIONS = 50  # of C


def tiny_backbone(cache: Path) -> Backbone:
    """Stable Diffusion's architecture with few channels and random weights."""
    covariance = CovarianceConfig(count=CAPTIONS, cache=str(cache))
    config = BackboneConfig(name="stable_diffusion", resolution=64, device="cpu", covariance=covariance)
    return StableDiffusionBackbone.around(tiny_pipeline(), config)


def tiny_sdxl_backbone(cache: Path) -> StableDiffusionXLBackbone:
    """SDXL's architecture with few channels and random weights."""
    covariance = CovarianceConfig(count=CAPTIONS, cache=str(cache))
    config = BackboneConfig(name="sdxl", resolution=64, device="cpu", covariance=covariance)
    return StableDiffusionXLBackbone.around(tiny_sdxl(), config)


def toyland_backbone(pipeline: Path, cache: Path) -> Backbone:
    """Toyland around the weights in `pipeline`."""
    config = dataclasses.replace(default_config("toyland"), path=str(pipeline), device="cpu")
    config.covariance.count, config.covariance.cache = CAPTIONS, str(cache)
    return backbone_class("toyland").load(config)


def random_concept(backbone: Backbone, word: Word, seed: int, **options: Any) -> Concept:
    """Of any method, `name` among its options: its start, and noise on every number."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        method = build(options, word)
        method.train().attach(backbone)
    draw = torch.Generator().manual_seed(seed)
    state = {name: value + torch.randn(value.shape, generator=draw) * 0.1 for name, value in method.state().items()}
    method.load_state(state)
    concept = Concept.of(method, backbone, seed)
    method.detach()
    return concept


def untrained_concept(backbone: Backbone, word: Word, seed: int, **options: Any) -> Concept:
    """Not what training would give, but far from the base model."""
    method = build({"name": "perfusion", "sample_beta": 0.4, **options}, word)
    assert isinstance(method, Perfusion)
    method.train().attach(backbone)
    known, draw = method.state(), torch.Generator().manual_seed(seed)
    state = {name: value + torch.randn(value.shape, generator=draw) * 0.1 for name, value in known.items()}
    method.load_state({**state, "direction": known["direction"]})
    concept = Concept.of(method, backbone, seed)
    method.detach()
    return concept


def things_and_hooks(pipe: Any) -> list[int]:
    """All tokenizers and modules of a pipeline of any family, and how many hooks each module has."""
    parts = [part for part in pipe.components.values() if isinstance(part, nn.Module)]
    modules = [module for part in parts for module in part.modules()]
    hooks = [len(module._forward_hooks) + len(module._forward_pre_hooks) for module in modules]
    tokenizers = [id(part) for name, part in pipe.components.items() if name.startswith("tokenizer")]
    return [*tokenizers, *map(id, modules), *hooks]
