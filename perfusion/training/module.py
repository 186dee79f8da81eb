"""The training step, a method's loss on a frozen backbone, watched for NaN; and the validation step, which draws."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from lightning.pytorch import LightningModule
from PIL.Image import Image
from torch import Tensor

from perfusion.backbones.base import Backbone
from perfusion.methods.base import Batch, Method

if TYPE_CHECKING:  # scorers take seconds to import, and not every run has one
    from perfusion.training.validation import Validation


class TrainingError(ValueError):
    """A training that cannot go on; says at which step and on which pictures."""


class PersonalizationModule(LightningModule):
    """Trains an attached method. Nothing here depends on which method or backbone it is.

    The backbone is no torch module, so Lightning neither moves it nor saves it: a checkpoint holds the method alone.

    Args:
        method: attached to `backbone`.
        backbone: frozen.

    Attributes:
        validation: what is drawn and scored, from the callback that has the training validated.
        drawn: the pictures of the last validation, in the first process alone.
        scores: their scores, in every process.
    """

    def __init__(self, method: Method, backbone: Backbone) -> None:
        super().__init__()
        self.method = method
        self.backbone = backbone
        self.validation: Validation | None = None
        self.drawn: list[Image] = []
        self.scores: dict[str, float] = {}

    def training_step(self, batch: tuple[Batch, list[str]], batch_idx: int) -> Tensor:
        """The sum of the method's loss terms, a scalar; the second part of the batch names its pictures.

        Raises:
            TrainingError: the loss is NaN or infinite.
        """
        content, names = batch
        step = self.global_step + 1
        terms = self.method.loss(self.backbone, content)
        loss = torch.stack(list(terms.values())).sum()
        finite = torch.isfinite(loss)
        if self.trainer.world_size > 1:  # all processes stop, or none: one alone would wait for the others forever
            everywhere = self.trainer.strategy.reduce(finite.float(), reduce_op="mean") == 1
            if finite and not everywhere:
                raise TrainingError(f"step {step}: the loss is not finite in another process, which says more")
        if not finite:
            found = ", ".join(f"{name} {value.item()}" for name, value in terms.items())
            raise TrainingError(
                f"step {step}: the loss is not finite ({found}) on the pictures {', '.join(dict.fromkeys(names))}. "
                "Lower learning rates (method.*_rate=) or trainer.precision=32 may help."
            )
        self.log("loss", loss, prog_bar=True, batch_size=len(names), sync_dist=True)
        if len(terms) > 1:
            each = {f"loss/{name}": value for name, value in terms.items()}
            self.log_dict(each, batch_size=len(names), sync_dist=True)
        self.log("step", float(step), batch_size=len(names))  # makes loggers count optimizer steps from 1
        return loss

    def on_validation_epoch_start(self) -> None:
        self.drawn = []

    def validation_step(self, batch: Tensor, batch_idx: int) -> None:
        """Draw the validation prompts of these numbers, in eval mode; one process does it for all."""
        if self.trainer.is_global_zero:
            assert self.validation is not None
            self.drawn += self.validation.draw(self.backbone, batch.tolist())

    def on_validation_epoch_end(self) -> None:
        """Score what was drawn and tell all processes, which so choose alike."""
        assert self.validation is not None
        scores = self.validation.scores(self.drawn) if self.trainer.is_global_zero else {}
        self.scores = self.trainer.strategy.broadcast(scores)
        self.log_dict({**self.scores, "step": float(self.global_step)})

    def on_validation_model_train(self) -> None:
        self.train()  # Lightning would set flags alone, and a method's `train` does more

    def configure_optimizers(self) -> torch.optim.AdamW:
        """AdamW over the method's groups, each with its own rate.

        Raises:
            TrainingError: several processes train, and a parameter is not the method's own: nobody would average its
                gradients.
        """
        groups = self.method.parameter_groups()
        own = {id(parameter) for parameter in self.parameters()}
        if self.trainer.world_size > 1 and not all(id(p) in own for group in groups for p in group["params"]):
            raise TrainingError(
                f"trainer.devices={self.trainer.world_size}: {type(self.method).__name__} trains parameters that it "
                "has not registered as its own, expected trainer.devices=1"
            )
        return torch.optim.AdamW(groups)
