"""The training's progress bar: loss, seconds per step, time left."""

from __future__ import annotations

import sys
from typing import Any

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import TQDMProgressBar
from lightning.pytorch.callbacks.progress.tqdm_progress import Tqdm

from perfusion.bars import LinesInAFile


class _TrainingBar(LinesInAFile, Tqdm):
    pass


class StepProgress(TQDMProgressBar):
    """Lightning's bar, counting the optimizer steps of the whole run."""

    BAR_FORMAT = "{desc}{percentage:3.0f}%|{bar}| {n_fmt}/{total_fmt} steps, {rate_inv_fmt}, {remaining} left{postfix}"

    def init_train_tqdm(self) -> Tqdm:
        return _TrainingBar(
            desc="Training: ", unit="step", disable=self.is_disabled, dynamic_ncols=True, file=sys.stdout, smoothing=0,
            bar_format=self.BAR_FORMAT,
        )  # fmt: skip

    def init_validation_tqdm(self) -> Tqdm:
        return Tqdm(disable=True)

    def on_train_epoch_start(self, trainer: Trainer, *_: Any) -> None:
        bar = self.train_progress_bar
        bar.reset(total=trainer.max_steps * trainer.accumulate_grad_batches)
        # A resumed run starts at its step: the steps before it took no time of this process.
        bar.initial = bar.n = trainer.fit_loop.epoch_loop.batch_progress.current.ready

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Close the bar of a run that was stopped, or it would be printed again whenever Python collects it."""
        if self._train_progress_bar is not None:
            self._train_progress_bar.close()

    def get_metrics(
        self, trainer: Trainer, pl_module: LightningModule
    ) -> dict[str, int | str | float | dict[str, float]]:
        metrics = super().get_metrics(trainer, pl_module)
        metrics.pop("v_num", None)
        return metrics
