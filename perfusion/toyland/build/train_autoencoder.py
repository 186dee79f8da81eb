"""Trains the autoencoder on fresh renders: no scene is seen twice."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import AutoencoderKL
from safetensors.torch import load_file, save_file
from torch import Tensor

from perfusion.files import atomic_path
from perfusion.toyland.build.budget import BudgetedTraining, device, rank
from perfusion.toyland.draw import render
from perfusion.toyland.models import autoencoder
from perfusion.toyland.world import Scene, sample_scene

RATE = 0.025
KL_WEIGHT = 1e-4
OBJECT_WEIGHT = 3.0  # eyes, stripes and spots are few pixels, and they are what makes an instance
BATCH = {"cuda": 128, "cpu": 6}  # per step and process: small steps on a CPU, where time and not memory is short


def draw_scenes(scenes: Sequence[Scene]) -> tuple[Tensor, Tensor]:
    """Pixels (B, 3, 64, 64) float32 in [-1, 1] and object masks (B, 1, 64, 64) in [0, 1]."""
    drawn = [render(scene) for scene in scenes]
    pixels = torch.from_numpy(np.stack([d.image for d in drawn])).permute(0, 3, 1, 2).float() / 127.5 - 1
    masks = torch.from_numpy(np.stack([d.masks.max(0) for d in drawn]))[:, None].float() / 255
    return pixels, masks


def made_once(folder: Path, name: str, make: Callable[[Any], dict[str, Tensor]]) -> dict[str, Tensor]:
    """What `make` makes with `folder/autoencoder`; kept beside it, and made anew when its weights are others."""
    weights = folder / "autoencoder" / "diffusion_pytorch_model.safetensors"
    path = folder / f"{name}-{hashlib.sha256(weights.read_bytes()).hexdigest()[:8]}.safetensors"
    if not path.exists():
        model: Any = AutoencoderKL.from_pretrained(folder / "autoencoder")
        made = make(model.to(device()).eval())
        with atomic_path(path) as beside:
            save_file(made, beside)
    return load_file(path)


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
    size = BATCH[device().type]
    run = BudgetedTraining("autoencoder", {"vae": model}, folder, seconds, RATE, size)
    torch.manual_seed(seed + 1000 * run.step + rank())
    for _ in run:
        first = 1_000_000 + seed * 100_000_000 + run.turn * size
        pixels, masks = draw_scenes([sample_scene(first + i) for i in range(size)])
        run.update(reconstruction_loss(model, pixels.to(device()), masks.to(device())))
    if rank() == 0:
        pixels, _ = draw_scenes([sample_scene(seed) for seed in range(500_000, 500_512)])
        with torch.no_grad():
            latents = torch.cat([model.encode(p.to(device())).latent_dist.mode() for p in pixels.split(32)])
        model.register_to_config(scaling_factor=round(1.0 / float(latents.std()), 5))
        model.save_pretrained(folder / "autoencoder")
