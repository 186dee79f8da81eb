"""Short calls of stock pipelines, for tests of what is to be seen in a picture."""

from typing import Any

import torch
from torch import Tensor

PROMPT, PLAIN = "a photo of a <cat*> on the beach", "a photo of a cat on the beach"
STEPS = 2
CLOSED = 10.0  # β at which no gate is open


def call(pipe: Any, prompt: str | None = None, **more: Any) -> Tensor:
    """Latents of one stock call."""
    generator = torch.Generator().manual_seed(0)
    given = {} if prompt is None else {"prompt": prompt}
    return pipe(num_inference_steps=STEPS, generator=generator, output_type="latent", **given, **more).images
