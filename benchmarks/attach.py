"""`attach`: a loaded concept put into a pipeline and taken out again, on Toyland and on Stable Diffusion 1.5's layout.

Subject: `Concept.attach` and `detach` on a pipeline that has had a concept before: all checks, the fingerprint of the
weights included, the word, the edit. Baseline: encoding the superclass in the prompt templates, which gives the locked
keys, so no attaching can do without it.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch

from benchmarks.pipelines import WORD, concept, pipeline
from benchmarks.timing import Pair
from perfusion.concept import Concept
from perfusion.methods.perfusion import superclass_encoding


def pairs(device: torch.device) -> Iterator[Pair]:
    """Two pairs; the baseline returns the encoding (d,)."""
    for model in ("toyland", "sd15"):
        pipe = pipeline(model, device)
        with concept(model, pipe, training=True) as (backbone, method):
            trained = Concept.of(method, backbone, seed=0)
        rounds = 5 if model == "sd15" else None
        yield Pair(
            "attach",
            model,
            lambda trained=trained, pipe=pipe: trained.attach(pipe).detach(),
            lambda backbone=backbone: superclass_encoding(backbone, WORD.superclass),
            rounds,
        )
