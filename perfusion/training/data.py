"""What the training loop reads: the concept's latents, computed once, and the draws that belong to every step."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from lightning.pytorch import LightningDataModule
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader, Sampler, StackDataset

from perfusion.backbones.base import Backbone
from perfusion.config import ConceptConfig, ConfigError
from perfusion.data import clipseg
from perfusion.data.crop import fit
from perfusion.data.dataset import Draw, Examples, StepDataset, load_examples, seed_of
from perfusion.data.masks import mask_to_latent
from perfusion.data.prior import PriorImages
from perfusion.data.prompts import fill, templates
from perfusion.methods.base import Batch, MethodOptions
from perfusion.toyland.draw import render
from perfusion.toyland.world import SUPERCLASSES, concept_scene, sample_instance

# Where the pictures that Toyland draws are set: none of the places that the validation prompts ask for.
PLACES = ("plain", "meadow", "kitchen", "forest", "desert")
_ENCODED_AT_ONCE = 8 * 512 * 512  # pixels in one call of the autoencoder; at least one picture


def examples_of(concept: ConceptConfig, resolution: int) -> Examples:
    """The concept's pictures at R = `resolution` pixels: the person's, or drawn by Toyland if there are none.

    Raises:
        ConceptImageError: anything that is wrong with the person's files, or CLIPSeg shall draw masks and cannot.
        ConfigError: masks without images; a superclass that Toyland cannot draw.
    """
    if concept.images is not None and concept.masks == clipseg.SPEC:
        segment = clipseg.ClipSeg(concept.clipseg, concept.superclass, Path(concept.masks_cache).expanduser())
        return load_examples(concept.images, None, resolution, segment=segment)
    if concept.images is not None:
        return load_examples(concept.images, concept.masks, resolution)
    if concept.masks is not None:
        raise ConfigError(f"concept.masks={concept.masks!r}: masks of what? concept.images is not given")
    return _drawn(concept, resolution)


def _drawn(concept: ConceptConfig, resolution: int) -> Examples:
    """Pictures of one toy and its exact masks; picture k of an instance is the same whatever the number of pictures."""
    if concept.superclass not in SUPERCLASSES:
        raise ConfigError(
            f"concept.superclass={concept.superclass!r}: Toyland draws no such thing; give your own pictures with "
            f"concept.images=, or one of: {', '.join(SUPERCLASSES)}"
        )
    if concept.toyland.count < 1:
        raise ConfigError(f"concept.toyland.count={concept.toyland.count}: expected at least one picture")
    toy = sample_instance(np.random.default_rng(concept.toyland.instance), concept.superclass)
    pixels: list[Tensor] = []
    masks: list[Tensor] = []
    for k in range(concept.toyland.count):
        seed = seed_of("toyland concept", concept.toyland.instance, k)
        drawn = render(concept_scene(toy, seed, place=PLACES[k % len(PLACES)]))
        square, mask = fit(Image.fromarray(drawn.image), drawn.masks[0].astype(np.float32) / 255, resolution)
        assert mask is not None
        pixels.append(square)
        masks.append(mask[None])
    names = [f"{concept.superclass}-{concept.toyland.instance}-{k}" for k in range(concept.toyland.count)]
    return Examples(torch.stack(pixels), torch.stack(masks), names)


class ConceptData(LightningDataModule):
    """Batches of `(Batch, names of their pictures)` on the backbone's device, the whole training as one epoch.

    Every draw is a function of (seed, step, slot), and a loader that is made during a resumed run starts at the
    trainer's step, so a resumed training sees what one that never stopped would see. With
    `trainer.accumulate_grad_batches=k` a step's batch is fed in k parts, each of which `Method.on_step` sees.

    Args:
        examples: the n pictures.
        backbone: encodes them, once, in `setup`.
        options: `steps` and `batch_size`.
        placeholder: stands in the training prompts of `backbone.config.prompts`.
        seed: of the run.
        prior: pictures of the superclass, of which every step takes as many as of the concept; their draws are their
            own, so those of the concept are the same with and without them.

    Raises:
        PromptError: no such set of prompts.
    """

    def __init__(
        self,
        examples: Examples,
        backbone: Backbone,
        options: MethodOptions,
        placeholder: str,
        seed: int,
        prior: PriorImages | None = None,
    ) -> None:
        super().__init__()
        self.examples = examples
        self.backbone = backbone
        self.batch_size = options.batch_size
        self.dataset = StepDataset(
            n_images=len(examples),
            prompts=[fill(template, placeholder) for template in templates(backbone.config.prompts)],
            latent_shape=backbone.latent_shape(),
            steps=options.steps,
            batch_size=options.batch_size,
            seed=seed,
            num_train_timesteps=backbone.train_timesteps,
        )
        self.prior = prior
        self.prior_dataset: StepDataset | None = None
        if prior is not None:
            self.prior_dataset = StepDataset(
                n_images=len(prior),
                prompts=prior.prompts,
                latent_shape=backbone.latent_shape(),
                steps=options.steps,
                batch_size=options.batch_size,
                seed=seed_of("prior", seed),
                num_train_timesteps=backbone.train_timesteps,
            )

    def setup(self, stage: str) -> None:
        """Encode all pictures.

        Raises:
            ConceptImageError, TokenError: a picture of the superclass cannot be read, or its caption is too long.
        """
        pixels, side = self.examples.pixels, self.examples.pixels.shape[-1]  # (n, 3, R, R)
        at_once = max(1, _ENCODED_AT_ONCE // side**2)
        self.latents = self._encoded(pixels.split(at_once))  # (n, c, h, w)
        masks = self.examples.masks
        self.masks = None if masks is None else mask_to_latent(masks, self.latents.shape[-1]).to(self.latents.device)
        if prior := self.prior:
            with torch.no_grad():
                for prompt in dict.fromkeys(prior.prompts):
                    self.backbone.encode([prompt], None)
            starts = range(0, len(prior), at_once)
            self.prior_latents = self._encoded(prior.pixels(k, k + at_once, side) for k in starts)

    @torch.no_grad()
    def _encoded(self, parts: Iterable[Tensor]) -> Tensor:
        return torch.cat([self.backbone.latents(p.to(self.backbone.device, self.backbone.dtype)) for p in parts])

    def train_dataloader(self) -> DataLoader[Any]:
        assert self.trainer is not None
        parts = self.trainer.accumulate_grad_batches
        if self.batch_size % parts:
            raise ConfigError(
                f"trainer.accumulate_grad_batches={parts}: expected a divisor of method.batch_size={self.batch_size}"
            )
        order = _From(self.trainer.global_step * self.batch_size, len(self.dataset))
        draws = StackDataset(*filter(None, (self.dataset, self.prior_dataset)))
        return DataLoader(draws, self.batch_size // parts, sampler=order, collate_fn=self._batch)

    def transfer_batch_to_device(self, batch: Any, device: torch.device, dataloader_idx: int) -> Any:
        return batch  # made where the backbone is

    def _batch(self, items: Sequence[tuple[Draw, ...]]) -> tuple[Batch, list[str]]:
        own, *others = zip(*items, strict=True)
        batch = _drawn_batch(own, self.latents, self.masks)
        if self.prior is not None:
            (draws,) = others
            captions = [self.prior.prompts[draw["index"]] for draw in draws]  # each picture's own
            prior = dataclasses.replace(_drawn_batch(draws, self.prior_latents, None), prompts=captions)
            batch = dataclasses.replace(batch, prior=prior)
        return batch, [self.examples.names[draw["index"]] for draw in own]


def _drawn_batch(draws: Sequence[Draw], latents: Tensor, masks: Tensor | None) -> Batch:
    """What was drawn of the pictures with these latents (n, c, h, w) and masks (n, 1, h, w)."""
    index = torch.tensor([draw["index"] for draw in draws], device=latents.device)
    return Batch(
        latents=latents[index],
        masks=None if masks is None else masks[index],
        prompts=[draw["prompt"] for draw in draws],
        noise=torch.stack([draw["noise"] for draw in draws]).to(latents),
        timesteps=torch.tensor([draw["timestep"] for draw in draws], device=latents.device),
    )


class _From(Sampler[int]):
    """The numbers from `start` up to `end`. Its length is `end`, for Lightning counts batches from the run's start."""

    def __init__(self, start: int, end: int) -> None:
        self.start, self.end = start, end

    def __iter__(self) -> Iterator[int]:
        return iter(range(self.start, self.end))

    def __len__(self) -> int:
        return self.end
