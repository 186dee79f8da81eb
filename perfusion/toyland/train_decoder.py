"""Trains the decoder on while the encoder stays as it is: latents, and what was made of them, remain valid."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKL
from torch import Tensor

from perfusion.toyland.budget import BudgetedTraining, device, rank, world_size
from perfusion.toyland.train_autoencoder import batch_size, draw_batch, weighted_error

RATE = 0.01
NOISE = 0.15  # standard deviations of a latent: a denoiser's latents are not quite an encoder's
FIRST_SCENE = 1_500_000_000


def decoding_loss(model: Any, pixels: Tensor, masks: Tensor, generator: torch.Generator) -> Tensor:
    """Error of an `AutoencoderKL`'s decoder, given the encoder's means with noise of up to NOISE."""
    with torch.no_grad():
        latents = model.encode(pixels).latent_dist.mode()
    level = NOISE * torch.rand((len(latents), 1, 1, 1), generator=generator) / model.config["scaling_factor"]
    noise = torch.randn(latents.shape, generator=generator)
    return weighted_error(model.decode(latents + (level * noise).to(latents.device)).sample - pixels, masks)


def train_decoder(folder: Path, seconds: float, seed: int = 0) -> None:
    """Worker: train the decoder of `folder/autoencoder` for `seconds` and put it back there (rank 0 writes)."""
    model: Any = AutoencoderKL.from_pretrained(folder / "autoencoder")
    model.to(device())
    model.encoder.requires_grad_(False)
    model.quant_conv.requires_grad_(False)
    size = batch_size()
    parts = {"decoder": model.decoder, "post_quant_conv": model.post_quant_conv}
    run = BudgetedTraining("decoder", parts, folder, seconds, RATE, size)
    for step in run:
        first = FIRST_SCENE + seed * 100_000_000 + (step * world_size() + rank()) * size
        generator = torch.Generator().manual_seed(first)
        pixels, masks = draw_batch(list(range(first, first + size)))
        run.update(decoding_loss(model, pixels.to(device()), masks.to(device()), generator))
    run.copy_ema()
    if rank() == 0:
        model.save_pretrained(folder / "autoencoder")
