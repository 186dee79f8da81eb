"""Trains the decoder on when the UNet is there; the encoder stays as it is, so latents remain valid.

Squared errors alone make soft pictures, since they are smallest in the middle of all that may be right. A small
discriminator of patches (Isola et al. 2017) tells renders from decoded latents, and the decoder learns to pass for a
render: outlines and flat colours come back. Half of its latents are the encoder's, half are what the UNet makes of them
after noise: what a denoiser leaves is not quite what an encoder gives, and it is what has to look well.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL, UNet2DConditionModel
from torch import Tensor, nn
from torch.nn.utils.parametrizations import spectral_norm
from transformers import CLIPTextModel, CLIPTokenizer

from perfusion.toyland.build.budget import BudgetedTraining, device, rank
from perfusion.toyland.build.train_autoencoder import BATCH, draw_scenes, weighted_error
from perfusion.toyland.build.train_words import token_ids, training_caption, training_scene
from perfusion.toyland.models import scheduler
from perfusion.toyland.precision import autocast
from perfusion.toyland.world import Scene

RATE = 0.01
STEPS = 400  # the noise is that of a step below this one
ADVERSARIAL_WEIGHT = 0.1
DISCRIMINATOR_RATE = 5e-4
FIRST_SCENE = 1_500_000_000


def discriminator() -> nn.Module:
    """(B, 3, 64, 64) to a judgement (B, 1, 14, 14) of each patch of 26 pixels: high for renders."""
    return nn.Sequential(
        spectral_norm(nn.Conv2d(3, 32, 4, 2, 1)),
        nn.LeakyReLU(0.2),
        spectral_norm(nn.Conv2d(32, 64, 4, 2, 1)),
        nn.LeakyReLU(0.2),
        spectral_norm(nn.Conv2d(64, 96, 3, 1, 1)),
        nn.LeakyReLU(0.2),
        spectral_norm(nn.Conv2d(96, 1, 3)),
    )


class Denoiser:
    """Finished UNet and text encoder in the builder's folder: what they make of latents after noise."""

    def __init__(self, folder: Path) -> None:
        self.unet: Any = UNet2DConditionModel.from_pretrained(folder / "unet")
        self.text_encoder: Any = CLIPTextModel.from_pretrained(folder / "text_encoder")
        self.tokenizer = CLIPTokenizer.from_pretrained(folder / "tokenizer")
        self.schedule: Any = scheduler()
        self.unet.to(device())
        self.text_encoder.to(device())

    @torch.no_grad()
    def __call__(self, latents: Tensor, scenes: Sequence[Scene], generator: torch.Generator) -> Tensor:
        """The UNet's guess in one step at scaled latents (B, c, 8, 8), from noise of a step below STEPS on."""
        rng = np.random.default_rng(int(torch.randint(2**62, (1,), generator=generator)))
        captions = [training_caption(scene, rng) for scene in scenes]
        context = self.text_encoder(token_ids(self.tokenizer, captions).to(device())).last_hidden_state
        steps = torch.randint(STEPS, (len(latents),), generator=generator)
        noise = torch.randn(latents.shape, generator=generator).to(latents.device)
        alpha = self.schedule.alphas_cumprod[steps].to(latents.device).view(-1, 1, 1, 1)
        steps = steps.to(latents.device)
        noisy = self.schedule.add_noise(latents, noise, steps)
        return alpha.sqrt() * noisy - (1 - alpha).sqrt() * self.unet(noisy, steps, context).sample


def decoded(
    model: Any, denoiser: Denoiser, scenes: Sequence[Scene], pixels: Tensor, generator: torch.Generator
) -> Tensor:
    """What an `AutoencoderKL` makes of the scenes' latents, of which every second one was noised and denoised."""
    scale = model.config["scaling_factor"]
    with torch.no_grad():
        latents = scale * model.encode(pixels).latent_dist.mode()
        latents[::2] = denoiser(latents[::2], scenes[::2], generator).to(latents.dtype)
    return model.decode(latents / scale).sample


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
    denoiser = Denoiser(folder)
    judge = discriminator().to(device())
    judging = torch.optim.AdamW(judge.parameters(), DISCRIMINATOR_RATE, betas=(0.5, 0.9), weight_decay=0.0)
    size = BATCH[device().type]
    parts = {"decoder": model.decoder, "post_quant_conv": model.post_quant_conv}
    run = BudgetedTraining("decoder", parts, folder, seconds, RATE, size)
    for _ in run:
        first = FIRST_SCENE + seed * 100_000_000 + run.turn * size
        generator = torch.Generator().manual_seed(first)
        scenes = [training_scene(first + i) for i in range(size)]
        pixels, masks = (part.to(device()) for part in draw_scenes(scenes))
        with autocast(device()):
            made = decoded(model, denoiser, scenes, pixels, generator).float()
            passing = -judge(made).float().mean()
        run.update(weighted_error(made - pixels, masks) + ADVERSARIAL_WEIGHT * passing)
        judging.zero_grad()
        hinge_loss(judge, pixels, made).backward()
        judging.step()
    if rank() == 0:
        model.save_pretrained(folder / "autoencoder")
