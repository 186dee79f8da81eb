"""Trains the text encoder to say a toy at its noun, before and while the UNet learns to draw.

Of "a green-eyed red striped blue cat" the encoding of "cat" alone has to say all five looks: that is where
personalization methods write, and where the UNet shall read. Nothing in a denoising loss makes a small causal encoder
carry words that far, so linear heads ask for it. They are dropped from the shipped weights.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import CLIPTokenizer

from perfusion.toyland import reader
from perfusion.toyland.build.budget import BudgetedTraining, device, rank
from perfusion.toyland.captions import Caption, caption, looks_said, vocabulary
from perfusion.toyland.models import TEXT_POSITIONS, TEXT_WIDTH, text_encoder
from perfusion.toyland.tokenizer import build_tokenizer
from perfusion.toyland.world import Scene, sample_scene

RATE = 0.02
BATCH = 64
EMPTY = 0.1  # share of empty captions, for classifier-free guidance
LOOKS = ("superclass", *reader.LOOKS)
FIRST_SCENE = 2_600_000_000


def training_scene(seed: int) -> Scene:
    """A scene to learn from: two objects in one of five. HELD_OUT pairs are to be seen; captions never name them."""
    return sample_scene(seed, objects=1 if seed % 5 else 2, held_out=True)


def training_caption(scene: Scene, rng: np.random.Generator) -> Caption:
    """What the scene is shown with: an empty caption now and then, and never one that names a HELD_OUT pair."""
    if rng.random() < EMPTY:
        return Caption((), (), ())
    return caption(scene, rng, name_held_out=False)


def token_ids(tokenizer: CLIPTokenizer, captions: Sequence[Caption]) -> Tensor:
    """(B, 24) token ids; word i of a caption is token i + 1, since every word of the world is one token."""
    texts = [c.text for c in captions]
    return tokenizer(texts, padding="max_length", max_length=TEXT_POSITIONS, return_tensors="pt").input_ids


def at_nouns(nouns: Sequence[int], own: Tensor, others: Tensor) -> Tensor:
    """Of two encodings (B, 24, d), `own` at the token of word `nouns[i]` of each caption and `others` elsewhere."""
    here = F.one_hot(torch.tensor(nouns) + 1, own.shape[1]).to(own.device, torch.bool)[..., None]
    return torch.where(here, own, others)


def said(captions: Sequence[Caption]) -> dict[str, tuple[Tensor, Tensor]]:
    """For each look, where it is said and what: (n, 2) rows of caption and token, and (n,) indices of the option.

    Only what is named before the noun counts: a causal encoder cannot know at the noun what comes after it.
    """
    found: dict[str, list[tuple[int, int, int]]] = {name: [] for name in LOOKS}
    for row, source in enumerate(captions):
        for noun, adjectives in zip(source.nouns, source.adjectives, strict=True):
            looks = {"superclass": source.words[noun], **looks_said([source.words[a] for a in adjectives])}
            for name, option in looks.items():
                found[name].append((row, noun + 1, reader.OBJECT_HEADS[name].index(option)))
    tables = {name: torch.tensor(rows, dtype=torch.long).reshape(-1, 3) for name, rows in found.items()}
    return {name: (table[:, :2], table[:, 2]) for name, table in tables.items()}


class Saying(nn.Module):
    """A linear head for each look, which reads it from the encoding of the noun's own token."""

    def __init__(self) -> None:
        super().__init__()
        self.heads = nn.ModuleDict({name: nn.Linear(TEXT_WIDTH, len(reader.OBJECT_HEADS[name])) for name in LOOKS})

    def forward(self, encoded: Tensor, captions: Sequence[Caption]) -> Tensor:
        """Mean over the looks of the cross-entropy, for encodings (B, 24, d) of the captions."""
        losses = []
        for name, (at, right) in said(captions).items():
            if len(right):
                here = encoded[at[:, 0].to(encoded.device), at[:, 1].to(encoded.device)]
                losses.append(F.cross_entropy(self.heads[name](here), right.to(encoded.device)))
        return torch.stack(losses).mean()


def train_words(folder: Path, seconds: float, seed: int = 0) -> None:
    """Worker: train text encoder and heads for `seconds`; `train_diffusion` starts from the state in `folder`."""
    torch.manual_seed(seed)
    tokenizer = build_tokenizer(vocabulary(), TEXT_POSITIONS)
    encoder: Any = text_encoder(tokenizer)
    encoder.to(device())
    saying = Saying().to(device())
    run = BudgetedTraining("words", {"text": encoder, "saying": saying}, folder, seconds, RATE, BATCH)
    for step in run:
        rng = np.random.default_rng([seed, step, rank()])
        first = FIRST_SCENE + run.turn * BATCH
        captions = [training_caption(training_scene(first + i), rng) for i in range(BATCH)]
        encoded = encoder(token_ids(tokenizer, captions).to(device())).last_hidden_state
        run.update(saying(encoded, captions))
