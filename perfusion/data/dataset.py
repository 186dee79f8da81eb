"""What a training sees: the concept's pictures as tensors, and for every step and slot the draws that belong to it."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypedDict

import numpy as np
import torch
from PIL.Image import Image, fromarray
from torch import Tensor
from torch.utils.data import Dataset

from perfusion.data.crop import fit
from perfusion.data.images import find_images, read_image
from perfusion.data.masks import check_aspect, find_masks, read_mask

Segment = Callable[[Image, Path], np.ndarray]  # a picture, and what messages call it


@dataclass(frozen=True)
class Examples:
    """The n pictures of one concept.

    Attributes:
        pixels: float32 (n, 3, R, R) in [-1, 1].
        masks: float32 (n, 1, R, R) in [0, 1], none of them zero everywhere; or None.
        names: n file names, for messages.
    """

    pixels: Tensor
    masks: Tensor | None
    names: list[str]

    def __post_init__(self) -> None:
        n, channels, height, width = self.pixels.shape
        assert n == len(self.names) > 0 and channels == 3 and height == width
        assert self.masks is None or self.masks.shape == (n, 1, height, width)

    def __len__(self) -> int:
        return len(self.names)

    def pictures(self) -> list[Image]:
        """The n pictures as they are after cropping and scaling, RGB."""
        values = ((self.pixels + 1) * 127.5).round().clamp(0, 255).byte()
        return [fromarray(picture.permute(1, 2, 0).numpy()) for picture in values]


def load_examples(
    images_spec: str | Sequence[str],
    masks_spec: str | Sequence[str] | None,
    resolution: int,
    base: Path | None = None,
    segment: Segment | None = None,
) -> Examples:
    """The pictures, and masks if any, that a person named, cropped and scaled by `crop.fit` to R = `resolution`.

    Args:
        images_spec: as in `images.find_images`.
        masks_spec: as in `masks.find_masks`; None for none.
        resolution: R, in pixels.
        base: the folder that relative paths start from; default: the working directory.
        segment: gives a picture's mask, float32 (H, W) in [0, 1] of its aspect ratio, where `masks_spec` is None.

    Raises:
        ConceptImageError: anything that is wrong with the files, each of which is decoded in full here, or what
            `segment` raises.
    """
    assert masks_spec is None or segment is None
    paths = find_images(images_spec, base)
    mask_paths = [None] * len(paths) if masks_spec is None else find_masks(masks_spec, paths, base)
    pixels: list[Tensor] = []
    masks: list[Tensor] = []
    for path, mask_path in zip(paths, mask_paths, strict=True):
        image, mask = read_image(path), None
        if mask_path is not None:
            mask = read_mask(mask_path)
            check_aspect(mask, mask_path, image, path)
        elif segment is not None:
            mask = segment(image, path)
        square, square_mask = fit(image, mask, resolution)
        pixels.append(square)
        if square_mask is not None:
            masks.append(square_mask[None])
    return Examples(torch.stack(pixels), torch.stack(masks) if masks else None, [path.name for path in paths])


def seed_of(*parts: int | float | str) -> int:
    """A seed in [0, 2⁶³) that stands for `parts` in this order: their BLAKE2b hash, the same on every machine."""
    digest = hashlib.blake2b(json.dumps(parts).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") >> 1


def generator_of(*parts: int | float | str) -> torch.Generator:
    """A new CPU generator that starts at `seed_of(*parts)`."""
    return torch.Generator().manual_seed(seed_of(*parts))


class Draw(TypedDict):
    """Everything random about one sample of one training step."""

    index: int
    """Which picture, in [0, n)."""
    prompt: str
    timestep: int
    """In [0, num_train_timesteps)."""
    noise: Tensor
    """Standard normal, float32, of the latent's shape."""


class StepDataset(Dataset[Draw]):
    """The whole training as one epoch: item k is slot `k % batch_size` of step `k // batch_size`.

    Item k depends on k and on the arguments and on nothing that happened before, so a training that is resumed at a
    step, in any process, sees exactly what one that never stopped would see. It holds no picture: their latents are
    computed once, elsewhere. A `DataLoader` reads it in order (`shuffle=False`) in batches of `batch_size`; over
    several processes that is the global batch.

    The pictures come in blocks: draws [j·n, (j + 1)·n) use each of the n pictures once, in an order of their own.

    Args:
        n_images: n.
        prompts: ready prompts, one of which is drawn for each item.
        latent_shape: of one noise, such as (4, 64, 64).
        steps: optimizer steps of the whole training.
        batch_size: items of one step, over all processes.
        seed: of the run.
        num_train_timesteps: of the noise schedule.

    Raises:
        ValueError: `prompts` is empty.
    """

    def __init__(
        self,
        n_images: int,
        prompts: Sequence[str],
        latent_shape: Sequence[int],
        steps: int,
        batch_size: int,
        seed: int,
        num_train_timesteps: int,
    ) -> None:
        if not prompts:
            raise ValueError("no training prompts; expected at least one, such as 'a photo of a <cat*>'")
        assert min(n_images, steps, batch_size, num_train_timesteps) > 0
        self.n_images = n_images
        self.prompts = tuple(prompts)
        self.latent_shape = tuple(latent_shape)
        self.steps = steps
        self.batch_size = batch_size
        self.seed = seed
        self.num_train_timesteps = num_train_timesteps

    def __len__(self) -> int:
        return self.steps * self.batch_size

    def __getitem__(self, k: int) -> Draw:
        if not 0 <= k < len(self):
            raise IndexError(f"item {k} of {len(self)}")
        step, slot = divmod(k, self.batch_size)
        draw = generator_of("step", self.seed, step, slot)
        prompt = int(torch.randint(len(self.prompts), (), generator=draw))
        timestep = int(torch.randint(self.num_train_timesteps, (), generator=draw))
        torch.randint(2, (), generator=draw)  # without this draw the noise of a seed would be another
        noise = torch.randn(self.latent_shape, generator=draw)
        return {
            "index": self._image(k),
            "prompt": self.prompts[prompt],
            "timestep": timestep,
            "noise": noise,
        }

    def prompt(self, k: int) -> str:
        """The prompt of item k alone."""
        draw = generator_of("step", self.seed, *divmod(k, self.batch_size))
        return self.prompts[int(torch.randint(len(self.prompts), (), generator=draw))]

    def _image(self, k: int) -> int:
        block, place = divmod(k, self.n_images)
        return int(torch.randperm(self.n_images, generator=generator_of("images", self.seed, block))[place])
