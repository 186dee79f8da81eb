"""Places in a model where a method puts something of its own, and what stands there without it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

from diffusers.models.attention_processor import FusedAttnProcessor2_0
from torch import nn

from perfusion.editing.words import Words


@dataclass(frozen=True)
class Place:
    """An attribute of one of a model's modules, at which a layer or a parameter stands."""

    name: str  # dotted path inside the model, below whatever is put around its modules
    parent: nn.Module
    attribute: str

    @property
    def now(self) -> Any:
        """What stands there now."""
        return getattr(self.parent, self.attribute)

    def put(self, thing: nn.Module | nn.Parameter) -> None:
        """Let `thing` stand there."""
        setattr(self.parent, self.attribute, thing)

    def holder(self, layer: nn.Module) -> Place | None:
        """The place where `layer` hangs: this one, or one below tuner layers that stand here. None: taken out."""
        place = self
        while (found := getattr(place.parent, place.attribute, None)) is not layer:
            if found is None:
                return None
            place = Place(self.name, found, "base_layer")
        return place

    @property
    def fused(self) -> bool:
        """Whether the attention module here has fused its projections (`fuse_qkv_projections`), and calls none of
        them."""
        return isinstance(getattr(self.parent, "processor", None), FusedAttnProcessor2_0)


@dataclass(frozen=True)
class EditSite(Place):
    """One cross-attention projection that can be edited: "to_k" or "to_v" of an attention module."""

    kind: Literal["k", "v"]

    @property
    def projection(self) -> nn.Module:
        """What stands at the site now: the bias-free linear layer (h, d), or an edit around it."""
        return self.now


def base_module(module: nn.Module) -> nn.Module:
    """What `module` was before words, adapters (LoRA), edits or `torch.compile` were put around it."""
    while (inner := _inside(module)) is not None:
        module = inner
    return module


def _inside(module: nn.Module) -> nn.Module | None:
    if isinstance(module, Words):
        return module.base
    around = (getattr(module, name, None) for name in ("base_layer", "_orig_mod"))  # peft's name, torch.compile's name
    return next((inner for inner in around if isinstance(inner, nn.Module)), None)
