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

from collections.abc import Callable, Iterator
from contextlib import ExitStack
from typing import Any

import torch
from PIL import Image

from benchmarks.pipelines import concept, pipeline
from benchmarks.timing import Pair
from perfusion.methods.base import Word
from perfusion.toyland.world import SUPERCLASSES

STEPS = {"toyland": 10, "sd15": 3}
ROUNDS = {"toyland": None, "sd15": 7}
SIDE = {"toyland": 64, "sd15": 128}  # pixels, on a CPU
SIDE_OF_MANY = 64  # likewise at most, where a batch has several
PROMPT = "a photo of a {} on the beach"
PROMPT_OF_TWO = "a photo of a {} and a {} on the beach"


def pairs(device: torch.device, concepts: int = 1, pictures: int = 1) -> Iterator[Pair]:
    """A pair for each model, whose sides return the pictures: several `concepts`, or several `pictures`."""
    name = f"sampling_{pictures}_betas" if pictures > 1 else f"sampling_{concepts}"
    words = [Word(f"<{superclass}*>", superclass) for superclass in SUPERCLASSES[:concepts]]
    template = PROMPT_OF_TWO if concepts > 1 else PROMPT
    prompt = template.format(*(word.placeholder for word in words))  # of the first ones
    plain_prompt = template.format(*(word.superclass for word in words))
    for model in STEPS:
        plain, edited = pipeline(model, device), pipeline(model, device)
        with ExitStack() as stack:
            for word in words:
                _, method = stack.enter_context(concept(model, edited, training=False, word=word))
                if pictures > 1:
                    method.beta = torch.linspace(0.2, 0.95, pictures)  # type: ignore[attr-defined]
            subject = _sampling(edited, model, [prompt] * pictures)
            yield Pair(name, model, subject, _sampling(plain, model, [plain_prompt] * pictures), ROUNDS[model])


def _sampling(pipe: Any, model: str, prompts: list[str]) -> Callable[[], list[Image.Image]]:
    side = None
    if pipe.device.type == "cpu":
        side = SIDE[model] if len(prompts) == 1 else min(SIDE[model], SIDE_OF_MANY)

    def sample() -> list[Image.Image]:
        generator = torch.Generator().manual_seed(0)
        return pipe(prompts, side, side, num_inference_steps=STEPS[model], generator=generator).images

    return sample
