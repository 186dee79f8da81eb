"""All benchmarks: what each runs, what docs/performance.md says of it, and the goal that it is held against."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import NamedTuple

import torch

from benchmarks import projection, sampling
from benchmarks.pipelines import attaching
from benchmarks.timing import Clock, Sides
from benchmarks.training import amounts, kept, peak, seconds, steps


class Benchmark(NamedTuple):
    """A benchmark and its goal, if it has one: at most `ratio`, or at most `seconds` for the subject."""

    sides: Callable[[str, torch.device], Sides]  # of a model
    text: str  # what it compares with what
    ratio: float | None = None
    seconds: float | None = None
    models: Sequence[str] = ("toyland", "sd15")
    rounds: int | None = None  # at most so many on Stable Diffusion, where one takes seconds
    amount: Clock | None = None  # that the sides measure by themselves, once; None: they are timed
    cuda: bool = False  # whether Stable Diffusion needs it


_ALIKE = "the same with gradient checkpointing"
_PEAK = "the most memory that is allocated in training steps on 16 pictures of 512 x 512 (`_bf16`: under autocast)"
_PEAKS = {"models": ("sd15_bf16", "sd15"), "amount": "bytes", "cuda": True}  # the smaller first, in case one fits
_SECONDS = {"seconds": 60, "models": ("sd15_bf16",), "amount": "wall", "cuda": True}

BENCHMARKS: Mapping[str, Benchmark] = {
    "projection": Benchmark(
        projection.sides, "K and V of all layers for a batch of prompts in training: edited against plain"
    ),
    "projection_sampling": Benchmark(
        partial(projection.sides, sampling=True),
        "the same over the steps of one sampling, where they are computed once",
    ),
    "train_step": Benchmark(
        steps,
        "a whole training step against frozen forward and gradients of activations alone",
        1.05,
        rounds=9,
        cuda=True,
    ),
    "sampling_1": Benchmark(sampling.sides, "a whole call of the pipeline: one concept against none", 1.00, rounds=7),
    "sampling_8": Benchmark(
        partial(sampling.sides, concepts=8),
        "the same with eight concepts attached, two of them in the prompt",
        1.00,
        rounds=7,
    ),
    "sampling_16_betas": Benchmark(
        partial(sampling.sides, pictures=16),
        "the same with 16 pictures in a batch, each with a strength of its own",
        1.00,
        rounds=7,
    ),
    "attach_first": Benchmark(
        partial(attaching, anew=True),
        "attaching a concept to a model that was just loaded, and detaching it, against encoding its superclass alone",
        seconds=0.2,
        rounds=5,
    ),
    "attach": Benchmark(
        attaching, "the same where a concept of this superclass has been before", seconds=0.2, rounds=5
    ),
    "train_memory": Benchmark(
        partial(amounts, kept),
        "what a training step keeps for the backward pass against what it has to keep",
        1.05,
        amount="bytes",
    ),
    "train_memory_checkpointing": Benchmark(
        partial(amounts, kept, checkpointing=True), _ALIKE, 1.05, models=("sd15",), amount="bytes"
    ),
    "train_peak": Benchmark(partial(amounts, peak), _PEAK, 1.05, **_PEAKS),
    "train_peak_checkpointing": Benchmark(partial(amounts, peak, checkpointing=True), _ALIKE, 1.05, **_PEAKS),
    "train_400": Benchmark(partial(amounts, seconds), "400 such steps under autocast to bfloat16", **_SECONDS),
    "train_400_checkpointing": Benchmark(partial(amounts, seconds, checkpointing=True), _ALIKE, **_SECONDS),
}
