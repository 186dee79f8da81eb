"""Trains the UNet and the text encoder together on the autoencoder's latents of a fixed set of scenes."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL
from safetensors.torch import load_file, save_file
from torch import Tensor
from tqdm import tqdm
from transformers import CLIPTextModel, CLIPTokenizer

from perfusion.files import atomic_path
from perfusion.toyland.budget import BudgetedTraining, device, rank, world_size
from perfusion.toyland.captions import Caption, Wording, caption, swap_object, vocabulary
from perfusion.toyland.models import TEXT_POSITIONS, scheduler, text_encoder, unet
from perfusion.toyland.tokenizer import build_tokenizer
from perfusion.toyland.train_autoencoder import autoencoder_hash, draw_scenes
from perfusion.toyland.world import Scene, sample_scene

RATE = 0.02
EMPTY = 0.1  # share of empty captions, for classifier-free guidance
THOROUGH = 0.7  # share of captions that name every look that has a word
SWAPPED = 0.25  # share of captions whose object is swapped everywhere but in its own token
WEIGHTS = 1.0, 20.0  # of the image's squared error: SNR between these
LOW_NOISE = 1.5  # steps are drawn as u ** LOW_NOISE
FIRST_SCENE = 2_700_000_000  # seeds that the autoencoder has not seen


def batch_size() -> int:
    """Latents per step and process."""
    return 512 if device().type == "cuda" else 48


def training_scene(seed: int) -> Scene:
    """A scene to learn from: two objects in one of five. HELD_OUT pairs are to be seen; captions never name them."""
    return sample_scene(seed, objects=1 if seed % 5 else 2, held_out=True)


def training_caption(scene: Scene, rng: np.random.Generator) -> Caption:
    """What the scene is shown with: an empty caption now and then, and never one that names a HELD_OUT pair.

    Most name every look that has a word, more than the world's own captions do: what is seldom named is hardly learned,
    and methods that write where the words are read cannot ask for it.
    """
    if rng.random() < EMPTY:
        return Caption((), (), ())
    return caption(scene, rng, Wording(name_held_out=False, thorough=rng.random() < THOROUGH))


def scene_weights(scenes: Sequence[Scene]) -> np.ndarray:
    """How often each scene is drawn, as shares (n,): worn things are small and take the most practice."""
    weights = np.array([1.0 + sum(placed.worn != "none" for placed in scene.objects) for scene in scenes])
    return weights / weights.sum()


def scene_latents(model: Any, scenes: Sequence[Scene]) -> Tensor:
    """Scaled latents (n, c, 8, 8), float16, that an `AutoencoderKL` gives for n scenes."""
    parts = []
    for start in tqdm(range(0, len(scenes), 64), desc="latents", disable=rank() != 0):
        pixels, _ = draw_scenes(scenes[start : start + 64])
        with torch.no_grad():
            latents = model.encode(pixels.to(device())).latent_dist.mode()
        parts.append((latents * model.config["scaling_factor"]).half().cpu())
    return torch.cat(parts).contiguous()  # channels_last otherwise, which safetensors refuses


def token_ids(tokenizer: CLIPTokenizer, captions: list[Caption]) -> Tensor:
    """(B, 24) token ids; word i of a caption is token i + 1, since every word of the world is one token."""
    texts = [c.text for c in captions]
    return tokenizer(texts, padding="max_length", max_length=TEXT_POSITIONS, return_tensors="pt").input_ids


def contexts(
    encoder: CLIPTextModel, tokenizer: CLIPTokenizer, captions: list[Caption], rng: np.random.Generator
) -> Tensor:
    """Encodings (B, 24, d) of the captions, some of them with another object's words around the object's own token.

    The encoder is causal, so every token after "cat" can say "cat" as well, and the UNet may read it there. In one of
    four captions one object (superclass, colours, pattern) is replaced by another one, and only the encoding of the
    noun's own token is the true one: the UNet learns to look for an object where its word stands, as in Stable
    Diffusion, and that is the place where personalization methods write.
    """
    encoded = encoder(token_ids(tokenizer, captions).to(device())).last_hidden_state
    chosen = [i for i, c in enumerate(captions) if c.nouns and rng.random() < SWAPPED]
    if not chosen:
        return encoded
    objects = [int(rng.integers(len(captions[i].nouns))) for i in chosen]
    others = [swap_object(captions[i], j, rng) for i, j in zip(chosen, objects, strict=True)]
    around = encoder(token_ids(tokenizer, others).to(device())).last_hidden_state
    rows = torch.tensor(chosen, device=encoded.device)
    own = F.one_hot(
        torch.tensor([captions[i].nouns[j] + 1 for i, j in zip(chosen, objects, strict=True)]), encoded.shape[1]
    ).to(encoded.device, torch.bool)[..., None]
    return encoded.index_copy(0, rows, torch.where(own, encoded[rows], around))


def denoising_loss(
    model: torch.nn.Module, noise_schedule: Any, latents: Tensor, context: Tensor, generator: torch.Generator
) -> Tensor:
    """Squared error of the velocity (Salimans & Ho 2022), half of it at the 350 steps of least noise.

    In terms of the image's error the weight is its SNR, at most 20 (Hang et al. 2023 take 5) and at least 1. A model of
    the noise has the SNR itself for a weight, next to nothing at the steps where it is decided what is drawn: pictures
    of such a model, trained as long, were patchworks of parts that did not agree. But the schedule is that of 64x64
    latents: after a tenth of its steps the SNR is below 9, and what is small in 8x8 latents drowns there.
    """
    noise = torch.randn(latents.shape, generator=generator).to(latents.device)
    shares = torch.rand(len(latents), generator=generator) ** LOW_NOISE
    steps = (shares * noise_schedule.config["num_train_timesteps"]).long()
    alpha = noise_schedule.alphas_cumprod[steps]
    snr = alpha / (1 - alpha)
    weight = (snr.clamp(*WEIGHTS) / (snr + 1)).to(latents.device)  # the velocity's error is that of the image (SNR + 1)
    steps = steps.to(latents.device)
    with torch.autocast(latents.device.type, torch.bfloat16, enabled=latents.device.type == "cuda"):
        predicted = model(noise_schedule.add_noise(latents, noise, steps), steps, context).sample
    velocity = noise_schedule.get_velocity(latents, noise, steps)
    return ((predicted.float() - velocity).square().mean((1, 2, 3)) * weight).mean()


def train_diffusion(folder: Path, seconds: float, scenes: int = 40_000, seed: int = 0) -> None:
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
    kept = folder / f"latents-{autoencoder_hash(folder)}-{first}-{share}.safetensors"
    drawn = [training_scene(first + i) for i in range(share)]
    if not kept.exists():
        vae: Any = AutoencoderKL.from_pretrained(folder / "autoencoder")
        vae.to(device()).eval()
        made = scene_latents(vae, drawn)
        with atomic_path(kept) as beside:
            save_file({"latents": made}, beside)
    all_latents = load_file(kept)["latents"]
    weights = scene_weights(drawn)

    size = batch_size()
    run = BudgetedTraining("diffusion", {"unet": model, "text": encoder}, folder, seconds, RATE, size)
    for step in run:
        rng = np.random.default_rng([seed, step, rank()])
        generator = torch.Generator().manual_seed(int(rng.integers(2**62)))
        chosen = rng.choice(share, size, p=weights)
        captions = [training_caption(drawn[int(i)], rng) for i in chosen]
        context = contexts(encoder, tokenizer, captions, rng)
        latents = all_latents[torch.from_numpy(chosen)].float().to(device()).to(memory_format=torch.channels_last)
        run.update(denoising_loss(model, noise_schedule, latents, context, generator))
    run.copy_ema()
    if rank() == 0:
        model.save_pretrained(folder / "unet")
        encoder.save_pretrained(folder / "text_encoder")
        tokenizer.save_pretrained(folder / "tokenizer")
        noise_schedule.save_pretrained(folder / "scheduler")
