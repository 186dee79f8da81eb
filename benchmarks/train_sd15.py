"""`train_peak`, `train_400`: a training of the paper's size on Stable Diffusion 1.5 with random weights, 16 pictures of
512 x 512 a step. For CUDA alone. Written and tried on a CPU with a small model; not yet run on a GPU.

Both sides are those of `train_step`, one after the other, so that neither lies in memory while the other is measured.

- `train_peak`: the most memory that was allocated on the device while steps were taken, weights of the whole pipeline
  included. Row `sd15` in float32; row `sd15_bf16` under autocast to bfloat16, as `trainer.precision=bf16-mixed` does.
- `train_400`: the seconds of 400 steps, after a few that do not count; under autocast alone.

`train_peak_checkpointing` and `train_400_checkpointing` are the same with gradient checkpointing: the subject has
`backbone.gradient_checkpointing=true`, the baseline diffusers' own.
"""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator
from functools import partial

import torch

from benchmarks import timing, train_step
from benchmarks.timing import Amounts, Clock

STEPS = 400  # the paper's
PEAK_STEPS = 3  # the first one makes what the optimizer keeps
PRECISIONS = {"sd15_bf16": torch.bfloat16, "sd15": torch.float32}  # the smaller one first, which fits where both do not


def peak(device: torch.device, checkpointing: bool = False) -> Iterator[Amounts]:
    """Bytes in either precision."""
    name = "train_peak" + "_checkpointing" * checkpointing
    for model in PRECISIONS:
        yield compared(name, model, device, checkpointing, partial(peak_bytes, device=device), "bytes")


def run(device: torch.device, checkpointing: bool = False) -> Iterator[Amounts]:
    """Seconds."""
    name = "train_400" + "_checkpointing" * checkpointing
    yield compared(name, "sd15_bf16", device, checkpointing, partial(seconds, device=device), "wall")


def compared(
    name: str,
    model: str,
    device: torch.device,
    checkpointing: bool,
    measure: Callable[[Callable[[], object]], float],
    clock: Clock,
    size: int = train_step.BATCH,
) -> Amounts:
    """What `measure` says of a step of either side, in the precision of `model` and on `size` pictures."""

    def in_precision(step: Callable[[], object]) -> Callable[[], object]:
        def run() -> object:
            with torch.autocast(device.type, PRECISIONS[model], enabled=PRECISIONS[model] != torch.float32):
                return step()

        return run

    def subject() -> float:
        with train_step.subject("sd15", device, checkpointing, size) as step:
            return measure(in_precision(step))

    def baseline() -> float:
        return measure(in_precision(train_step.baseline("sd15", device, checkpointing, size)))

    found = []
    for side in (subject, baseline):
        gc.collect()  # pipelines hold one another
        found.append(side())
    return Amounts(name, model, *found, clock=clock)


def peak_bytes(step: Callable[[], object], device: torch.device) -> float:
    """The most that was allocated on a CUDA device during a few steps, with all that lay there before."""
    timing.finish(device)
    torch.cuda.reset_peak_memory_stats(device)
    for _ in range(PEAK_STEPS):
        step()
    timing.finish(device)
    return torch.cuda.max_memory_allocated(device)


def seconds(step: Callable[[], object], device: torch.device, steps: int = STEPS) -> float:
    """Of `steps` steps, after the first few."""
    timing.seconds_each(step, timing.WARM_UPS, device, timing.CLOCKS["wall"])
    return steps * timing.seconds_each(step, steps, device, timing.CLOCKS["wall"])
