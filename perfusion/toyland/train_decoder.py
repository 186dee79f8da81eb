"""Trains the decoder on while the encoder stays as it is: latents, and what was made of them, remain valid.

Squared errors alone make soft pictures, since they are smallest in the middle of all that may be right. A small
discriminator of patches (Isola et al. 2017) tells renders from decoded latents, and the decoder learns to pass for a
render: outlines and flat colours come back.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL
from torch import Tensor, nn
from torch.nn.utils.parametrizations import spectral_norm

from perfusion.toyland.budget import BudgetedTraining, autocast, device, rank, world_size
from perfusion.toyland.train_autoencoder import batch_size, draw_batch, weighted_error

RATE = 0.01
NOISE = 0.3  # standard deviations of a latent, at most: a denoiser's latents are not quite an encoder's
ADVERSARIAL_WEIGHT = 0.1
DISCRIMINATOR_RATE = 5e-4
FIRST_SCENE = 1_500_000_000


def discriminator() -> nn.Module:
    """(B, 3, 64, 64) to a judgement (B, 1, 14, 14) of each patch of 16 pixels: high for renders."""
    return nn.Sequential(
        spectral_norm(nn.Conv2d(3, 32, 4, 2, 1)),
        nn.LeakyReLU(0.2),
        spectral_norm(nn.Conv2d(32, 64, 4, 2, 1)),
        nn.LeakyReLU(0.2),
        spectral_norm(nn.Conv2d(64, 96, 3, 1, 1)),
        nn.LeakyReLU(0.2),
        spectral_norm(nn.Conv2d(96, 1, 3)),
    )


def decoded(model: Any, pixels: Tensor, generator: torch.Generator) -> Tensor:
    """What an `AutoencoderKL` makes of the means of its encoder with noise of up to NOISE."""
    with torch.no_grad():
        latents = model.encode(pixels).latent_dist.mode()
    level = NOISE * torch.rand((len(latents), 1, 1, 1), generator=generator) / model.config["scaling_factor"]
    noise = torch.randn(latents.shape, generator=generator)
    return model.decode(latents + (level * noise).to(latents.device)).sample


def hinge_loss(judge: nn.Module, pixels: Tensor, made: Tensor) -> Tensor:
    """The discriminator's loss: renders at 1 or more, decoded pictures at -1 or less."""
    return F.relu(1 - judge(pixels)).mean() + F.relu(1 + judge(made.detach())).mean()


def train_decoder(folder: Path, seconds: float, seed: int = 0) -> None:
    """Worker: train the decoder of `folder/autoencoder` for `seconds` and put it back there (rank 0 writes).

    Every process has a discriminator of its own, which starts anew after an interruption.
    """
    torch.manual_seed(seed + rank())
    model: Any = AutoencoderKL.from_pretrained(folder / "autoencoder")
    model.to(device())
    model.encoder.requires_grad_(False)
    model.quant_conv.requires_grad_(False)
    judge = discriminator().to(device())
    judging = torch.optim.AdamW(judge.parameters(), DISCRIMINATOR_RATE, betas=(0.5, 0.9), weight_decay=0.0)
    size = batch_size()
    parts = {"decoder": model.decoder, "post_quant_conv": model.post_quant_conv}
    run = BudgetedTraining("decoder", parts, folder, seconds, RATE, size)
    for step in run:
        first = FIRST_SCENE + seed * 100_000_000 + (step * world_size() + rank()) * size
        generator = torch.Generator().manual_seed(first)
        pixels, masks = (part.to(device()) for part in draw_batch(list(range(first, first + size))))
        with autocast():
            made = decoded(model, pixels, generator).float()
            passing = -judge(made).float().mean()
        run.update(weighted_error(made - pixels, masks) + ADVERSARIAL_WEIGHT * passing)
        judging.zero_grad()
        hinge_loss(judge, pixels, made).backward()
        judging.step()
    run.copy_ema()
    if rank() == 0:
        model.save_pretrained(folder / "autoencoder")
