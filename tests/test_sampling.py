"""A picture belongs to its prompt and seed, whatever is drawn beside it."""

import functools

import numpy as np
import pytest
import torch
from diffusers import StableDiffusionPipeline

from perfusion.drawing import SamplingError, sample
from tests.drawing import batch_sizes
from tests.pipelines import toyland_pipeline

PROMPTS = ["a photo of a cat on the beach", "a sketch of a dog", "a mug at night", "a red car"]
SEEDS = [7, 2**40, -3, 7]
STEPS = 2


@functools.cache
def shared_pipe() -> StableDiffusionPipeline:
    return toyland_pipeline()


@pytest.fixture
def pipe() -> StableDiffusionPipeline:
    return shared_pipe()


@pytest.fixture
def calls(pipe):
    with batch_sizes(pipe) as sizes:
        yield sizes


@functools.cache
def drawn_one_by_one() -> list[bytes]:
    return [sample(shared_pipe(), [p], [s], STEPS)[0].tobytes() for p, s in zip(PROMPTS, SEEDS, strict=True)]


def test_the_image_of_a_seed_is_the_same_in_any_batch_and_touches_no_other_generator(pipe):
    before = torch.get_rng_state()
    images = sample(pipe, PROMPTS, SEEDS, STEPS, batch_size=3)
    assert torch.equal(torch.get_rng_state(), before)
    assert [image.tobytes() for image in images] == drawn_one_by_one()


def test_prompts_and_seeds_make_the_image():
    assert len(set(drawn_one_by_one())) == len(PROMPTS)
    again = sample(shared_pipe(), [PROMPTS[0]] * 2, [SEEDS[0], SEEDS[0] + 1], STEPS)
    assert again[0].tobytes() == drawn_one_by_one()[0] != again[1].tobytes()


def test_a_cpu_takes_batches_only_if_it_need_not_be_exact(pipe, calls):
    sample(pipe, PROMPTS, SEEDS, STEPS, guidance=1.0, batch_size=3)
    assert calls == [1] * STEPS * len(PROMPTS)
    calls.clear()
    images = sample(pipe, PROMPTS, SEEDS, STEPS, guidance=1.0, batch_size=3, exact=False)
    assert calls == [3] * STEPS + [1] * STEPS
    exact = sample(pipe, PROMPTS, SEEDS, STEPS, guidance=1.0)  # the same but for rounding
    for image, same in zip(images, exact, strict=True):
        difference = np.abs(np.asarray(image, dtype=int) - np.asarray(same, dtype=int))
        assert difference.max() <= 1 and difference.mean() < 0.01


def test_size(pipe):
    assert sample(pipe, PROMPTS[:1], [0], 1)[0].size == (64, 64)
    assert sample(pipe, PROMPTS[:1], [0], 1, size=48)[0].size == (48, 48)


def test_progress_counts_every_step_and_the_pipelines_own_bar_is_put_back(pipe, capsys):
    own = dict(pipe._progress_bar_config)
    sample(pipe, PROMPTS[:3], SEEDS[:3], STEPS, progress=True)
    shown = capsys.readouterr().err
    assert f"Sampling: 100%|██████████| {3 * STEPS}/{3 * STEPS}" in shown
    assert pipe._progress_bar_config == own
    sample(pipe, PROMPTS[:1], SEEDS[:1], STEPS)
    assert capsys.readouterr().err == ""


def test_a_picture_of_nan_is_an_error_and_no_black_picture(pipe):
    hook = pipe.unet.register_forward_hook(lambda unet, args, out: (out[0] * torch.nan,))
    try:
        with pytest.raises(SamplingError, match="a picture became NaN or infinite, drawn in float32"):
            sample(pipe, PROMPTS[:1], SEEDS[:1], STEPS)
    finally:
        hook.remove()
