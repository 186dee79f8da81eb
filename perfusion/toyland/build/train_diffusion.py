"""Trains the UNet and the text encoder together on the autoencoder's latents of a fixed set of scenes."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import CLIPTextModel, CLIPTokenizer

from perfusion.bars import Bar
from perfusion.toyland.build.budget import START, BudgetedTraining, device, rank, world_size
from perfusion.toyland.build.train_autoencoder import draw_scenes, made_once
from perfusion.toyland.build.train_words import Saying, at_nouns, token_ids, training_caption, training_scene
from perfusion.toyland.captions import Caption, swap_object, vocabulary
from perfusion.toyland.models import LATENT_SIZE, TEXT_POSITIONS, scheduler, text_encoder, unet
from perfusion.toyland.precision import autocast
from perfusion.toyland.tokenizer import build_tokenizer
from perfusion.toyland.world import Scene

RATE = 0.02
SWAPPED = 0.5  # share of captions whose object is swapped everywhere but in its own token
SAYING_WEIGHT = 0.1  # of the loss that keeps the encoder saying a toy at its noun
OBJECT_WEIGHT = 2.0  # of the object's cells: what makes a toy is in three tenths of a picture
WEIGHTS = 1.0, 20.0  # of the image's squared error: SNR between these
LOW_NOISE = 1.5  # steps are drawn as u ** LOW_NOISE
BATCH = {"cuda": 512, "cpu": 48}  # per step and process
FIRST_SCENE = 2_700_000_000  # seeds that the autoencoder has not seen


def scene_weights(scenes: Sequence[Scene]) -> np.ndarray:
    """How often each scene is drawn, as shares (n,): worn things are small and take the most practice."""
    weights = np.array([1.0 + sum(placed.worn != "none" for placed in scene.objects) for scene in scenes])
    return weights / weights.sum()


def scene_latents(model: Any, scenes: Sequence[Scene]) -> dict[str, Tensor]:
    """Of n scenes, float16: scaled `latents` (n, c, 8, 8) by an `AutoencoderKL`, and `cells` (n, 1, 8, 8), how much of
    each cell is object."""
    latents, cells = [], []
    for start in Bar(range(0, len(scenes), 64), desc="latents", disable=rank() != 0):
        pixels, masks = draw_scenes(scenes[start : start + 64])
        with torch.no_grad(), autocast(device()):
            encoded = model.encode(pixels.to(device())).latent_dist.mode().float()
        latents.append((encoded * model.config["scaling_factor"]).half().cpu())
        cells.append(F.adaptive_avg_pool2d(masks, LATENT_SIZE).half())
    # Channels-last otherwise, which safetensors refuses.
    return {"latents": torch.cat(latents).contiguous(), "cells": torch.cat(cells).contiguous()}


def contexts(
    encoder: CLIPTextModel, tokenizer: CLIPTokenizer, captions: list[Caption], rng: np.random.Generator
) -> tuple[Tensor, Tensor]:
    """Encodings (B, 24, d) of the captions, and the same with another object's words around some objects' own tokens.

    The encoder is causal, so every token after "cat" can say "cat" as well, and the UNet may read it there, and the
    pattern at its own word. In half of the captions one object (superclass and all looks) is replaced by another one,
    and only the encoding of the noun's own token is the true one: the UNet learns to look for an object where its noun
    stands, and that is the place where personalization methods write.
    """
    encoded = encoder(token_ids(tokenizer, captions).to(device())).last_hidden_state
    chosen = [i for i, c in enumerate(captions) if c.nouns and rng.random() < SWAPPED]
    if not chosen:
        return encoded, encoded
    objects = [int(rng.integers(len(captions[i].nouns))) for i in chosen]
    others = [swap_object(captions[i], j, rng) for i, j in zip(chosen, objects, strict=True)]
    around = encoder(token_ids(tokenizer, others).to(device())).last_hidden_state
    rows = torch.tensor(chosen, device=encoded.device)
    nouns = [captions[i].nouns[j] for i, j in zip(chosen, objects, strict=True)]
    return encoded, encoded.index_copy(0, rows, at_nouns(nouns, encoded[rows], around))


def denoising_loss(
    model: torch.nn.Module,
    noise_schedule: Any,
    latents: Tensor,
    context: Tensor,
    generator: torch.Generator,
    cells: Tensor | None = None,
) -> Tensor:
    """Squared error of the velocity (Salimans & Ho 2022), half of it at the 350 steps of least noise.

    In terms of the image's error the weight is its SNR, at most 20 (Hang et al. 2023 take 5) and at least 1. A model of
    the noise has the SNR itself for a weight, next to nothing at the steps where it is decided what is drawn: pictures
    of such a model, trained as long, were patchworks of parts that did not agree. But the schedule is that of 64x64
    latents: after a tenth of its steps the SNR is below 9, and what is small in 8x8 latents drowns there.

    cells: (B, 1, 8, 8), how much of each cell is object, 0 to 1; these count OBJECT_WEIGHT times.
    """
    noise = torch.randn(latents.shape, generator=generator).to(latents.device)
    shares = torch.rand(len(latents), generator=generator) ** LOW_NOISE
    steps = (shares * noise_schedule.config["num_train_timesteps"]).long()
    alpha = noise_schedule.alphas_cumprod[steps]
    snr = alpha / (1 - alpha)
    weight = (snr.clamp(*WEIGHTS) / (snr + 1)).to(latents.device)  # the velocity's error is that of the image (SNR + 1)
    steps = steps.to(latents.device)
    with autocast(device()):
        predicted = model(noise_schedule.add_noise(latents, noise, steps), steps, context).sample
    error = (predicted.float() - noise_schedule.get_velocity(latents, noise, steps)).square()
    if cells is not None:
        emphasis = 1 + (OBJECT_WEIGHT - 1) * cells
        error = error * (emphasis / emphasis.mean())
    return (error.mean((1, 2, 3)) * weight).mean()


def train_diffusion(folder: Path, seconds: float, seed: int, scenes: int) -> None:
    """Worker: train for `seconds`, leave `folder/unet`, `folder/text_encoder`, `folder/tokenizer` (rank 0 writes).

    Every process draws and keeps the latents of its own share of `scenes`; captions are drawn anew each time.
    """
    torch.manual_seed(seed)
    tokenizer = build_tokenizer(vocabulary(), TEXT_POSITIONS)
    encoder: Any = text_encoder(tokenizer)
    model: Any = unet()
    noise_schedule = scheduler()
    encoder.to(device())
    model.to(device(), memory_format=torch.channels_last)
    share = scenes // world_size()
    first = FIRST_SCENE + seed * 10_000_000 + rank() * share
    drawn = [training_scene(first + i) for i in range(share)]
    known = made_once(folder, f"latents-{first}-{share}", lambda vae: scene_latents(vae, drawn))
    weights = scene_weights(drawn)
    size = BATCH[device().type]
    saying = Saying().to(device())
    modules = {"unet": model, "text": encoder, "saying": saying}
    run = BudgetedTraining("diffusion", modules, folder, seconds, RATE, size, start=(START, "words"))
    for step in run:
        rng = np.random.default_rng([seed, step, rank()])
        generator = torch.Generator().manual_seed(int(rng.integers(2**62)))
        chosen = rng.choice(share, size, p=weights)
        captions = [training_caption(drawn[int(i)], rng) for i in chosen]
        with autocast(device()):
            encoded, context = contexts(encoder, tokenizer, captions, rng)
        latents, cells = (known[name][torch.from_numpy(chosen)].float().to(device()) for name in ("latents", "cells"))
        latents = latents.to(memory_format=torch.channels_last)
        loss = denoising_loss(model, noise_schedule, latents, context, generator, cells)
        run.update(loss + SAYING_WEIGHT * saying(encoded.float(), captions))
    if rank() == 0:
        model.save_pretrained(folder / "unet")
        encoder.save_pretrained(folder / "text_encoder")
        tokenizer.save_pretrained(folder / "tokenizer")
        noise_schedule.save_pretrained(folder / "scheduler")
