"""For every step and slot of a training the draws that belong to it."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TypedDict

import torch
from torch import Tensor


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
    mirrored: bool
    """Whether the picture is mirrored."""


@dataclass(frozen=True)
class StepDataset:
    """The whole training as one epoch: item k is slot `k % batch_size` of step `k // batch_size`.

    Item k depends on k and on the arguments and on nothing that happened before, so a training that is resumed at a
    step, in any process, sees exactly what one that never stopped would see. It holds no picture: their latents are
    computed once, elsewhere. Over several processes the items of one step are the global batch.

    The pictures come in blocks: draws [j·n, (j + 1)·n) use each of the n pictures once, in an order of their own.
    """

    n_images: int  # n
    prompts: Sequence[str]  # ready ones, one of which is drawn for each item
    latent_shape: Sequence[int]  # of one noise, such as (4, 64, 64)
    steps: int  # optimizer steps of the whole training
    batch_size: int  # items of one step, over all processes
    seed: int  # of the run
    num_train_timesteps: int  # of the noise schedule
    captions: Sequence[str | None] = ()  # of picture k, in the place of a drawn prompt; None for none; or all none
    mirror: bool = False  # mirror half of the items; all else of them is the same as without

    def __post_init__(self) -> None:
        assert self.prompts and min(self.n_images, self.steps, self.batch_size, self.num_train_timesteps) > 0

    def __len__(self) -> int:
        return self.steps * self.batch_size

    def __getitem__(self, k: int) -> Draw:
        if not 0 <= k < len(self):
            raise IndexError(f"item {k} of {len(self)}")
        step, slot = divmod(k, self.batch_size)
        draw = generator_of("step", self.seed, step, slot)
        prompt = int(torch.randint(len(self.prompts), (), generator=draw))
        timestep = int(torch.randint(self.num_train_timesteps, (), generator=draw))
        mirrored = bool(torch.randint(2, (), generator=draw))  # drawn in any case, so that the noise is the same
        noise = torch.randn(*self.latent_shape, generator=draw)
        index = self._image(k)
        return {
            "index": index,
            "prompt": self._caption(index) or self.prompts[prompt],
            "timestep": timestep,
            "noise": noise,
            "mirrored": mirrored and self.mirror,
        }

    def prompt(self, k: int) -> str:
        """The prompt of item k alone."""
        if caption := self._caption(self._image(k)):
            return caption
        draw = generator_of("step", self.seed, *divmod(k, self.batch_size))
        return self.prompts[int(torch.randint(len(self.prompts), (), generator=draw))]

    def _caption(self, index: int) -> str | None:
        return self.captions[index] if self.captions else None

    def _image(self, k: int) -> int:
        block, place = divmod(k, self.n_images)
        return int(torch.randperm(self.n_images, generator=generator_of("images", self.seed, block))[place])
