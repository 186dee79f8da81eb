"""`train_memory`: what a training step of the method perfusion keeps for its backward pass, against the least.

Both sides are those of `train_step`: the whole step's loss, and its lower bound's forward. Counted are the bytes of the
distinct storages that autograd saves, without the models' weights: what a larger batch is paid for with. It is the
same on every device, so it is counted and not timed; B pictures keep B times as much as one.

On Toyland, a batch of 16; on Stable Diffusion 1.5, one picture of 512 x 512; `train_memory_checkpointing` is the latter
with gradient checkpointing: the subject with `backbone.gradient_checkpointing=true`, the baseline with diffusers' own.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks

from benchmarks import pipelines
from benchmarks.timing import Amounts
from benchmarks.train_step import batch, forward
from perfusion.backbones import around, default_config


def amounts(device: torch.device) -> Iterator[Amounts]:
    """Bytes on Toyland and on SD 1.5."""
    yield _compared("train_memory", "toyland", 16, device, checkpointing=False)
    yield _compared("train_memory", "sd15", 1, device, checkpointing=False)


def checkpointing(device: torch.device) -> Iterator[Amounts]:
    """Bytes on SD 1.5 with gradient checkpointing."""
    yield _compared("train_memory_checkpointing", "sd15", 1, device, checkpointing=True)


def _compared(name: str, model: str, size: int, device: torch.device, checkpointing: bool) -> Amounts:
    torch.manual_seed(0)
    pipe: Any = pipelines.pipeline(model, device)
    if checkpointing:
        pipe.unet.enable_gradient_checkpointing()
    plain = around(pipe, default_config(pipelines.BACKBONES[model]))
    content = batch(plain, size, pipelines.WORD.placeholder)
    weights = [*pipe.unet.parameters(), *pipe.text_encoder.parameters()]
    bound, hook, _ = forward(plain, content)
    least = kept_bytes(bound, weights)
    hook.remove()
    pipe.unet.disable_gradient_checkpointing()
    with pipelines.concept(model, pipe, training=True, checkpointing=checkpointing) as (backbone, method):
        weights += method.parameters()
        ours = kept_bytes(lambda: torch.stack(list(method.loss(backbone, content).values())).sum(), weights)
    return Amounts(name, model, ours, least)


def kept_bytes(run: Callable[[], Tensor], weights: list[Tensor]) -> int:
    """Bytes of the distinct storages that autograd saves in `run`, those of `weights` not counted."""
    known = {weight.untyped_storage()._cdata for weight in weights}
    found: dict[int, int] = {}

    def note(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage._cdata not in known:
            found[storage._cdata] = storage.nbytes()
        return tensor  # kept by the graph, so no other storage can come to lie in its place

    with saved_tensors_hooks(note, lambda tensor: tensor):
        result = run()
    assert result.requires_grad
    return sum(found.values())
