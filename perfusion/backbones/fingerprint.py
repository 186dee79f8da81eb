"""A fingerprint of base weights: the same whatever is attached to a model, another when its weights are others."""

from __future__ import annotations

import hashlib
import weakref
from collections.abc import Callable, Hashable, Iterable, Iterator, Sequence
from typing import TYPE_CHECKING, Any, TypeVar

import torch
from torch import Tensor, nn

from perfusion.editing.places import base_module
from perfusion.editing.words import Words

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

T = TypeVar("T")

DIGITS = 16  # of the sha256, in hexadecimal
_SAMPLE = 64  # values of each tensor that are looked at before a digest is taken for granted

# Module -> what was reckoned from its weights -> how they looked, and the outcome.
_known: weakref.WeakKeyDictionary[nn.Module, dict[Hashable, tuple[bytes, Any]]] = weakref.WeakKeyDictionary()


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
    in bfloat16 they are others, since rounding to bfloat16 changes them.
    """
    total = hashlib.sha256()
    for name, value in sorted(tensors, key=lambda item: item[0]):
        total.update(f"{name} {tuple(value.shape)}\n".encode())
        total.update(value.to(torch.float16).contiguous().cpu().numpy().data)
    return total.hexdigest()[:DIGITS]


def remembered(owner: nn.Module, what: Hashable, tensors: Iterable[tuple[str, Tensor]], reckon: Callable[[], T]) -> T:
    """`reckon()`, which depends on `tensors`, weights of `owner`; reckoned only if they may be others than last time.

    They are the same if each lies where it lay, was not written to since, and its sampled values are what they were.
    Writing past autograd (`.data`, as in merging LoRA) is not counted by torch, therefore the samples; only a change of
    single values in that way would go unseen.
    """
    looks = _looks(list(tensors))
    known = _known.setdefault(owner, {})
    if what not in known or known[what][0] != looks:
        known[what] = looks, reckon()
    return known[what][1]


def remembered_digest(
    owner: nn.Module, part: str, tensors: Iterable[tuple[str, Tensor]], dtype: torch.dtype | None = None
) -> str:
    """`digest` of the weights of a `part` of `owner`, rounded to `dtype` (None: as they are), as `remembered`."""
    listed = list(tensors)
    return remembered(
        owner, (part, dtype), listed, lambda: digest((name, value.to(dtype or value.dtype)) for name, value in listed)
    )


def forget(*owners: nn.Module) -> None:
    """Remember nothing of these models, as though they had just been loaded."""
    for owner in owners:
        _known.pop(owner, None)


def _looks(tensors: Sequence[tuple[str, Tensor]]) -> bytes:
    total = hashlib.sha256()
    for name, value in tensors:
        written = 0 if value.is_inference() else value._version
        total.update(f"{name} {tuple(value.shape)} {value.dtype} {value.data_ptr()} {written}\n".encode())
    samples = [value.flatten()[:: max(1, value.numel() // _SAMPLE)].float() for _, value in tensors]
    total.update(torch.cat(samples).cpu().numpy().data)
    return total.digest()


def vocabulary_digest(tokenizer: PreTrainedTokenizerBase) -> str:
    """The same for a tokenizer: its tokens, their ids and the length at which it cuts. Textual inversions that the
    pipeline has loaded are no part of it."""
    total = hashlib.sha256(f"{tokenizer.model_max_length}\n".encode())
    size = vocabulary_size(tokenizer)
    for token, i in sorted(tokenizer.get_vocab().items()):
        if i < size:
            total.update(f"{token} {i}\n".encode())
    return total.hexdigest()[:DIGITS]


def vocabulary_size(tokenizer: PreTrainedTokenizerBase) -> int:
    """The number of its tokens, without those that were added at the end, as textual inversions are."""
    size, added = len(tokenizer), tokenizer.added_tokens_decoder
    while size - 1 in added and not added[size - 1].special:
        size -= 1
    return size


def encoder_parameters(encoder: nn.Module, tokenizer: PreTrainedTokenizerBase) -> Iterator[tuple[str, Tensor]]:
    """`base_parameters` of a text encoder, without the rows that textual inversions added to its embedding table."""
    table: Tensor = encoder.get_input_embeddings().weight  # type: ignore[operator]
    size = vocabulary_size(tokenizer)
    for name, value in base_parameters(encoder):
        grown = size < len(tokenizer) == len(table) and value.data_ptr() == table.data_ptr()
        yield name, value[:size] if grown else value


def reads_as_loaded(encoder: nn.Module, ids: Sequence[int]) -> bool:
    """Whether the weights that a text encoder was loaded with say alone how it reads the tokens `ids`: none of them was
    added, and there are neither adapters nor weights in the place of others."""
    table = encoder.get_input_embeddings()  # type: ignore[operator]
    added = isinstance(table, Words) and max(ids) >= table.first
    replaced = (parameter for parameter in encoder.parameters() if hasattr(parameter, "replaced"))
    return not added and not has_adapters(encoder) and next(replaced, None) is None


def has_adapters(module: nn.Module) -> bool:
    """Whether LoRA or another adapter is attached anywhere in `module`; added words do not count."""
    return any(isinstance(getattr(part, "base_layer", None), nn.Module) for part in module.modules())
