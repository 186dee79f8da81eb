"""Stock diffusers pipelines, for tests that hold our files against them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from diffusers import DiffusionPipeline
from torch import Tensor

PROMPT = "a photo of a <bear*> on the beach"


def draw(pipe: Any, prompt: str = PROMPT, **settings: Any) -> Tensor:
    """Latents of two steps, always from the same noise."""
    generator = torch.Generator().manual_seed(3)
    return pipe(prompt, generator=generator, num_inference_steps=2, output_type="latent", **settings).images


def stock(folder: Path) -> Any:
    """The pipeline in `folder`, as a user would load it."""
    pipe: Any = DiffusionPipeline.from_pretrained(folder, local_files_only=True)
    pipe.set_progress_bar_config(disable=True)
    return pipe
