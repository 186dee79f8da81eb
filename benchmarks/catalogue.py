"""All benchmarks: what each runs, what docs/performance.md says of it, and the goal that it is held against."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from functools import partial
from typing import NamedTuple

import torch

from benchmarks import attach, memory, projection, sampling, train_sd15, train_step
from benchmarks.timing import Amounts, Pair


class Benchmark(NamedTuple):
    """A benchmark and its goal, if it has one: at most `ratio`, or at most `seconds` for the subject."""

    run: Callable[[torch.device], Iterator[Pair | Amounts]]
    text: str  # what it compares with what
    ratio: float | None = None
    seconds: float | None = None
    cuda_only: bool = False


BENCHMARKS: Mapping[str, Benchmark] = {
    "projection": Benchmark(
        projection.pairs, "K and V of all layers for a batch of prompts in training: edited against plain"
    ),
    "projection_sampling": Benchmark(
        projection.sampling_pairs, "the same over the steps of one sampling, where they are computed once"
    ),
    "train_step": Benchmark(
        train_step.pairs, "a whole training step against frozen forward and gradients of activations alone", 1.05
    ),
    "sampling_1": Benchmark(sampling.pairs, "a whole call of the pipeline: one concept against none", 1.00),
    "sampling_8": Benchmark(
        partial(sampling.pairs, concepts=8), "the same with eight concepts attached, two of them in the prompt", 1.00
    ),
    "sampling_16_betas": Benchmark(
        partial(sampling.pairs, pictures=16),
        "the same with 16 pictures in a batch, each with a strength of its own",
        1.00,
    ),
    "attach_first": Benchmark(
        partial(attach.pairs, anew=True),
        "attaching a concept to a model that was just loaded, and detaching it, against encoding its superclass alone",
        seconds=0.2,
    ),
    "attach": Benchmark(attach.pairs, "the same where a concept of this superclass has been before", seconds=0.2),
    "train_memory": Benchmark(
        memory.amounts, "what a training step keeps for the backward pass against what it has to keep", 1.05
    ),
    "train_memory_checkpointing": Benchmark(memory.checkpointing, "the same with gradient checkpointing", 1.05),
    "train_peak": Benchmark(
        train_sd15.peak,
        "the most memory that is allocated in training steps on 16 pictures of 512 x 512 (`_bf16`: under autocast)",
        1.05,
        cuda_only=True,
    ),
    "train_peak_checkpointing": Benchmark(
        partial(train_sd15.peak, checkpointing=True), "the same with gradient checkpointing", 1.05, cuda_only=True
    ),
    "train_400": Benchmark(train_sd15.run, "400 such steps under autocast to bfloat16", seconds=60, cuda_only=True),
    "train_400_checkpointing": Benchmark(
        partial(train_sd15.run, checkpointing=True), "the same with gradient checkpointing", seconds=60, cuda_only=True
    ),
}
