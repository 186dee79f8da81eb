"""Pictures of a toy that Toyland draws, in the place of a person's photos."""

from __future__ import annotations

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from perfusion.config import ConceptConfig, ConfigError
from perfusion.data.dataset import seed_of
from perfusion.data.images import Examples, fit
from perfusion.toyland.draw import render
from perfusion.toyland.world import SUPERCLASSES, concept_scene, sample_instance

# Where the toy is set: none of the places that the validation prompts ask for.
PLACES = ("plain", "meadow", "kitchen", "forest", "desert")


def drawn_examples(concept: ConceptConfig, resolution: int) -> Examples:
    """Pictures of one toy and its exact masks; picture k of an instance is the same whatever the number of pictures.

    Raises:
        ConfigError: a superclass that Toyland cannot draw, or a number that is none of pictures or of a toy.
    """
    if concept.superclass not in SUPERCLASSES:
        raise ConfigError(
            f"concept.superclass={concept.superclass!r}: Toyland draws no such thing; give your own pictures with "
            f"concept.images=, or one of: {', '.join(SUPERCLASSES)}"
        )
    if concept.toyland.count < 1:
        raise ConfigError(f"concept.toyland.count={concept.toyland.count}: expected at least one picture")
    if concept.toyland.instance < 0:
        raise ConfigError(f"concept.toyland.instance={concept.toyland.instance}: expected a number from 0 on")
    toy = sample_instance(np.random.default_rng(concept.toyland.instance), concept.superclass)
    pixels: list[Tensor] = []
    masks: list[Tensor] = []
    for k in range(concept.toyland.count):
        seed = seed_of("toyland concept", concept.toyland.instance, k)
        drawn = render(concept_scene(toy, seed, place=PLACES[k % len(PLACES)]))
        square, mask = fit(Image.fromarray(drawn.image), drawn.masks[0].astype(np.float32) / 255, resolution)
        assert mask is not None
        pixels.append(square)
        masks.append(mask[None])
    names = [f"{concept.superclass}-{concept.toyland.instance}-{k}" for k in range(concept.toyland.count)]
    return Examples(torch.stack(pixels), torch.stack(masks), names)
