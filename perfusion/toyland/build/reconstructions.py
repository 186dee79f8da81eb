"""Scenes as the autoencoder gives them back: what judges of generated pictures must be used to."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torchvision.transforms.v2.functional import gaussian_blur

from perfusion.bars import Bar
from perfusion.toyland.build.budget import device, rank, world_size
from perfusion.toyland.build.train_autoencoder import draw_scenes, made_once
from perfusion.toyland.world import Scene, sample_scene

FIRST_SCENE = 4_200_000_000
BLUR = (0.1, 0.8)  # generated images are a little softer than renders and reconstructions
COUNT = 16_000  # made once and kept; renders are so cheap that they are drawn anew each time


def judged_scene(seed: int) -> Scene:
    """A scene that a judge learns from: two objects in every third, which are harder to tell; HELD_OUT pairs, too."""
    return sample_scene(seed, objects=2 if seed % 3 == 0 else 1, held_out=True)


@dataclass(frozen=True)
class Pool:
    """Reconstructed scenes of this process."""

    pixels: Tensor  # uint8 (n, 3, 64, 64)
    scenes: list[Scene]

    @classmethod
    def of(cls, folder: Path, count: int = COUNT) -> Pool:
        """This process's share of `count` scenes, by `folder/autoencoder`; kept beside it for the next time."""
        share = count // world_size()
        first = FIRST_SCENE + rank() * share
        scenes = [judged_scene(first + i) for i in range(share)]
        made = made_once(
            folder, f"reconstructions-{first}-{share}", lambda vae: {"pixels": reconstructions(vae, scenes)}
        )
        return cls(made["pixels"], scenes)

    def beside(self, fresh: list[Scene], rng: np.random.Generator) -> tuple[list[Scene], Tensor]:
        """n fresh scenes and n of the pool, and their pixels (2n, 3, 64, 64) in [-1, 1], a little blurred, on `device`.

        No scene of the pool comes twice, if they are enough.
        """
        chosen = rng.choice(len(self.scenes), len(fresh), replace=len(self.scenes) < len(fresh)).tolist()
        pixels = torch.cat([draw_scenes(fresh)[0], self.pixels[chosen].float() / 127.5 - 1]).to(device())
        return [*fresh, *(self.scenes[i] for i in chosen)], blurred(pixels, float(rng.uniform(*BLUR)))


def blurred(pixels: Tensor, deviation: float) -> Tensor:
    """Pictures (n, 3, h, w), softer by a Gaussian of so many pixels."""
    return gaussian_blur(pixels, [5, 5], [deviation])


def reconstructions(vae: Any, scenes: list[Scene]) -> Tensor:
    """`reconstruct` of the renders of n scenes."""
    starts = Bar(range(0, len(scenes), 32), desc="reconstructions", disable=rank() != 0)
    return torch.cat([reconstruct(vae, draw_scenes(scenes[start : start + 32])[0]) for start in starts])


@torch.no_grad()
def reconstruct(vae: Any, pixels: Tensor) -> Tensor:
    """Pictures (n, 3, 64, 64) in [-1, 1] through an `AutoencoderKL` and back: uint8, on the CPU."""
    parts = (part.to(vae.device) for part in pixels.split(32))
    back = torch.cat([vae.decode(vae.encode(part).latent_dist.mode()).sample for part in parts])
    return ((back.clamp(-1, 1) + 1) * 127.5).round().byte().cpu().contiguous()
