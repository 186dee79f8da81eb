"""Backbones for tests that attach concepts, and concepts that were never trained."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from perfusion.backbones import backbone_class, default_config
from perfusion.backbones.base import Backbone
from perfusion.backbones.sdxl import StableDiffusionXLBackbone
from perfusion.backbones.stable_diffusion import StableDiffusionBackbone
from perfusion.concept import Concept
from perfusion.config import BackboneConfig, CovarianceConfig
from perfusion.methods.base import Word, build
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
    """Of any method, `name` among its options: its start, and noise on every number but those of a direction."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        method = build(options, word)
        method.train().attach(backbone)
    known, draw = method.state(), torch.Generator().manual_seed(seed)
    state = {name: value + torch.randn(value.shape, generator=draw) * 0.1 for name, value in known.items()}
    method.load_state(state | {name: value for name, value in known.items() if name == "direction"})
    concept = Concept.of(method, backbone, seed)
    method.detach()
    return concept


def untrained_concept(backbone: Backbone, word: Word, seed: int, **options: Any) -> Concept:
    """Of Perfusion: not what training would give, but far from the base model."""
    return random_concept(backbone, word, seed, **{"name": "perfusion", "sample_beta": 0.4, **options})


class Snapshot:
    """All that a pipeline of any family is: its tokenizers, its modules and their hooks and attributes, and its values,
    where they lie and whether they are trained."""

    def __init__(self, pipe: Any) -> None:
        self.pipe, self.known = pipe, _known(pipe)

    def differences(self) -> list[str]:
        """Names of what is not as it was."""
        now, then = _known(self.pipe), self.known
        moved = [name for name, other in zip(now, then, strict=False) if name != other and now.keys() == then.keys()]
        return moved + [name for name in now.keys() | then.keys() if not _same(now.get(name), then.get(name))]


def _known(pipe: Any) -> dict[str, tuple[Any, ...]]:
    found: dict[str, tuple[Any, ...]] = {"the pipeline": (_attributes(pipe),)}
    for part, root in pipe.components.items():
        if part.startswith("tokenizer"):
            backend = getattr(root, "_tokenizer", None)
            told = {} if backend is None else json.loads(backend.to_str())
            kept = {name: value for name, value in told.items() if name not in ("padding", "truncation")}
            found[part] = (root, dict(root.added_tokens_encoder), kept)  # which no call sets
        if not isinstance(root, nn.Module):
            continue
        for name, module in root.named_modules():
            hooks = [len(value) for name, value in vars(module).items() if name.endswith(("_hooks", "_with_kwargs"))]
            found[f"the module {part}.{name}"] = (module, hooks, _attributes(module))
        for name, value in root.state_dict(keep_vars=True).items():
            found[f"{part}.{name}"] = (value.detach().clone(), value.data_ptr(), value.requires_grad)
    return found


def _attributes(part: Any) -> list[str]:
    return sorted(name for name in vars(part) if not name.startswith("_"))  # which pipelines change at every call


def _same(one: Any, other: Any) -> bool:
    if isinstance(one, Tensor) and isinstance(other, Tensor):
        return torch.equal(one, other)
    if isinstance(one, tuple) and isinstance(other, tuple):
        return len(one) == len(other) and all(map(_same, one, other))
    return type(one) is type(other) and one == other
