"""A fingerprint of base weights: the same whatever is attached to a model, another when its weights are others."""

from __future__ import annotations

import hashlib
import weakref
from collections.abc import Iterable, Iterator, Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from perfusion.backbones.tokens import ExtendedEmbedding

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

DIGITS = 16  # of the sha256, in hexadecimal
_SAMPLE = 64  # values of each tensor that are looked at before a digest is taken for granted

# Module -> part of it -> how its weights looked, and their digest.
_known: weakref.WeakKeyDictionary[nn.Module, dict[str, tuple[bytes, str]]] = weakref.WeakKeyDictionary()


def base_module(module: nn.Module) -> nn.Module:
    """What `module` was before words, adapters (LoRA), edits or `torch.compile` were put around it."""
    while (inner := _inside(module)) is not None:
        module = inner
    return module


def _inside(module: nn.Module) -> nn.Module | None:
    if isinstance(module, ExtendedEmbedding):
        return module.base
    around = (getattr(module, name, None) for name in ("base_layer", "_orig_mod"))  # peft's name, torch.compile's name
    return next((inner for inner in around if isinstance(inner, nn.Module)), None)


def base_parameters(module: nn.Module, prefix: str = "") -> Iterator[tuple[str, Tensor]]:
    """Names and values of the parameters below `module`, as though nothing had been put around any part of it, or in
    the place of a parameter that says by an attribute `replaced` which one it stands for."""
    module = base_module(module)
    for name, parameter in module.named_parameters(prefix, recurse=False):
        yield name, getattr(parameter, "replaced", parameter).detach()
    for name, child in module.named_children():
        yield from base_parameters(child, f"{prefix}.{name}" if prefix else name)


def digest(tensors: Iterable[tuple[str, Tensor]]) -> str:
    """Prefix of the sha256 over names, shapes and values.

    The values are rounded to float16 first, so a model loaded in float32 and the same model loaded in float16 agree;
    in bfloat16 it is another model, since rounding to bfloat16 changes its weights.
    """
    total = hashlib.sha256()
    for name, value in sorted(tensors, key=lambda item: item[0]):
        total.update(f"{name} {tuple(value.shape)}\n".encode())
        total.update(value.to(torch.float16).contiguous().cpu().numpy().data)
    return total.hexdigest()[:DIGITS]


def remembered_digest(owner: nn.Module, part: str, tensors: Iterable[tuple[str, Tensor]]) -> str:
    """`digest` of the weights of a `part` of `owner`, reckoned only if they may be others than the last time.

    They are the same if each lies where it lay, was not written to since, and its sampled values are what they were.
    Writing past autograd (`.data`, as in merging LoRA) is not counted by torch, therefore the samples; only a change of
    single values in that way would go unseen.
    """
    listed = list(tensors)
    looks = _looks(listed)
    parts = _known.setdefault(owner, {})
    if part not in parts or parts[part][0] != looks:
        parts[part] = looks, digest(listed)
    return parts[part][1]


def _looks(tensors: Sequence[tuple[str, Tensor]]) -> bytes:
    total = hashlib.sha256()
    for name, value in tensors:
        written = 0 if value.is_inference() else value._version
        total.update(f"{name} {tuple(value.shape)} {value.dtype} {value.data_ptr()} {written}\n".encode())
    samples = [value.flatten()[:: max(1, value.numel() // _SAMPLE)].float() for _, value in tensors]
    total.update(torch.cat(samples).cpu().numpy().data)
    return total.digest()


def vocabulary_digest(tokenizer: PreTrainedTokenizerBase) -> str:
    """The same for a tokenizer: its tokens, their ids and the length at which it cuts."""
    total = hashlib.sha256(f"{tokenizer.model_max_length}\n".encode())
    for token, i in sorted(tokenizer.get_vocab().items()):
        total.update(f"{token} {i}\n".encode())
    return total.hexdigest()[:DIGITS]


def has_adapters(module: nn.Module) -> bool:
    """Whether LoRA or another adapter is attached anywhere in `module`; added words do not count."""
    return any(isinstance(getattr(part, "base_layer", None), nn.Module) for part in module.modules())
