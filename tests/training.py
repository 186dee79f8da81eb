"""Trainings in seconds, by the command and without it, and how they are stopped."""

import atexit
import functools
import os
import shlex
import shutil
import signal
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from lightning.pytorch import Callback, Trainer
from PIL import Image
from torch import Tensor

from perfusion import train
from perfusion.backbones.base import Backbone
from perfusion.cli import run_cli
from perfusion.config import TrainConfig
from perfusion.data.images import Examples
from perfusion.methods.base import Word, build
from perfusion.toyland.draw import render
from perfusion.toyland.world import concept_scene, sample_instance
from perfusion.training import composition
from perfusion.training import trainer as trainers
from perfusion.training.checkpoint import newest_readable, step_of
from perfusion.training.module import ConceptData, PersonalizationModule
from perfusion.training.run_folder import RunFolder
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


def run_stopped(step: int, *words: str, number: int = signal.SIGTERM) -> int:
    """The command's status; the process is sent a signal before the step after `step`."""
    whole = PersonalizationModule.training_step

    def training_step(self: PersonalizationModule, *args: Any) -> Any:
        if self.global_step == step:
            os.kill(os.getpid(), number)
        return whole(self, *args)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(PersonalizationModule, "training_step", training_step)
        return run(*words)


def composed(*words: str) -> TrainConfig:
    """The config that a command line describes."""
    configs: list[TrainConfig] = []
    composition.run(words, configs.append)
    (config,) = configs
    return config


class Stop(Callback):
    """Raises after a step, as a crash would; and notes the rates."""

    def __init__(self, step: int | None = None) -> None:
        self.step, self.rates = step, []

    def on_train_batch_start(self, trainer: Trainer, *_: Any) -> None:
        self.rates.append([group["lr"] for group in trainer.optimizers[0].param_groups])

    def on_train_batch_end(self, trainer: Trainer, *_: Any) -> None:
        if trainer.global_step == self.step:
            raise RuntimeError("crash")


def fit(
    folder: Path,
    backbone: Backbone,
    examples: Examples,
    options: dict[str, Any],
    stop: Stop | None = None,
    every: int = 1,
    seed: int = 0,
    keywords: dict[str, Any] | None = None,
    **data: Any,
) -> dict[str, Tensor]:
    """Train `<cat*>` without the command, from scratch or from what lies in `folder`; the concept's tensors at the end.

    Args:
        options: of the method, which is Perfusion if they name no other.
        every: steps between two checkpoints.
        keywords: of the trainer.
        data: further arguments of `ConceptData`.
    """
    trainers.quieten()
    method = build({"name": "perfusion", **options}, Word("<cat*>", "cat"))
    method.attach(backbone)
    try:
        checkpoint = newest_readable(folder / "checkpoints")
        config = TrainConfig(
            trainer={"enable_progress_bar": False, "log_every_n_steps": 1, **(keywords or {})},
            callbacks={"checkpoint": {"_target_": "perfusion.training.checkpoint.Checkpoints", "every": every}},
        )
        steps, resumed = method.options.steps, step_of(checkpoint) if checkpoint else 0
        trainer = trainers.build(config, RunFolder(folder), steps, backbone.device, resumed)
        trainer.callbacks.append(stop or Stop())  # type: ignore[attr-defined]
        batches = ConceptData(examples, backbone, method.options, "<cat*>", seed, **data)
        trainer.fit(PersonalizationModule(method, backbone), datamodule=batches, ckpt_path=checkpoint)
        assert trainers.results(trainer) == {"step_kept": steps, "scores": {}}
        return method.state()
    finally:
        method.detach()


def same(one: Mapping[str, Tensor], other: Mapping[str, Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)
