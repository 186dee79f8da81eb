"""Pictures of the superclass, which a method holds on to (prior preservation): real ones from a folder, or drawn by the
frozen backbone.

Drawn pictures are PNG files in a folder that is named after everything they depend on. Each is drawn once; a drawing
that was interrupted goes on with the pictures that are missing, to the same pictures.
"""

from __future__ import annotations

import hashlib
import json
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from perfusion.backbones.base import Backbone
from perfusion.backbones.fingerprint import base_parameters, digest, vocabulary_digest
from perfusion.config import ConceptConfig
from perfusion.data.captions import caption_beside
from perfusion.data.dataset import seed_of
from perfusion.data.images import find_images, fit, read_image
from perfusion.data.prompts import fill
from perfusion.drawing import stream
from perfusion.files import atomic_path, atomic_write_text
from perfusion.methods.base import MethodOptions
from perfusion.methods.prior import PriorOptions

CACHE_FORMAT = 1
KEY = "concept.prior"
_INPUTS = "inputs.json"
_AT_ONCE = 8 * 512 * 512  # pixels in one batch, of at most 8 pictures and at least one


@dataclass(frozen=True)
class PriorImages:
    """n pictures of the superclass, as files, and what each of them shows."""

    paths: tuple[Path, ...]
    prompts: tuple[str, ...]

    def __post_init__(self) -> None:
        assert len(self.paths) == len(self.prompts) > 0

    def __len__(self) -> int:
        return len(self.paths)

    def pixels(self, start: int, stop: int, resolution: int) -> Tensor:
        """Pictures `start` to `stop`, float32 (k, 3, R, R) in [-1, 1], see `images.fit`. Raises ConceptImageError."""
        return torch.stack([fit(read_image(path), None, resolution)[0] for path in self.paths[start:stop]])


def prior_of(
    concept: ConceptConfig, options: MethodOptions, progress: bool = True
) -> Callable[[Backbone], PriorImages | None]:
    """What gives the pictures of the superclass once the backbone is there, with nothing attached to it; it gives None
    for a method that uses none.

    Raises:
        ConceptImageError: real pictures that cannot be used; they are read here, before a model is loaded.
    """
    if not isinstance(options, PriorOptions) or not options.prior:
        if concept.prior is not None:
            find_images(concept.prior, key=KEY)
            print(f"note: {KEY}: the method {options.name} uses no pictures of the superclass", file=sys.stderr)
        return lambda backbone: None
    prompt = fill(options.prior_prompt, concept.superclass)
    if concept.prior is not None:
        real = real_images(concept.prior, options.prior_images, prompt)
        return lambda backbone: real
    cache = Path(concept.prior_cache).expanduser()
    return lambda backbone: drawn_images(backbone, options, prompt, cache, progress)


def real_images(spec: str | Sequence[str], count: int, prompt: str) -> PriorImages:
    """The first `count` pictures that a person named, or all if they are fewer.

    A text file beside a picture, of the same name, holds its caption; for others it is `prompt`.

    Args:
        spec: as in `images.find_images`.

    Raises:
        ConceptImageError: anything that is wrong with the files, each of which is decoded in full here.
    """
    paths = find_images(spec, key=KEY)[:count]
    for path in paths:
        read_image(path)
    return PriorImages(tuple(paths), tuple(caption_beside(path, KEY) or prompt for path in paths))


def drawn_images(
    backbone: Backbone, options: PriorOptions, prompt: str, cache: Path, progress: bool = True
) -> PriorImages:
    """`options.prior_images` pictures of `prompt`, drawn now as far as they do not lie in `cache` yet.

    Kernels round differently for every batch shape, so pictures are drawn in whole batches only, always of the same
    ones: picture k is the same whatever is missing and however many are asked for. Of the last batch all pictures are
    kept. Each has a seed of its own, made of `options.prior_seed` and its number.

    Raises:
        OSError: the folder cannot be written to.
    """
    side, count = backbone.config.resolution, options.prior_images
    batch_size = max(1, min(8, _AT_ONCE // side**2))
    inputs = {
        "format": CACHE_FORMAT,
        "prompt": prompt,
        "seed": options.prior_seed,
        "batch_size": batch_size,
        "family": backbone.family,
        "parts": {name: _identity(part) for name, part in backbone.pipe.components.items() if part is not None},
        "dtype": str(backbone.dtype),
        "resolution": side,
        "steps": options.prior_steps,
        "guidance": options.prior_guidance,
    }
    canonical = json.dumps(inputs, sort_keys=True, separators=(",", ":"))
    folder = cache / hashlib.sha256(canonical.encode()).hexdigest()[:16]
    files = [folder / f"{k:05d}.png" for k in range(-(-count // batch_size) * batch_size)]
    missing = {k for k, file in enumerate(files) if not file.exists()}
    if any(k in missing for k in range(count)):
        folder.mkdir(parents=True, exist_ok=True)
        atomic_write_text(folder / _INPUTS, json.dumps(inputs, indent=2, sort_keys=True) + "\n")
        incomplete = {k // batch_size for k in missing}
        numbers = [k for k in range(len(files)) if k // batch_size in incomplete]
        print(f"drawing {len(numbers)} pictures of {prompt!r}, once, into {cache}")
        images = stream(
            backbone.pipe,
            [prompt] * len(numbers),
            [seed_of("prior", options.prior_seed, k) for k in numbers],
            options.prior_steps,
            options.prior_guidance,
            batch_size,
            progress,
            size=side,
            exact=False,  # the batches are always the same
        )
        for k, image in zip(numbers, images, strict=True):
            if k in missing:
                with atomic_path(files[k]) as temporary:
                    image.save(temporary)
    return PriorImages(tuple(files[:count]), (prompt,) * count)


def _identity(part: Any) -> str:
    """What tells a part of a pipeline from another one: weights of a model, vocabulary of a tokenizer, settings of a
    scheduler."""
    if isinstance(part, nn.Module):
        return digest(base_parameters(part))
    if hasattr(part, "get_vocab"):
        return vocabulary_digest(part)
    settings = {key: value for key, value in getattr(part, "config", {}).items() if not key.startswith("_")}
    return f"{type(part).__name__} {json.dumps(settings, sort_keys=True, default=str)}"
