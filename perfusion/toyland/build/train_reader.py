"""Trains the attribute reader on fresh renders and on the autoencoder's reconstructions of others.

It learns the HELD_OUT pairs, too, of which the pipeline's captions are silent: it shall judge whether they were drawn.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from perfusion.toyland.build.budget import BudgetedTraining, device, rank
from perfusion.toyland.build.reconstructions import COUNT, Pool
from perfusion.toyland.precision import autocast
from perfusion.toyland.reader import HEADS, NOT_SHOWN, Reader, label_tensors, shown
from perfusion.toyland.world import Scene, sample_scene

RATE = 0.02
FIRST_SCENE = 4_300_000_000
BATCH = {"cuda": 512, "cpu": 48}  # per step and process


def fresh_scene(seed: int) -> Scene:
    """A scene to learn from: two objects in every second, a sketch or a mosaic in half of each.

    The world has fewer of both; most of the reader's mistakes are in them.
    """
    style = ("photo", "sketch", "photo", "mosaic")[seed // 2 % 4]
    return sample_scene(seed, objects=1 + seed % 2, held_out=True, style=style)


def reading_loss(logits: Mapping[str, Tensor], right: Mapping[str, Tensor]) -> Tensor:
    """Mean over the heads of the cross-entropy of logits (B, options) over what is shown."""
    terms = [
        F.cross_entropy(logits[name].float(), right[name], ignore_index=NOT_SHOWN, reduction="sum")
        / (right[name] != NOT_SHOWN).sum().clamp_min(1)
        for name in HEADS
    ]
    return torch.stack(terms).mean()


def train_reader(folder: Path, seconds: float, seed: int = 2, pool_size: int = COUNT) -> None:
    """Worker: train for `seconds` with `folder/autoencoder`, leave `folder/reader` (rank 0 writes)."""
    torch.manual_seed(seed)
    model = Reader().to(device())
    pool = Pool.of(folder, pool_size)
    half = BATCH[device().type] // 2
    run = BudgetedTraining("reader", {"reader": model}, folder, seconds, RATE, 2 * half, ema=0.99)
    for step in run:
        rng = np.random.default_rng([seed, step, rank()])
        start = FIRST_SCENE + seed * 100_000_000 + run.turn * half
        scenes, pixels = pool.beside([fresh_scene(start + i) for i in range(half)], rng)
        right = {name: label.to(device()) for name, label in label_tensors(map(shown, scenes)).items()}
        with autocast(device()):
            logits = model(pixels)
        run.update(reading_loss(logits, right))
    if rank() == 0:
        model.save(folder / "reader")
