"""Whole calls of a pipeline, with concepts attached, against the same call of the stock pipeline.

Both are what a user waits for: tokenizer, text encoder, DDIM steps with guidance, autoencoder, PIL. On Toyland 10
steps; on Stable Diffusion 1.5 with random weights 3 steps, at 128 x 128 pixels on a CPU, or 64 x 64 where there are 16
pictures: 512 would take minutes. That flatters nobody: an edit costs once for a prompt what it then spares in every
step, so with few steps the ratio is worse, and with small pictures it is farther from 1, to either side. Subject:
prompts hold the concepts' words and the edits are attached. Baseline: the superclasses in their place, nothing
attached.

- `sampling_1`: one picture, one concept.
- `sampling_8`: one picture, eight concepts attached, two of them in the prompt.
- `sampling_16_betas`: one concept, 16 pictures in one batch, each with a β of its own.
"""

from __future__ import annotations

from typing import Any

import torch
from PIL import Image

from benchmarks.pipelines import attached, pipeline
from benchmarks.timing import Sides
from perfusion.methods.base import Word
from perfusion.toyland.world import SUPERCLASSES

STEPS = {"toyland": 10, "sd15": 3}
SIDE = {"toyland": 64, "sd15": 128}  # pixels, on a CPU
SIDE_OF_MANY = 64  # likewise at most, where a batch has several


def sides(model: str, device: torch.device, concepts: int = 1, pictures: int = 1) -> Sides:
    """Both return the pictures: several `concepts`, or several `pictures`."""
    words = [Word(f"<{superclass}*>", superclass) for superclass in SUPERCLASSES[:concepts]]
    template = "a photo of a {} and a {} on the beach" if concepts > 1 else "a photo of a {} on the beach"
    prompt = template.format(*(word.placeholder for word in words))  # of the first ones
    plain_prompt = template.format(*(word.superclass for word in words))
    plain, edited = pipeline(model, device), pipeline(model, device)
    for word in words:
        _, method = attached(model, edited, training=False, word=word)
        if pictures > 1:
            method.beta = torch.linspace(0.2, 0.95, pictures)  # type: ignore[attr-defined]
    side = None
    if device.type == "cpu":
        side = SIDE[model] if pictures == 1 else min(SIDE[model], SIDE_OF_MANY)

    def sample(pipe: Any, prompt: str) -> list[Image.Image]:
        generator = torch.Generator().manual_seed(0)
        return pipe([prompt] * pictures, side, side, num_inference_steps=STEPS[model], generator=generator).images

    return Sides(lambda: sample(edited, prompt), lambda: sample(plain, plain_prompt))
