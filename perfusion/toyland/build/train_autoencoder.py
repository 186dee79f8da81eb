"""Trains the autoencoder on fresh renders: no scene is seen twice."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from perfusion.toyland.build.budget import BudgetedTraining, device, rank, world_size
from perfusion.toyland.draw import render
from perfusion.toyland.models import autoencoder
from perfusion.toyland.world import Scene, sample_scene

RATE = 0.025
KL_WEIGHT = 1e-4
OBJECT_WEIGHT = 3.0  # eyes, stripes and spots are few pixels, and they are what makes an instance


def batch_size() -> int:
    """Images per step and process: small steps on a CPU, where time and not memory is short."""
    return 128 if device().type == "cuda" else 6


def draw_batch(seeds: list[int], held_out: bool = False) -> tuple[Tensor, Tensor]:
    """`draw_scenes` of the scenes of `seeds`."""
    return draw_scenes([sample_scene(seed, held_out=held_out) for seed in seeds])


def draw_scenes(scenes: Sequence[Scene]) -> tuple[Tensor, Tensor]:
    """Pixels (B, 3, 64, 64) float32 in [-1, 1] and object masks (B, 1, 64, 64) in [0, 1]."""
    drawn = [render(scene) for scene in scenes]
    pixels = torch.from_numpy(np.stack([d.image for d in drawn])).permute(0, 3, 1, 2).float() / 127.5 - 1
    masks = torch.from_numpy(np.stack([d.masks.max(0) for d in drawn]))[:, None].float() / 255
    return pixels, masks


def autoencoder_hash(folder: Path) -> str:
    """Eight hexadecimal digits of `folder/autoencoder`'s weights, for the names of what was made with them."""
    weights = folder / "autoencoder" / "diffusion_pytorch_model.safetensors"
    return hashlib.sha256(weights.read_bytes()).hexdigest()[:8]


def reconstruction_loss(model: Any, pixels: Tensor, masks: Tensor) -> Tensor:
    """`weighted_error` of an `AutoencoderKL`, and a small KL term, which keeps the latents smooth."""
    posterior = model.encode(pixels).latent_dist
    kl = posterior.kl().mean() / posterior.mean[0].numel()
    return weighted_error(model.decode(posterior.sample()).sample - pixels, masks) + KL_WEIGHT * kl


def weighted_error(error: Tensor, masks: Tensor) -> Tensor:
    """Mean of absolute plus squared error (B, 3, 64, 64), objects counting more; masks (B, 1, 64, 64)."""
    return ((error.abs() + error.square()) * (1 + (OBJECT_WEIGHT - 1) * masks)).mean()


def train_autoencoder(folder: Path, seconds: float, seed: int = 0) -> None:
    """Worker: train for `seconds` and leave `folder/autoencoder` in diffusers' format (rank 0 writes).

    The scaling factor is measured: latents of fresh scenes get unit standard deviation.
    """
    torch.manual_seed(seed)
    model: Any = autoencoder()
    model.to(device())
    size = batch_size()
    run = BudgetedTraining("autoencoder", {"vae": model}, folder, seconds, RATE, size)
    torch.manual_seed(seed + 1000 * run.step + rank())
    for step in run:
        first = 1_000_000 + seed * 100_000_000 + (step * world_size() + rank()) * size
        pixels, masks = draw_batch(list(range(first, first + size)))
        run.update(reconstruction_loss(model, pixels.to(device()), masks.to(device())))
    run.copy_ema()
    if rank() == 0:
        pixels, _ = draw_batch(list(range(500_000, 500_512)))
        with torch.no_grad():
            latents = torch.cat([model.encode(p.to(device())).latent_dist.mode() for p in pixels.split(32)])
        model.register_to_config(scaling_factor=round(1.0 / float(latents.std()), 5))
        model.save_pretrained(folder / "autoencoder")
