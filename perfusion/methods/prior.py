"""Prior preservation: terms that hold the model at what it knew of the superclass.

prior         the denoising error of pictures of the superclass (Ruiz et al. 2023, Eq. 2).
preservation  how far the model has moved from the frozen one's answers, on the concept's own noisy pictures with the
              superclass's name in their prompts. It needs no pictures of the superclass.
"""

from __future__ import annotations

import dataclasses
from abc import abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from perfusion.backbones.base import Backbone, Encoding
from perfusion.config import ConfigError
from perfusion.data.prompts import PromptError, fill, replace_placeholder
from perfusion.methods.base import Batch, Method, MethodOptions, Word, check_bounds, masked_mean, target_of


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
    preservation_weight: float = 0.0  # of the term; 0: none

    @property
    def prior(self) -> bool:
        """Whether pictures of the superclass are needed."""
        return self.prior_images > 0 and self.prior_weight > 0


class _Held(NamedTuple):
    """A term that holds the model: its name and weight, and what the denoiser is asked for it."""

    name: str
    weight: float
    batch: Batch
    encoding: Encoding


class PriorMethod(Method):
    """A method whose loss is the denoising error of the concept's pictures plus terms that preserve the prior."""

    options: PriorOptions
    newer = (*Method.newer, "preservation_weight")

    @abstractmethod
    def aside(self) -> AbstractContextManager[None]:
        """The frozen model for as long: what the method has changed is out of the way."""

    def __init__(self, options: PriorOptions, word: Word) -> None:
        super().__init__(options, word)
        bounds = {
            "prior_weight": (options.prior_weight >= 0, "at least 0"),
            "prior_images": (options.prior_images >= 0, "at least 0"),
            "prior_steps": (options.prior_steps >= 1, "at least 1"),
            "preservation_weight": (options.preservation_weight >= 0, "at least 0"),
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
        """`denoising`, and, weighted, those of `prior` and `preservation` that there are; all come from one call."""
        held = [*self._held(backbone, batch)]
        if not held:
            return super().terms(backbone, batch, encoding)
        batches = [batch, *(one.batch for one in held)]
        every = {key: torch.cat([getattr(part, key) for part in batches]) for key in ("latents", "noise", "timesteps")}
        targets = torch.cat([target_of(backbone, part) for part in batches])
        together = dataclasses.replace(batch, target=targets, **every)
        error = self.error(backbone, together, joined(encoding, *(one.encoding for one in held)))
        own, *others = error.split([len(part.latents) for part in batches])
        weighted = {one.name: one.weight * part.mean() for one, part in zip(held, others, strict=True)}
        return {"denoising": masked_mean(own, batch.masks), **weighted}

    def _held(self, backbone: Backbone, batch: Batch) -> Iterator[_Held]:
        if prior := batch.prior:
            yield _Held("prior", self.options.prior_weight, prior, backbone.encode(prior.prompts, None))
        if self.options.preservation_weight > 0:
            word = self.word
            prompts = [replace_placeholder(prompt, word.placeholder, word.superclass) for prompt in batch.prompts]
            noisy = backbone.add_noise(batch.latents, batch.noise, batch.timesteps)
            with torch.no_grad(), self.aside():
                answers = backbone.predict(noisy, batch.timesteps, backbone.encode(prompts, None))
            moved = dataclasses.replace(batch, target=answers)
            yield _Held("preservation", self.options.preservation_weight, moved, backbone.encode(prompts, None))


def joined(*encodings: Encoding) -> Encoding:
    """The encodings of the prompts of all, one after the other."""
    return Encoding(
        torch.cat([one.context for one in encodings]),
        torch.cat([one.concept for one in encodings]),
        _joined([one.extra for one in encodings]),
        _joined([one.projected for one in encodings]),
    )


def _joined(parts: Sequence[Any]) -> Any:
    if parts[0] is None:
        return None
    if isinstance(parts[0], Mapping):
        return {key: _joined([part[key] for part in parts]) for key in parts[0]}
    return torch.cat([*parts])
