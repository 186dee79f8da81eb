"""Scenes as the autoencoder gives them back: what judges of generated pictures must be used to."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKL
from safetensors.torch import load_file, save_file
from torch import Tensor

from perfusion.bars import Bar
from perfusion.files import atomic_path
from perfusion.toyland.build.budget import device, rank, world_size
from perfusion.toyland.build.train_autoencoder import autoencoder_hash, draw_scenes
from perfusion.toyland.world import Scene, sample_scene

FIRST_SCENE = 4_200_000_000
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
        kept = folder / f"reconstructions-{autoencoder_hash(folder)}-{first}-{share}.safetensors"
        if not kept.exists():
            vae: Any = AutoencoderKL.from_pretrained(folder / "autoencoder")
            made = reconstructions(vae.to(device()).eval(), scenes)
            with atomic_path(kept) as beside:
                save_file({"pixels": made}, beside)
        return cls(load_file(kept)["pixels"], scenes)

    def take(self, chosen: list[int]) -> Tensor:
        """Pixels (len(chosen), 3, 64, 64) in [-1, 1]."""
        return self.pixels[chosen].float() / 127.5 - 1


def reconstructions(model: Any, scenes: list[Scene]) -> Tensor:
    """What an `AutoencoderKL` makes of n scenes: uint8 (n, 3, 64, 64)."""
    parts = []
    for start in Bar(range(0, len(scenes), 32), desc="reconstructions", disable=rank() != 0):
        pixels, _ = draw_scenes(scenes[start : start + 32])
        with torch.no_grad():
            back = model.decode(model.encode(pixels.to(device())).latent_dist.mode()).sample
        parts.append(((back.clamp(-1, 1) + 1) * 127.5).round().byte().cpu())
    return torch.cat(parts).contiguous()
