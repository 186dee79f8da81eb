"""`attach_first`, `attach`: a loaded concept put into a pipeline and taken out again, on Toyland and on the layout of
Stable Diffusion 1.5.

Subject: `Concept.attach` and `detach`: all checks, the fingerprint of the weights included, the word, the edit.
`attach_first` on a model of which nothing is known yet; `attach` on one that had a concept of the same superclass, so
the fingerprint and the superclass's encoding are known. Baseline of both: encoding the superclass in the prompt
templates, which gives the locked keys, so no first attaching can do without it.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from diffusers import StableDiffusionPipeline
from torch import Tensor

from benchmarks.pipelines import WORD, concept, pipeline
from benchmarks.timing import Pair
from perfusion.backbones.base import Backbone
from perfusion.backbones.fingerprint import forget
from perfusion.concept import Concept
from perfusion.data.prompts import fill, templates

ROUNDS = {"toyland": None, "sd15": 5}


def pairs(device: torch.device, anew: bool = False) -> Iterator[Pair]:
    """A pair for each model, of which nothing is known yet at each call if `anew`; the baseline returns the encoding
    (d,)."""
    return (_pair("attach_first" if anew else "attach", model, device, anew) for model in ROUNDS)


def _pair(name: str, model: str, device: torch.device, anew: bool) -> Pair:
    pipe = pipeline(model, device)
    with concept(model, pipe, training=True) as (backbone, method):
        trained = Concept.of(method, backbone, seed=0)
    return Pair(name, model, lambda: _attach(trained, pipe, anew), lambda: _encode(backbone), ROUNDS[model])


def _attach(trained: Concept, pipe: StableDiffusionPipeline, anew: bool) -> None:
    if anew:
        forget(pipe.unet, pipe.text_encoder)
    trained.attach(pipe).detach()


def _encode(backbone: Backbone) -> Tensor:
    prompts = [fill(template, WORD.superclass) for template in templates(backbone.config.prompts)]
    with torch.no_grad():
        return backbone.encode(prompts, WORD.superclass, padded=False).mean_at_word()
