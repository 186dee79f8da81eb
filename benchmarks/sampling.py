"""`sampling_1`: one picture with one concept attached against one picture of the stock pipeline, on Toyland.

Both are the whole call of a user: tokenizer, text encoder, 10 DDIM steps with guidance, autoencoder, PIL.
Subject: the prompt holds the concept's word and the edit is attached.
Baseline: the superclass in the word's place, nothing attached.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from diffusers import StableDiffusionPipeline
from PIL import Image

from benchmarks.timing import Pair
from benchmarks.toyland import WORD, concept, pipeline

STEPS = 10
PROMPT = "a photo of a {} on the beach"


def pairs(device: torch.device) -> Iterator[Pair]:
    """One pair, whose sides return the picture."""
    plain, edited = pipeline(device), pipeline(device)
    with concept(edited, training=False):
        yield Pair("sampling_1", "toyland", _sampling(edited, WORD.placeholder), _sampling(plain, WORD.superclass))


def _sampling(pipe: StableDiffusionPipeline, word: str) -> Callable[[], Image.Image]:
    def sample() -> Image.Image:
        said: Any = pipe(PROMPT.format(word), num_inference_steps=STEPS, generator=torch.Generator().manual_seed(0))
        return said.images[0]

    return sample
