"""200 trainings and 2,000 pictures in one process leave nothing behind: no memory, open file, thread or hook."""

from __future__ import annotations

import ctypes
import functools
import gc
import math
import os
import random
import shlex
import shutil
import threading
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from perfusion import train
from perfusion.cli import run_cli
from perfusion.concept import Concept
from perfusion.generate import GenerateConfig, generate
from tests.concepts import Snapshot
from tests.pipelines import tiny_pipeline, tiny_pipeline_folder

TRAININGS, PICTURES = 200, 2000
METHODS = ["perfusion", "textual_inversion", "dreambooth", "custom_diffusion", "lora"]
WARM_UP = 0.2  # of either, before the first look: caches fill, allocators take what they need
GROWTH = 30  # megabytes that either may grow by afterwards, 1 % of the process or so; a leaked pipeline has 5


class Held:
    """What this process holds."""

    def __init__(self) -> None:
        gc.collect()
        ctypes.CDLL(None).malloc_trim(0)  # what is free, but kept for the next allocation
        pages = int(Path("/proc/self/statm").read_text().split()[1])
        self.megabytes = pages * os.sysconf("SC_PAGE_SIZE") / 1e6
        self.files, self.threads = len(os.listdir("/proc/self/fd")), threading.active_count()
        self.tensors = sum(isinstance(thing, torch.Tensor) for thing in gc.get_objects())

    def more_than(self, other: Held) -> dict[str, float]:
        return {key: round(value - getattr(other, key), 1) for key, value in vars(self).items()}


def soak(step: Callable[[int], object], count: int, of: str, each: int, record_property: Callable[..., None]) -> None:
    """Take `count` steps, of `each` things, and hold that the process has no more after them than after the first."""
    before = None
    for k in range(count):
        step(k)
        if k + 1 == int(WARM_UP * count):
            before = Held()
    assert before is not None
    record_property(of, each * count)
    grown = Held().more_than(before)
    for key, value in grown.items():
        record_property(f"{of}, more {key}", value)
    assert grown["megabytes"] <= GROWTH and all(grown[key] <= 0 for key in ("files", "threads", "tensors")), grown


@pytest.fixture
def words(here: Path) -> str:
    """A command line of a training that takes a second."""
    return (
        f"backbone=sd15 backbone.path={tiny_pipeline_folder(here)} backbone.device=cpu backbone.resolution=64 "
        f"backbone.steps=1 backbone.covariance.count=60 backbone.covariance.cache={here}/covariance "
        f"concept.toyland.count=2 concept.prior_cache={here}/prior callbacks=none method.steps=2 method.batch_size=2 "
        "trainer.enable_progress_bar=false run.dir=run "
    )


def trained(words: str) -> Path:
    assert run_cli(train.main, shlex.split(words)) == 0
    return Path("run/concept.safetensors")


@pytest.mark.trust
@pytest.mark.timeout(3600)
def test_trainings(words: str, record_property: Callable[..., None]) -> None:
    def train_one(k: int) -> None:
        method = METHODS[k % len(METHODS)]
        prior = "method.prior_images=2 method.prior_steps=1" if method in ("dreambooth", "custom_diffusion") else ""
        trained(f"{words} method={method} seed={k} {prior}")
        shutil.rmtree("run")

    soak(train_one, TRAININGS, "trainings", 1, record_property)


@pytest.mark.trust
@pytest.mark.timeout(3600)
def test_pictures(words: str, record_property: Callable[..., None]) -> None:
    """Eight in a call, the concept attached anew for each four calls, at many strengths, β = ∞ among them."""
    concept, pipe, draw = Concept.load(trained(f"{words} method=perfusion")), tiny_pipeline(), random.Random(0)
    call = functools.partial(pipe, num_inference_steps=1, output_type="latent")
    call(["a cat"] * 8)  # transformers hooks its own layers at the first call
    before = Snapshot(pipe)

    def draw_some(k: int) -> None:
        with concept.attach(pipe) as attached:
            for _ in range(4):
                attached.beta = draw.choice([0.4, [0.5] * 8, math.inf, [math.inf] * 4 + [0.6] * 4])
                attached.key_lock = draw.choice(["local", "global"])
                call(["a photo of a <cat*>"] * 8)
        assert before.differences() == []

    soak(draw_some, -(-PICTURES // 32), "pictures", 32, record_property)


@pytest.mark.trust
@pytest.mark.timeout(1800)
def test_calls_of_generate(words: str, here: Path, record_property: Callable[..., None]) -> None:
    """The command's own way: models are loaded, files read, pictures written."""
    concept, path = trained(f"{words} method=perfusion"), str(here / "pipeline")

    def call(k: int) -> None:
        generate(GenerateConfig(str(concept), ["a <cat*>"], path=path, device="cpu", num=2, steps=1, out=f"{k}"))

    soak(call, 40, "calls of generate", 1, record_property)
