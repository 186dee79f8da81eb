"""Where a training's pictures of the superclass come from: a folder of real ones, or the frozen backbone."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from PIL import Image
from torch import nn

from perfusion.backbones.base import Backbone
from perfusion.backbones.fingerprint import base_parameters, digest, vocabulary_digest
from perfusion.config import ConceptConfig
from perfusion.data.prior import PriorImages, drawn_images, real_images
from perfusion.data.prompts import fill
from perfusion.drawing import stream
from perfusion.methods.base import MethodOptions
from perfusion.methods.prior import PriorOptions

_AT_ONCE = 8 * 512 * 512  # pixels in one batch, of at most 8 pictures and at least one


def prior_of(
    concept: ConceptConfig, options: MethodOptions, progress: bool = True
) -> Callable[[Backbone], PriorImages | None]:
    """What gives the pictures of the superclass once the backbone is there, with nothing attached to it; it gives None
    for a method that uses none.

    Raises:
        ConceptImageError: real pictures that cannot be used; they are read here, before a model is loaded.
    """
    if not isinstance(options, PriorOptions) or not options.prior:
        return lambda backbone: None
    prompt = fill(options.prior_prompt, concept.superclass)
    if concept.prior is not None:
        real = real_images(concept.prior, options.prior_images, prompt)
        return lambda backbone: real
    cache = Path(concept.prior_cache).expanduser()
    return lambda backbone: _drawn(backbone, options, prompt, cache, progress)


def _drawn(backbone: Backbone, options: PriorOptions, prompt: str, cache: Path, progress: bool) -> PriorImages:
    side = backbone.config.resolution
    batch_size = max(1, min(8, _AT_ONCE // side**2))

    def draw(prompts: Sequence[str], seeds: Sequence[int]) -> Iterator[Image.Image]:
        print(f"drawing {len(prompts)} pictures of {prompt!r}, once, into {cache}")
        return stream(
            backbone.pipe,
            prompts,
            seeds,
            options.prior_steps,
            options.prior_guidance,
            batch_size,
            progress,
            size=side,
            exact=False,  # the batches are always the same
        )

    made_of = {
        "family": backbone.family,
        "parts": {name: _identity(part) for name, part in backbone.pipe.components.items() if part is not None},
        "dtype": str(backbone.dtype),
        "resolution": side,
        "steps": options.prior_steps,
        "guidance": options.prior_guidance,
    }
    return drawn_images(cache, made_of, prompt, options.prior_images, options.prior_seed, draw, batch_size)


def _identity(part: Any) -> str:
    """What tells a part of a pipeline from another one: weights of a model, vocabulary of a tokenizer, settings of a
    scheduler."""
    if isinstance(part, nn.Module):
        return digest(base_parameters(part))
    if hasattr(part, "get_vocab"):
        return vocabulary_digest(part)
    settings = {key: value for key, value in getattr(part, "config", {}).items() if not key.startswith("_")}
    return f"{type(part).__name__} {json.dumps(settings, sort_keys=True, default=str)}"
