"""Keeps a concept as it is in the middle of its training, for methods whose only dial is how long they were trained."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer

from experiments.settings import snapshot_file, step_of
from perfusion.concept import Concept, save_concept


class KeepSteps(Callback):
    """Writes `snapshots/step-<n>.safetensors` into the run's folder.

    Args:
        shares: of all steps, after which the concept is kept.
        seed: of the run, for the file.
    """

    def __init__(self, shares: Sequence[float], seed: int = 0) -> None:
        super().__init__()
        self.shares, self.seed = tuple(shares), seed

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *_: Any) -> None:
        step = trainer.global_step
        if trainer.is_global_zero and step in {step_of(share, trainer.max_steps) for share in self.shares}:
            module: Any = pl_module
            save_concept(
                snapshot_file(Path(trainer.default_root_dir), step),
                Concept.of(module.method, module.backbone, self.seed),
            )
