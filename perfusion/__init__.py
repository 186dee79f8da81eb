"""Perfusion: key-locked rank-one editing for personalizing text-to-image models.

From a concept file to a picture:

    pipe = perfusion.load("toyland")
    perfusion.Concept.load("concept.safetensors").attach(pipe)
    pipe("a photo of <cat*> on the beach").images[0]
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from perfusion.backbones import load
    from perfusion.concept import Concept

__all__ = ["Concept", "load"]

# Imported on first use: torch and diffusers take seconds, and `--help` has no need of them.
_HOMES = {"Concept": "perfusion.concept", "load": "perfusion.backbones"}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(_HOMES[name]), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
