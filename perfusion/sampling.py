"""Pictures from a pipeline, one seed each: a picture does not depend on those that are drawn beside it."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from diffusers import DiffusionPipeline
from PIL import Image
from tqdm import tqdm

_SEEDS = range(-(2**63), 2**64)  # what torch.Generator takes


class SamplingError(ValueError):
    """A request for pictures that no pipeline can follow."""


def sample(
    pipe: DiffusionPipeline,
    prompts: Sequence[str],
    seeds: Sequence[int],
    steps: int = 50,
    guidance: float = 6.0,
    batch_size: int = 8,
    progress: bool = False,
    *,
    size: int | None = None,
    exact: bool = True,
) -> list[Image.Image]:
    """One picture per prompt and seed, in their order.

    Each picture has a generator of its own, so it is the one of the stock call
    `pipe(prompt, generator=torch.Generator().manual_seed(seed))`, whatever stands beside it in a batch. Kernels round
    differently for every batch shape, though, which would turn a pixel by one level now and then. So a CPU, where
    batches gain least, denoises one picture at a time, and the same seed gives the same bytes. On other devices
    pictures of different batch sizes agree up to that rounding; `batch_size=1` is exact there, too.

    Args:
        pipe: any stock text-to-image pipeline, with or without a concept attached. It is left as it was.
        prompts: n prompts.
        seeds: n seeds.
        steps: denoising steps.
        guidance: classifier-free guidance; 1 switches it off.
        batch_size: pictures in one call of the denoiser.
        progress: show a progress bar that counts denoising steps, of all pictures.
        size: height and width in pixels; default: the pipeline's own.
        exact: False lets a CPU take whole batches: about twice as fast for small models.

    Returns:
        n RGB pictures.

    Raises:
        SamplingError: steps or batch size below 1, more steps than the schedule has, a seed beyond 64 bits.
    """
    return list(stream(pipe, prompts, seeds, steps, guidance, batch_size, progress, size=size, exact=exact))


def stream(
    pipe: DiffusionPipeline,
    prompts: Sequence[str],
    seeds: Sequence[int],
    steps: int = 50,
    guidance: float = 6.0,
    batch_size: int = 8,
    progress: bool = False,
    *,
    size: int | None = None,
    exact: bool = True,
    prepare: Callable[[slice], None] | None = None,
) -> Iterator[Image.Image]:
    """What `sample` gives, each picture as soon as its batch is drawn, so that it can be saved before the next.

    `prepare` is called before each batch, with the place of its pictures among all.
    """
    assert len(prompts) == len(seeds), f"{len(prompts)} prompts, {len(seeds)} seeds"
    _check(pipe, seeds, steps, batch_size)
    if exact and pipe.device.type == "cpu":
        batch_size = 1
    settings: dict[str, Any] = {"num_inference_steps": steps, "guidance_scale": guidance}
    if size is not None:
        settings |= {"height": size, "width": size}
    bar = tqdm(total=len(prompts) * steps, desc="Sampling", unit="step", disable=not progress)
    return _stream(pipe, prompts, seeds, batch_size, settings, bar, prepare or (lambda batch: None))


def _stream(
    pipe: Any,
    prompts: Sequence[str],
    seeds: Sequence[int],
    batch_size: int,
    settings: dict[str, Any],
    bar: tqdm,
    prepare: Callable[[slice], None],
) -> Iterator[Image.Image]:
    with bar:
        for start in range(0, len(prompts), batch_size):
            batch = slice(start, start + batch_size)
            prepare(batch)
            own_bar = getattr(pipe, "_progress_bar_config", {})
            pipe.set_progress_bar_config(disable=True)
            try:
                images = pipe(
                    prompt=list(prompts[batch]),
                    generator=[torch.Generator().manual_seed(seed) for seed in seeds[batch]],
                    callback_on_step_end=_counting(bar, len(prompts), len(prompts[batch])),
                    **settings,
                ).images
            finally:
                pipe.set_progress_bar_config(**own_bar)
            yield from images


def _check(pipe: DiffusionPipeline, seeds: Sequence[int], steps: int, batch_size: int) -> None:
    if batch_size < 1:
        raise SamplingError(f"batch size: found {batch_size}, expected at least 1")
    trained = pipe.scheduler.config.num_train_timesteps
    if not 1 <= steps <= trained:
        raise SamplingError(f"steps: found {steps}, expected 1 to {trained}, as many as in training")
    if beyond := [seed for seed in seeds if seed not in _SEEDS]:
        raise SamplingError(f"seed: found {beyond[0]}, expected {_SEEDS.start} to {_SEEDS.stop - 1}")


def _counting(bar: tqdm, pictures: int, at_once: int) -> Any:
    """A callback that counts a step for each picture of the batch."""

    def count(pipe: Any, step: int, timestep: int, tensors: dict[str, Any]) -> dict[str, Any]:
        bar.total = pictures * pipe.num_timesteps  # some schedulers take one step more than asked for
        bar.update(at_once)
        return tensors

    return count
