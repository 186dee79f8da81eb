"""Short calls of stock pipelines, for tests of what is to be seen in a picture."""

import inspect
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from diffusers import DiffusionPipeline
from torch import Tensor

PROMPT, PLAIN = "a photo of a <cat*> on the beach", "a photo of a cat on the beach"
BEAR = "a photo of a <bear*> on the beach"
STEPS = 2
CLOSED = 10.0  # β at which no gate is open


@contextmanager
def batch_sizes(pipe: Any) -> Iterator[list[int]]:
    """Grows by the batch size of every call of the denoiser; guidance doubles it."""
    sizes: list[int] = []
    denoiser = pipe.components.get("unet") or pipe.transformer
    hook = denoiser.register_forward_pre_hook(lambda module, args: sizes.append(len(args[0])))
    try:
        yield sizes
    finally:
        hook.remove()


def own_size(pipe: Any) -> dict[str, Any]:
    """What a call is told besides for a small pipeline, where it would look for a size among those of large ones."""
    if "use_resolution_binning" not in inspect.signature(type(pipe).__call__).parameters:
        return {}
    return {"use_resolution_binning": False, "clean_caption": False, "height": 64, "width": 64}


def call(pipe: Any, prompt: str | None = None, **more: Any) -> Tensor:
    """Latents of one stock call."""
    generator = torch.Generator().manual_seed(0)
    given: dict[str, Any] = {} if prompt is None else {"prompt": prompt}
    given |= own_size(pipe)
    return pipe(num_inference_steps=STEPS, generator=generator, output_type="latent", **given, **more).images


def draw(pipe: Any, prompt: str | None = BEAR, **more: Any) -> Tensor:
    """The same of the bear, if nothing else is asked for."""
    return call(pipe, prompt, **more)


def stock(folder: Path) -> Any:
    """The pipeline in `folder`, as a user would load it."""
    pipe: Any = DiffusionPipeline.from_pretrained(folder, local_files_only=True)
    pipe.set_progress_bar_config(disable=True)
    return pipe
