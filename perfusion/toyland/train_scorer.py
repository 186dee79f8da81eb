"""Trains the scorer, a tiny open_clip model, contrastively on fresh renders and their captions."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import open_clip
import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import Tensor
from torchvision.transforms.v2.functional import gaussian_blur

from perfusion.toyland.budget import BudgetedTraining, device, rank, world_size
from perfusion.toyland.captions import caption, vocabulary
from perfusion.toyland.models import TEXT_POSITIONS, scorer_config
from perfusion.toyland.tokenizer import build_tokenizer
from perfusion.toyland.train_autoencoder import draw_batch
from perfusion.toyland.world import sample_scene

RATE = 0.02
FIRST_SCENE = 3_000_000_000
BLUR = (0.3, 1.0)  # generated images are softer than renders; the scorer should not care


def batch_size() -> int:
    """Pairs per step and process; each image's negatives are the other captions of its process."""
    return 512 if device().type == "cuda" else 96


def contrastive_loss(model: open_clip.CLIP, pixels: Tensor, tokens: Tensor) -> Tensor:
    """Symmetric cross-entropy over the batch (Radford et al. 2021)."""
    images, texts, scale = model(pixels, tokens)
    logits = scale * images @ texts.T
    labels = torch.arange(len(logits), device=logits.device)
    return (F.cross_entropy(logits, labels) + F.cross_entropy(logits.T, labels)) / 2


@torch.no_grad()
def settle_statistics(model: open_clip.CLIP, last_scene: int, batches: int = 40) -> None:
    """Measure what the image tower's batch norms have to know, for the weights that the model has now.

    Running means belong to the weights of the moment, not to averaged ones, and no restart keeps them. Drawn are scenes
    from seed `last_scene` downwards.
    """
    norms = [module for module in model.modules() if isinstance(module, torch.nn.BatchNorm2d)]
    for norm in norms:
        norm.reset_running_stats()
        norm.momentum = None  # a plain mean over the batches
    model.train()
    for batch in range(batches):
        seeds = [last_scene - 96 * batch - i for i in range(96)]
        model.encode_image(gaussian_blur(draw_batch(seeds)[0].to(device()), [5, 5], [sum(BLUR) / 2]))
    model.eval()


def train_scorer(folder: Path, seconds: float, seed: int = 1) -> None:
    """Worker: train for `seconds`, leave `folder/scorer` in open_clip's local-dir format, float16 (rank 0 writes)."""
    torch.manual_seed(seed)
    config = scorer_config()
    shape = config["model_cfg"]
    model = open_clip.CLIP(shape["embed_dim"], shape["vision_cfg"], shape["text_cfg"]).to(device())
    tokenizer = build_tokenizer(vocabulary(), TEXT_POSITIONS)
    size = batch_size()
    run = BudgetedTraining("scorer", {"clip": model}, folder, seconds, RATE, size, ema=0.99)
    for step in run:
        rng = np.random.default_rng([seed, step, rank()])
        first = FIRST_SCENE + seed * 100_000_000 + (step * world_size() + rank()) * size
        pixels, _ = draw_batch(list(range(first, first + size)))
        texts = [caption(sample_scene(first + i), rng).text for i in range(size)]
        tokens = tokenizer(texts, padding="max_length", max_length=TEXT_POSITIONS, return_tensors="pt").input_ids
        soft = gaussian_blur(pixels.to(device()), [5, 5], [float(rng.uniform(*BLUR))])
        run.update(contrastive_loss(model, soft, tokens.to(device())))
    run.copy_ema()
    if rank() == 0:
        settle_statistics(model, FIRST_SCENE + (seed + 1) * 100_000_000 - 1)
        target = folder / "scorer"
        target.mkdir(parents=True, exist_ok=True)
        state = {k: v.half().contiguous() if v.is_floating_point() else v for k, v in model.state_dict().items()}
        save_file(state, target / "open_clip_model.safetensors")
        (target / "open_clip_config.json").write_text(json.dumps(config, indent=2) + "\n")
        tokenizer.save_pretrained(target)
