"""Trains the scorer, a tiny open_clip model, on renders, reconstructions and captions.

The other captions of a batch differ in so much that place and superclass tell them apart. So each picture also has
a caption of its own that is wrong in one thing (hard negatives, as in NegCLIP, Yuksekgonul et al. 2023). Each of these
is believed or not by a sigmoid, with the same threshold for all (SigLIP, Zhai et al. 2023): a softmax only asks which
caption of a picture is best, and similarities of different captions could not be compared. Contrast alone teaches small
things such as eyes slowly, so heads that are dropped afterwards read all attributes from both embeddings.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import open_clip
import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.optim.swa_utils import update_bn

from perfusion.toyland.build.budget import BudgetedTraining, device, rank
from perfusion.toyland.build.reconstructions import BLUR, COUNT, Pool, blurred
from perfusion.toyland.build.train_autoencoder import draw_scenes
from perfusion.toyland.build.train_reader import reading_loss
from perfusion.toyland.captions import asked, caption, parse, vocabulary
from perfusion.toyland.models import TEXT_POSITIONS, scorer_config
from perfusion.toyland.precision import autocast
from perfusion.toyland.reader import HEADS, OBJECT_HEADS, label_tensors, shown, visible
from perfusion.toyland.tokenizer import build_tokenizer
from perfusion.toyland.world import (
    COLOURS,
    DETAILS,
    PATTERNS,
    PLACED_FIELDS,
    SUPERCLASSES,
    SUPPORTS,
    WORN,
    Scene,
    pick,
    sample_scene,
)

RATE = 0.02
FIRST_SCENE = 3_000_000_000
TRIES = 6  # alterations, for one that a caption names
BATCH = {"cuda": 512, "cpu": 96}  # per step and process: a picture's negatives are the other captions of its process


def matching_loss(images: Tensor, texts: Tensor, wrong: Tensor, differ: Tensor, scale: Tensor, bias: Tensor) -> Tensor:
    """Symmetric cross-entropy over the batch (Radford et al. 2021), and whether each caption is believed.

    Args:
        images, texts: embeddings (B, d) of pictures and their captions.
        wrong: those of wrong captions; only where `differ` (B,) says so they are wrong.
        scale, bias: from a cosine to the logit of its being believed.
    """
    logits = scale * images @ texts.T
    labels = torch.arange(len(logits), device=logits.device)
    contrast = (F.cross_entropy(logits, labels) + F.cross_entropy(logits.T, labels)) / 2
    of_wrong = scale * (images * wrong).sum(1)
    believed = F.softplus(-(logits.diagonal() + bias)).mean() + F.softplus(of_wrong + bias)[differ].mean()
    return contrast + believed


def changed(scene: Scene, index: int, name: str, rng: np.random.Generator, patterns: Sequence[str] = PATTERNS) -> Scene:
    """The scene with attribute `name` of object `index` made another one."""
    placed = scene.objects[index]
    instance = placed.instance
    options: dict[str, Iterable[str]] = {
        "superclass": [s for s in SUPERCLASSES if all(s != p.instance.superclass for p in scene.objects)],
        "body": [c for c in COLOURS if c != instance.second],
        "second": [c for c in COLOURS if c != instance.body],
        "pattern": patterns,
        "detail": DETAILS,
        "worn": WORN[1:],
        "support": SUPPORTS[1:],
    }
    part = placed if name in PLACED_FIELDS else instance
    change: dict[str, Any] = {name: pick(rng, [o for o in options[name] if o != getattr(part, name)])}
    other = replace(placed, **(change if part is placed else {"instance": replace(instance, **change)}))
    return replace(scene, objects=tuple(other if i == index else p for i, p in enumerate(scene.objects)))


def altered(scene: Scene, rng: np.random.Generator) -> Scene:
    """The scene with one attribute of an object changed, of those that can be seen.

    Place and style are what the other captions of a batch differ in.
    """
    index = int(rng.integers(len(scene.objects)))
    seen = visible(scene.objects[index], scene.style)
    name = pick(rng, [name for name in OBJECT_HEADS if seen.get(name, "none") != "none"])
    return changed(scene, index, name, rng)


def captions(scenes: Sequence[Scene], seed: Sequence[int]) -> tuple[list[str], list[str]]:
    """A caption of each scene, and one of the scene `altered`: as far as it can be, in the same words.

    A caption seldom names everything, so alterations are tried until one is named; after TRIES the right caption stands
    in the wrong one's place.
    """
    right, wrong = [], []
    for i, scene in enumerate(scenes):
        right.append(caption(scene, np.random.default_rng([*seed, i, 1])).text)
        of_change = np.random.default_rng([*seed, i, 0])
        tries = (altered(scene, of_change) for _ in range(TRIES))
        texts = (caption(other, np.random.default_rng([*seed, i, 1])).text for other in tries)
        wrong.append(next((text for text in texts if text != right[-1]), right[-1]))
    return right, wrong


@torch.no_grad()
def settle_statistics(model: open_clip.CLIP, last_scene: int, batches: int = 40) -> None:
    """Measure what the image tower's batch norms have to know, for the weights that the model has now.

    Running means belong to the weights of the moment, not to averaged ones, and no restart keeps them. Drawn are scenes
    from seed `last_scene` downwards.
    """
    firsts = range(last_scene, last_scene - 96 * batches, -96)
    drawn = (draw_scenes([sample_scene(first - i) for i in range(96)])[0].to(device()) for first in firsts)
    update_bn((blurred(pixels, sum(BLUR) / 2) for pixels in drawn), model.visual)


def train_scorer(folder: Path, seconds: float, seed: int = 1, pool_size: int = COUNT) -> None:
    """Worker: train for `seconds`, leave `folder/scorer` in open_clip's local-dir format, float16 (rank 0 writes).

    Half of the pictures are among `pool_size` reconstructions.
    """
    torch.manual_seed(seed)
    config = scorer_config()
    shape = config["model_cfg"]
    model = open_clip.CLIP(**shape).to(device())
    tokenizer = build_tokenizer(vocabulary(), TEXT_POSITIONS)
    pool = Pool.of(folder, pool_size)
    half = BATCH[device().type] // 2
    # They read pictures and captions alike, so that both say an attribute alike.
    heads = nn.ModuleDict({name: nn.Linear(shape["embed_dim"], len(options)) for name, options in HEADS.items()})
    modules = {"clip": model, "attributes": heads.to(device())}
    run = BudgetedTraining("scorer", modules, folder, seconds, RATE, 2 * half, ema=0.99)
    for step in run:
        rng = np.random.default_rng([seed, step, rank()])
        first = FIRST_SCENE + seed * 100_000_000 + run.turn * half
        scenes, pixels = pool.beside([sample_scene(first + i) for i in range(half)], rng)
        right, wrong = captions(scenes, [seed, step, rank()])
        tokens, of_wrong = (
            tokenizer(texts, padding="max_length", max_length=TEXT_POSITIONS, return_tensors="pt").input_ids
            for texts in (right, wrong)
        )
        differ = (tokens != of_wrong).any(1).to(device())
        with autocast(device()):
            images, texts, scale, bias = model(pixels, tokens.to(device()))
            nearly = model.encode_text(of_wrong.to(device()), normalize=True)
        images, texts, nearly = images.float(), texts.float(), nearly.float()
        loss = matching_loss(images, texts, nearly, differ, scale, bias)
        for embedded, said in ((images, map(shown, scenes)), (texts, (asked(parse(text)) for text in right))):
            says = {name: label.to(device()) for name, label in label_tensors(said).items()}
            loss = loss + reading_loss({name: head(embedded) for name, head in heads.items()}, says)
        run.update(loss)
    if rank() == 0:
        settle_statistics(model, FIRST_SCENE + (seed + 1) * 100_000_000 - 1)
        target = folder / "scorer"
        target.mkdir(parents=True, exist_ok=True)
        state = {k: v.half().contiguous() if v.is_floating_point() else v for k, v in model.state_dict().items()}
        save_file(state, target / "open_clip_model.safetensors")
        (target / "open_clip_config.json").write_text(json.dumps(config, indent=2) + "\n")
        tokenizer.save_pretrained(target)
