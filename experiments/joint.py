"""Custom Diffusion of several concepts at once, as its paper trains those that shall be drawn together.

Each concept has a word of its own, and all have the projections in common. Their steps take turns, so that a concept
has as many as if it were trained alone, and the projections have those of all. What each leaves is an ordinary run,
whose concept can also be drawn alone; its config trained anew gives one that was trained apart.
"""

from __future__ import annotations

import dataclasses
import itertools
import time
from collections.abc import Sequence
from contextlib import ExitStack
from typing import Any

import torch
from lightning.fabric import Fabric
from lightning.pytorch import seed_everything

from experiments.settings import snapshot_file, step_of
from perfusion.backbones import backbone_class
from perfusion.backbones.base import Backbone
from perfusion.concept import Concept, save_concept
from perfusion.config import TrainConfig
from perfusion.data.captions import own_prompts
from perfusion.methods.base import Word, build
from perfusion.methods.custom_diffusion import CustomDiffusion
from perfusion.training.devices import device_of
from perfusion.training.inputs import inputs_of
from perfusion.training.module import ConceptData, StepBatches, TrainingError, examples_of
from perfusion.training.prior import prior_of
from perfusion.training.run_folder import RunFolder
from perfusion.training.trainer import quieten


class Beside(CustomDiffusion):
    """A concept that is trained with the projections of another one, which is attached."""

    host: CustomDiffusion

    def put(self, backbone: Backbone, undo: ExitStack) -> None:
        """Add the word alone."""
        self.add_modifier(undo)
        self.shared = self.host.shared
        self.weights.extend(self.host.weights)

    def parameter_groups(self) -> list[dict[str, Any]]:
        """Without the projections, which are among the other's."""
        return [group for group in super().parameter_groups() if group["name"] != "projections"]


def train_together(configs: Sequence[TrainConfig]) -> None:
    """Train a concept for each config, all by Custom Diffusion with the same options, on the model of the first.

    Of the trainer's options the precision and `accumulate_grad_batches` count. A training that was stopped begins anew.

    Raises:
        TrainingError: the loss is NaN or infinite; and what `perfusion.train` raises.
    """
    first = configs[0]
    folders = [RunFolder.of(config) for config in configs]
    quieten()
    device = device_of(first, 0)
    backbone = backbone_class(first.backbone.name).load(dataclasses.replace(first.backbone, device=device))
    methods = [_built(config, CustomDiffusion if config is first else Beside) for config in configs]
    data = [_data(config, method, backbone) for config, method in zip(configs, methods, strict=True)]
    for folder, config, method in zip(folders, configs, methods, strict=True):
        folder.begin(config, inputs_of(config, method))
    seed_everything(first.seed, verbose=False)
    with ExitStack() as undo:
        for method in methods:
            if isinstance(method, Beside):
                method.host = methods[0]
            undo.callback(method.detach)
            method.attach(backbone)
        started = time.monotonic()
        for one in data:
            one.setup("fit")
        _fit(first, folders, methods, data, backbone)
        seconds = {"training": (time.monotonic() - started) / len(configs)}  # of all of it, a share for each
        for folder, method in zip(folders, methods, strict=True):
            save_concept(folder.concept, Concept.of(method, backbone, first.seed))
    for folder in folders:
        folder.finish({"steps": methods[0].options.steps, "seconds": seconds, "trained_with": [*map(str, folders)]})


def _built(config: TrainConfig, kind: type[CustomDiffusion]) -> CustomDiffusion:
    checked = build(config.method, Word(config.concept.placeholder, config.concept.superclass))
    assert isinstance(checked, CustomDiffusion)
    return kind(checked.options, checked.word)


def _data(config: TrainConfig, method: CustomDiffusion, backbone: Backbone) -> ConceptData:
    concept, options = config.concept, method.options
    examples = examples_of(concept, config.backbone.resolution)
    prompts = own_prompts(concept, config.backbone.prompts, options.prompt)
    prior = prior_of(concept, options, progress=False)(backbone)
    return ConceptData(examples, backbone, options, concept.placeholder, config.seed, prior, prompts, concept.mirror)


def _fit(
    config: TrainConfig,
    folders: Sequence[RunFolder],
    methods: Sequence[CustomDiffusion],
    data: Sequence[ConceptData],
    backbone: Backbone,
) -> None:
    """All steps, and the concepts as they are after the shares of them that the config names."""
    options, snapshots = methods[0].options, config.callbacks.get("snapshots", {})
    kept = {step_of(share, options.steps) for share in snapshots.get("shares", ())}
    fabric = Fabric(accelerator=backbone.device.type, devices=1, precision=config.trainer.get("precision"))
    groups: list[dict[str, Any]] = [group for method in methods for group in method.parameter_groups()]
    own = torch.optim.AdamW(groups)
    schedule = torch.optim.lr_scheduler.LambdaLR(own, options.rate_factor)
    optimizer: Any = fabric.setup_optimizers(own)
    parts = config.trainer.get("accumulate_grad_batches") or 1
    batches = [iter(StepBatches(one, 0, 1, parts)) for one in data]
    for step in range(1, options.steps + 1):
        for method, of_concept in zip(methods, batches, strict=True):
            optimizer.zero_grad()
            for batch, names in itertools.islice(of_concept, parts):
                with fabric.autocast():
                    loss = torch.stack([*method.loss(backbone, batch).values()]).sum()
                if not torch.isfinite(loss):
                    raise TrainingError(f"step {step}: the loss is not finite on the pictures {', '.join({*names})}")
                fabric.backward(loss / parts)
            optimizer.step()
        schedule.step()
        if step in kept:
            for folder, method in zip(folders, methods, strict=True):
                save_concept(snapshot_file(folder.path, step), Concept.of(method, backbone, config.seed))
