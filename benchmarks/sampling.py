"""Whole calls of a pipeline, with concepts attached, against the same call of the stock pipeline, on Toyland.

Both are what a user waits for: tokenizer, text encoder, 10 DDIM steps with guidance, autoencoder, PIL.
Subject: prompts hold the concepts' words and the edits are attached. Baseline: the superclasses in their place, nothing
attached.

- `sampling_1`: one picture, one concept.
- `sampling_8`: one picture, eight concepts attached, two of them in the prompt.
- `sampling_16_betas`: one concept, 16 pictures in one batch, each with a β of its own.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from typing import Any

import torch
from diffusers import StableDiffusionPipeline
from PIL import Image

from benchmarks.timing import Pair
from benchmarks.toyland import WORD, concept, pipeline
from perfusion.methods.base import Word
from perfusion.toyland.world import SUPERCLASSES

STEPS = 10
CONCEPTS, BETAS = 8, 16
PROMPT = "a photo of a {} on the beach"
PROMPT_OF_TWO = "a photo of a {} and a {} on the beach"


def sampling_1(device: torch.device) -> Iterator[Pair]:
    """One pair, whose sides return the pictures."""
    plain, edited = pipeline(device), pipeline(device)
    with concept(edited, training=False):
        prompts = [[PROMPT.format(word)] for word in (WORD.placeholder, WORD.superclass)]
        yield Pair("sampling_1", "toyland", _sampling(edited, prompts[0]), _sampling(plain, prompts[1]))


def sampling_8(device: torch.device) -> Iterator[Pair]:
    """One pair, whose sides return the pictures."""
    plain, edited = pipeline(device), pipeline(device)
    words = [Word(f"<{superclass}*>", superclass) for superclass in SUPERCLASSES[:CONCEPTS]]
    with ExitStack() as stack:
        for word in words:
            stack.enter_context(concept(edited, training=False, word=word))
        prompts = [
            [PROMPT_OF_TWO.format(words[0].placeholder, words[1].placeholder)],
            [PROMPT_OF_TWO.format(words[0].superclass, words[1].superclass)],
        ]
        yield Pair("sampling_8", "toyland", _sampling(edited, prompts[0]), _sampling(plain, prompts[1]))


def sampling_16_betas(device: torch.device) -> Iterator[Pair]:
    """One pair, whose sides return the pictures."""
    plain, edited = pipeline(device), pipeline(device)
    with concept(edited, training=False) as (_, method):
        method.beta = torch.linspace(0.2, 0.95, BETAS)  # type: ignore[attr-defined]
        prompts = [[PROMPT.format(word)] * BETAS for word in (WORD.placeholder, WORD.superclass)]
        yield Pair("sampling_16_betas", "toyland", _sampling(edited, prompts[0]), _sampling(plain, prompts[1]))


def _sampling(pipe: StableDiffusionPipeline, prompts: Sequence[str]) -> Callable[[], list[Image.Image]]:
    def sample() -> list[Image.Image]:
        said: Any = pipe(list(prompts), num_inference_steps=STEPS, generator=torch.Generator().manual_seed(0))
        return said.images

    return sample
