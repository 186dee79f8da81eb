"""Trains the attribute reader on fresh renders and on the autoencoder's reconstructions of others.

It sees the HELD_OUT pairs, too, which the pipeline does not: it shall judge whether they were drawn.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL
from safetensors.torch import load_file, save_file
from torch import Tensor
from torchvision.transforms.v2.functional import gaussian_blur
from tqdm import tqdm

from perfusion.files import atomic_path
from perfusion.toyland.budget import BudgetedTraining, device, rank, world_size
from perfusion.toyland.reader import HEADS, NOT_SHOWN, Reader, label_tensors
from perfusion.toyland.train_autoencoder import autoencoder_hash, draw_batch
from perfusion.toyland.world import sample_scene

RATE = 0.02
FIRST_SCENE = 4_000_000_000
RECONSTRUCTIONS = 8_000  # made once; the other half of every batch is drawn anew
BLUR = (0.1, 0.8)  # generated images are a little softer than both


def batch_size() -> int:
    """Pictures per step and process."""
    return 512 if device().type == "cuda" else 48


def reconstructions(model: Any, first: int, count: int) -> Tensor:
    """What an `AutoencoderKL` makes of the scenes from seed `first` on: uint8 (count, 3, 64, 64)."""
    parts = []
    for start in tqdm(range(first, first + count, 32), desc="reconstructions", disable=rank() != 0):
        pixels, _ = draw_batch(list(range(start, min(start + 32, first + count))), held_out=True)
        with torch.no_grad():
            back = model.decode(model.encode(pixels.to(device())).latent_dist.mode()).sample
        parts.append(((back.clamp(-1, 1) + 1) * 127.5).round().byte().cpu())
    return torch.cat(parts).contiguous()


def reading_loss(model: Reader, pixels: Tensor, right: dict[str, Tensor]) -> Tensor:
    """Mean over the heads of the cross-entropy over what is shown."""
    logits = model(pixels)
    terms = [
        F.cross_entropy(logits[name], right[name], ignore_index=NOT_SHOWN, reduction="sum")
        / (right[name] != NOT_SHOWN).sum().clamp_min(1)
        for name in HEADS
    ]
    return torch.stack(terms).mean()


def train_reader(folder: Path, seconds: float, seed: int = 2) -> None:
    """Worker: train for `seconds` with `folder/autoencoder`, leave `folder/reader` (rank 0 writes)."""
    torch.manual_seed(seed)
    model = Reader().to(device())
    share = RECONSTRUCTIONS // world_size()
    first = FIRST_SCENE + seed * 100_000_000 + rank() * share
    kept = folder / f"reconstructions-{autoencoder_hash(folder)}-{first}-{share}.safetensors"
    if not kept.exists():
        vae: Any = AutoencoderKL.from_pretrained(folder / "autoencoder")
        made = reconstructions(vae.to(device()).eval(), first, share)
        with atomic_path(kept) as beside:
            save_file({"pixels": made}, beside)
    pool = load_file(kept)["pixels"]
    pool_labels = label_tensors([sample_scene(first + i, held_out=True) for i in range(share)])

    size = batch_size()
    half = size // 2
    fresh_from = FIRST_SCENE + seed * 100_000_000 + RECONSTRUCTIONS
    run = BudgetedTraining("reader", {"reader": model}, folder, seconds, RATE, size, ema=0.99)
    for step in run:
        rng = np.random.default_rng([seed, step, rank()])
        start = fresh_from + (step * world_size() + rank()) * (size - half)
        seeds = list(range(start, start + size - half))
        chosen = torch.from_numpy(rng.integers(0, share, half))
        pixels = torch.cat([draw_batch(seeds, held_out=True)[0], pool[chosen].float() / 127.5 - 1]).to(device())
        fresh = label_tensors([sample_scene(s, held_out=True) for s in seeds])
        right = {name: torch.cat([fresh[name], pool_labels[name][chosen]]).to(device()) for name in HEADS}
        soft = gaussian_blur(pixels, [5, 5], [float(rng.uniform(*BLUR))])
        run.update(reading_loss(model, soft, right))
    run.copy_ema()
    if rank() == 0:
        model.save(folder / "reader")
