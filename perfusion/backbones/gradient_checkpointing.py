"""Gradient checkpointing of single calls of a denoiser: less memory in training, for more time."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from diffusers import ModelMixin

_STATE = ("gradient_checkpointing", "_gradient_checkpointing_func")  # what diffusers sets in a block


@contextmanager
def gradient_checkpointing(denoiser: ModelMixin) -> Iterator[None]:
    """Calls of `denoiser` in here keep for the backward pass only what its blocks are given, where gradients are asked
    for; the rest is computed a second time in the backward pass, which may come later.

    Mode and parameters are left alone. Afterwards every block is as it was before, so a picture that is drawn between
    two training steps knows nothing of it.

    Raises:
        ValueError: diffusers cannot do it with this kind of denoiser.
    """
    blocks = [module for module in denoiser.modules() if hasattr(module, _STATE[0])]
    before = [{name: vars(block)[name] for name in _STATE if name in vars(block)} for block in blocks]
    try:
        denoiser.enable_gradient_checkpointing()
        yield
    finally:
        for block, state in zip(blocks, before, strict=True):
            for name in _STATE:
                vars(block).pop(name, None)
            vars(block).update(state)
