"""Toyland's pipeline: a small Stable Diffusion that ships with the project, and captions of its own world for `C`."""

from __future__ import annotations

import dataclasses
import os
import re
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, ClassVar, Self

import numpy as np
import torch

from perfusion import toyland
from perfusion.backbones import loading
from perfusion.backbones.base import BackboneError, TokenError
from perfusion.backbones.stable_diffusion import StableDiffusionBackbone
from perfusion.config import BackboneConfig, CovarianceConfig
from perfusion.covariance.captions import Captions
from perfusion.toyland.captions import caption, vocabulary
from perfusion.toyland.models import LATENT_CHANNELS, TEXT_POSITIONS
from perfusion.toyland.world import SUPERCLASSES, WORLD_VERSION, sample_scene

WEIGHTS = Path(toyland.__file__).with_name("weights") / "pipeline"
_PLAIN_WORD = re.compile(r"(?<![<\w])[a-z]{2,}(?![\w*>])")  # not a placeholder
CAPTION_SEED = 1 << 40  # of the first scene; the pipeline is trained on other seeds


class ToylandBackbone(StableDiffusionBackbone):
    """The shipped pipeline, or another one of its kind in `backbone.path`."""

    family: ClassVar[str] = "toyland"

    @classmethod
    def defaults(cls) -> BackboneConfig:
        return BackboneConfig(
            name="toyland",
            resolution=64,
            prompts="toyland",
            steps=50,
            guidance=4.0,
            covariance=CovarianceConfig(captions="toyland", count=4000, ridge=1e-2),
        )

    @classmethod
    def kind(cls) -> dict[str, str]:
        return {**super().kind(), "world": str(WORLD_VERSION)}

    @classmethod
    def load(cls, config: BackboneConfig) -> Self:
        """As for other backbones; and torch goes on with one thread in this process, unless OMP_NUM_THREADS says
        otherwise. On models this small several threads gain nothing, and waiting for one another they take ten times
        as long as soon as anything else runs on the machine.
        """
        if "OMP_NUM_THREADS" not in os.environ:
            torch.set_num_threads(1)
        return super().load(config)

    @classmethod
    def fits(cls, pipe: Any) -> bool:
        """Whether `pipe` is of Toyland's kind: its number of latent channels and of text positions, and its words."""
        if not super().fits(pipe) or pipe.tokenizer is None:
            return False
        if (pipe.unet.config.in_channels, pipe.tokenizer.model_max_length) != (LATENT_CHANNELS, TEXT_POSITIONS):
            return False
        known = pipe.tokenizer.get_vocab()
        return all(f"{word}</w>" in known for word in vocabulary())

    @classmethod
    def source(cls, config: BackboneConfig) -> loading.Source:
        if config.path:
            return super().source(config)
        if not (WEIGHTS / "model_index.json").is_file():
            raise BackboneError(f"backbone.path: Toyland's weights are not in {WEIGHTS}; run `make toyland`")
        return super().source(dataclasses.replace(config, path=str(WEIGHTS)))

    @classmethod
    def check_words(cls, config: BackboneConfig, placeholder: str, superclass: str) -> None:
        super().check_words(config, placeholder, superclass)
        if not config.path and superclass not in SUPERCLASSES:
            raise TokenError(
                f"concept.superclass: found {superclass!r}, expected a kind of toy that Toyland knows: "
                f"{', '.join(SUPERCLASSES)}"
            )

    def check_prompts(self, prompts: Sequence[str]) -> None:
        super().check_prompts(prompts)
        for prompt in prompts:
            words = _PLAIN_WORD.findall(prompt.lower())
            if unknown := [word for word in words if word not in vocabulary()]:
                print(f"warning: {prompt!r}: Toyland does not know {', '.join(unknown)}", file=sys.stderr)

    @classmethod
    def captions_of(cls, settings: CovarianceConfig) -> Captions:
        if settings.captions == "toyland":
            return Captions(settings.count, lambda: toyland_captions(settings.count))
        return super().captions_of(settings)


def toyland_captions(count: int) -> Iterator[str]:
    """`count` captions as the pipeline was trained on, of scenes with the seeds from `CAPTION_SEED` on."""
    for seed in range(CAPTION_SEED, CAPTION_SEED + count):
        yield caption(sample_scene(seed), np.random.default_rng(seed)).text


BACKBONE = ToylandBackbone
