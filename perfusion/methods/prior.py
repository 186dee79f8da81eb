"""Prior preservation (Ruiz et al. 2023, Eq. 2): a term that holds the model at pictures of the superclass."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from perfusion.backbones.base import Backbone, Encoding
from perfusion.config import ConfigError
from perfusion.data.prompts import PromptError, fill
from perfusion.methods.base import Batch, Method, MethodOptions, Word, check_bounds, masked_mean


@dataclass
class PriorOptions(MethodOptions):
    """What methods have that preserve the prior. `concept.prior` says whether its pictures are drawn or real."""

    prompt: str | None = "a photo of a {}"  # of every training picture, {} being the concept; null: the backbone's set
    masked_loss: bool = False  # weigh the denoising error by the masks, where there are some; the papers have none
    prior_weight: float = 1.0  # of the term
    prior_images: int = 200  # pictures of the superclass; 0: none
    prior_prompt: str = "a photo of a {}"  # that they are drawn and trained with, {} being the superclass
    prior_steps: int = 50  # denoising steps
    prior_guidance: float = 7.5
    prior_seed: int = 0

    @property
    def prior(self) -> bool:
        """Whether there is such a term."""
        return self.prior_images > 0 and self.prior_weight > 0


class PriorMethod(Method):
    """A method whose loss is the denoising error of the concept's pictures plus `prior_weight` times that of pictures
    of the superclass."""

    options: PriorOptions

    def __init__(self, options: PriorOptions, word: Word) -> None:
        super().__init__(options, word)
        bounds = {
            "prior_weight": (options.prior_weight >= 0, "at least 0"),
            "prior_images": (options.prior_images >= 0, "at least 0"),
            "prior_steps": (options.prior_steps >= 1, "at least 1"),
        }
        check_bounds(options, bounds)
        for key in ("prompt", "prior_prompt"):
            try:
                fill(getattr(options, key) or "{}", word.superclass)
            except PromptError as error:
                raise ConfigError(f"method.{key}: {error}") from error

    def adapted(self, batch: Batch) -> Batch:
        """With the one prompt of `prompt`, if there is one, for every picture."""
        batch = super().adapted(batch)
        if self.options.prompt is None:
            return batch
        prompt = fill(self.options.prompt, self.word.placeholder)
        step = batch.step_prompts
        return dataclasses.replace(
            batch,
            prompts=[prompt] * len(batch.prompts),
            step_prompts=None if step is None else [prompt] * len(step),
        )

    def terms(self, backbone: Backbone, batch: Batch, encoding: Encoding) -> dict[str, Tensor]:
        """`denoising`, and `prior`, weighted, where the batch has pictures for it; both come from one call."""
        if batch.prior is None:
            return super().terms(backbone, batch, encoding)
        prior = batch.prior
        both = dataclasses.replace(
            batch,
            latents=torch.cat([batch.latents, prior.latents]),
            noise=torch.cat([batch.noise, prior.noise]),
            timesteps=torch.cat([batch.timesteps, prior.timesteps]),
        )
        error = self.error(backbone, both, joined(encoding, backbone.encode(prior.prompts, None)))
        own, others = error.split([len(batch.latents), len(prior.latents)])
        return {"denoising": masked_mean(own, batch.masks), "prior": self.options.prior_weight * others.mean()}


def joined(first: Encoding, second: Encoding) -> Encoding:
    """The encodings of the prompts of both, one after the other."""
    return Encoding(
        torch.cat([first.context, second.context]),
        torch.cat([first.concept, second.concept]),
        _joined(first.extra, second.extra),
        _joined(first.projected, second.projected),
    )


def _joined(first: Any, second: Any) -> Any:
    if first is None:
        return None
    if isinstance(first, Mapping):
        return {key: _joined(first[key], second[key]) for key in first}
    return torch.cat([first, second])
