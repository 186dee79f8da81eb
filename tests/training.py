"""Trainings by the command, in seconds, and how they are stopped."""

import atexit
import functools
import os
import shlex
import shutil
import signal
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from perfusion import train
from perfusion.cli import run_cli
from perfusion.toyland.draw import render
from perfusion.toyland.world import concept_scene, sample_instance
from perfusion.training.module import PersonalizationModule
from tests.pipelines import tiny_pipeline_folder
from tests.scorers import make_scorer

STEPS = 5


@functools.cache
def given() -> Path:
    """A folder with a small `pipeline`; and `photos`, two of one toy, of different size and kind, with their `mask`."""
    folder = Path(tempfile.mkdtemp(prefix="perfusion-training-"))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    tiny_pipeline_folder(folder)
    (folder / "photos" / "mask").mkdir(parents=True)
    toy = sample_instance(np.random.default_rng(3), "cat")
    for k, (name, size) in enumerate([("a.jpg", (96, 80)), ("b.png", (50, 70))]):
        drawn = render(concept_scene(toy, k))
        Image.fromarray(drawn.image).resize(size).save(folder / "photos" / name)
        mask = (folder / "photos" / "mask" / name).with_suffix(".png")
        Image.fromarray(drawn.masks[0]).resize(size).save(mask)
    return folder


def command_line() -> list[str]:
    """Words that train on what is given in seconds."""
    return [
        f"backbone=sd15 backbone.path={given()}/pipeline backbone.device=cpu backbone.resolution=64 backbone.steps=2",
        f"backbone.covariance.count=100 backbone.covariance.cache={given()}/covariance",
        f"method=perfusion method.steps={STEPS} method.batch_size=2 callbacks=none callbacks.checkpoint.every=2",
        f"concept=photos concept.images={given()}/photos concept.masks={given()}/photos/mask",
        "concept.superclass='teddy bear' concept.placeholder='<bear*>'",
    ]


def validated(folder: Path) -> str:
    """Words that add samples and scores every two steps, by a small scorer in `folder`."""
    scorer = make_scorer(folder / "scorer")
    return f"callbacks=select callbacks.select.scorer={scorer} callbacks.select.every=2 callbacks.select.steps=1"


def run(*words: str) -> int:
    """The command's status."""
    return run_cli(train.main, shlex.split(" ".join(words)))


def stopped_at(step: int, number: int = signal.SIGTERM) -> Any:
    """A training step that has the process stopped before the one after `step`."""
    whole = PersonalizationModule.training_step

    def training_step(self: PersonalizationModule, *args: Any) -> Any:
        if self.global_step == step:
            os.kill(os.getpid(), number)
        return whole(self, *args)

    return training_step
