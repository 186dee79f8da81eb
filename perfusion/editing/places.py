"""Places in a model where a method puts something of its own, and what stands there without it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from torch import nn

from perfusion.editing.words import Words


@dataclass(frozen=True)
class EditSite:
    """One cross-attention projection that can be edited."""

    name: str  # dotted path inside the denoiser, e.g. "mid_block.attentions.0.transformer_blocks.0.attn2.to_v"
    kind: Literal["k", "v"]
    parent: nn.Module  # the attention module that holds it
    attribute: str  # "to_k" or "to_v"

    @property
    def projection(self) -> nn.Module:
        """What stands at the site now: the bias-free linear layer (h, d), or an edit around it."""
        return getattr(self.parent, self.attribute)


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
