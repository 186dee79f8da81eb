"""What Lightning trains: batches of the concept's latents, which are computed once, and the step, a method's loss on a
frozen backbone, watched for NaN; and the validation step, which draws.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from lightning.pytorch import LightningDataModule, LightningModule
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader

from perfusion.backbones.base import Backbone
from perfusion.config import ConceptConfig, ConfigError
from perfusion.data import clipseg
from perfusion.data.captions import TrainingPrompts
from perfusion.data.dataset import Draw, StepDataset, seed_of
from perfusion.data.images import Examples, find_images, load_examples
from perfusion.data.masks import mask_to_latent, masks_of_files
from perfusion.data.prompts import fill, templates
from perfusion.methods.base import Batch, Method, MethodOptions
from perfusion.training.drawn import drawn_examples
from perfusion.training.prior import PriorImages

if TYPE_CHECKING:  # scorers take seconds to import, and not every run has one
    from perfusion.training.selection import SelectBestStep

_ENCODED_AT_ONCE = 8 * 512 * 512  # pixels in one call of the autoencoder; at least one picture


class TrainingError(ValueError):
    """A training that cannot go on; says at which step and on which pictures."""


def examples_of(concept: ConceptConfig, resolution: int) -> Examples:
    """The concept's pictures at R = `resolution` pixels: the person's, or drawn by Toyland if there are none.

    Raises:
        ConceptImageError: anything that is wrong with the person's files, or CLIPSeg shall draw masks and cannot.
        ConfigError: masks without images; a superclass that Toyland cannot draw.
    """
    if concept.images is not None:
        paths, mask_of = find_images(concept.images), None
        if concept.masks == clipseg.SPEC:
            mask_of = clipseg.ClipSeg(concept.clipseg, concept.superclass, Path(concept.masks_cache).expanduser())
        elif concept.masks is not None:
            mask_of = masks_of_files(concept.masks, paths)
        return load_examples(paths, resolution, mask_of)
    if concept.masks is not None:
        raise ConfigError(f"concept.masks={concept.masks!r}: masks of what? concept.images is not given")
    return drawn_examples(concept, resolution)


class ConceptData(LightningDataModule):
    """Batches of `(Batch, names of their pictures)` on the backbone's device, the whole training as one epoch.

    Every draw is a function of (seed, step, slot), and a loader that is made during a resumed run starts at the
    trainer's step, so a resumed training sees what one that never stopped would see. `trainer.devices=n` processes
    share a step's batch evenly, and with `trainer.accumulate_grad_batches=k` each takes its share in k parts: the mean
    of their gradients is that of the whole batch, for every sample weighs the same.

    Args:
        examples: the n pictures.
        backbone: encodes them, once, in `setup`.
        options: `steps` and `batch_size`.
        placeholder: stands in the training prompts.
        seed: of the run.
        prior: pictures of the superclass, of which every step takes as many as of the concept; their draws are their
            own, so those of the concept are the same with and without them.
        prompts: that the pictures are trained with; default: those of the set `backbone.config.prompts`.
        mirror: half of the samples are mirrored, picture and mask, as the draw says.

    Raises:
        PromptError: no such set of prompts.
    """

    def __init__(
        self,
        examples: Examples,
        backbone: Backbone,
        options: MethodOptions,
        placeholder: str,
        seed: int,
        prior: PriorImages | None = None,
        prompts: TrainingPrompts | None = None,
        mirror: bool = False,
    ) -> None:
        super().__init__()
        self.examples = examples
        self.backbone = backbone
        self.batch_size = options.batch_size
        self.placeholder, self.own_prompts, self.mirror = placeholder, [] if prompts is None else prompts.own, mirror

        def draws(n_images: int, prompts: Sequence[str], seed: int, **more: Any) -> StepDataset:
            shape, timesteps = backbone.latent_shape(), backbone.train_timesteps
            return StepDataset(n_images, prompts, shape, options.steps, options.batch_size, seed, timesteps, **more)

        if prompts is None:
            prompts = TrainingPrompts([fill(template, placeholder) for template in templates(backbone.config.prompts)])
        self.dataset = draws(len(examples), prompts.drawn, seed, captions=prompts.captions, mirror=mirror)
        self.prior = prior
        self.prior_dataset = None if prior is None else draws(len(prior), prior.prompts, seed_of("prior", seed))

    def setup(self, stage: str) -> None:
        """Encode all pictures.

        Raises:
            ConceptImageError, TokenError: a picture of the superclass cannot be read, or a caption is too long.
        """
        with torch.no_grad():
            for prompt in self.own_prompts:
                self.backbone.encode([prompt], self.placeholder)
        pixels, masks = self.examples.pixels, self.examples.masks  # (n, 3, R, R), (n, 1, R, R)
        if self.mirror:  # behind the n pictures their mirror images: an autoencoder's latents are not mirrored so well
            pixels = torch.cat([pixels, pixels.flip(-1)])
            masks = None if masks is None else torch.cat([masks, masks.flip(-1)])
        side = pixels.shape[-1]
        at_once = max(1, _ENCODED_AT_ONCE // side**2)
        self.latents = self._encoded(pixels.split(at_once))  # (n, c, h, w)
        self.masks = None if masks is None else mask_to_latent(masks, self.latents.shape[-1]).to(self.latents.device)
        if prior := self.prior:
            with torch.no_grad():
                for prompt in dict.fromkeys(prior.prompts):
                    self.backbone.encode([prompt], None)
            starts = range(0, len(prior), at_once)
            self.prior_latents = self._encoded(prior.pixels(k, k + at_once, side) for k in starts)

    @torch.no_grad()
    def _encoded(self, parts: Iterable[Tensor]) -> Tensor:
        return torch.cat([self.backbone.latents(p.to(self.backbone.device, self.backbone.dtype)) for p in parts])

    def train_dataloader(self) -> StepBatches:
        trainer = self.trainer
        assert trainer is not None
        parts = trainer.accumulate_grad_batches
        return StepBatches(self, trainer.global_rank, trainer.world_size, parts, start=trainer.global_step)

    def val_dataloader(self) -> DataLoader[int] | list[Any]:
        """The numbers of the validation prompts, where the module has some."""
        assert self.trainer is not None
        validation: Any = self.trainer.lightning_module.validation
        if validation is None:
            return []
        numbers: Any = range(len(validation.prompts))
        return DataLoader(numbers, validation.batch_size)

    def transfer_batch_to_device(self, batch: Any, device: torch.device, dataloader_idx: int) -> Any:
        return batch  # made where the backbone is

    def batch(
        self, draws: Sequence[Draw], prior_draws: Sequence[Draw], step_prompts: Sequence[str] | None
    ) -> tuple[Batch, list[str]]:
        """One batch, and the names of its pictures; `step_prompts` as in `Batch`.

        Args:
            prior_draws: of the pictures of the superclass, as many; none where there are none.
        """
        batch = dataclasses.replace(_drawn_batch(draws, self.latents, self.masks), step_prompts=step_prompts)
        if self.prior is not None:
            captions = [self.prior.prompts[draw["index"]] for draw in prior_draws]  # each picture's own
            prior = dataclasses.replace(_drawn_batch(prior_draws, self.prior_latents, None), prompts=captions)
            batch = dataclasses.replace(batch, prior=prior)
        return batch, [self.examples.names[draw["index"]] for draw in draws]


def _drawn_batch(draws: Sequence[Draw], latents: Tensor, masks: Tensor | None) -> Batch:
    """What was drawn of the pictures with these latents (n, c, h, w) and masks (n, 1, h, w); of 2n, the second n are
    the mirrored ones."""
    mirrored = len(latents) // 2
    index = torch.tensor([draw["index"] + mirrored * draw["mirrored"] for draw in draws], device=latents.device)
    return Batch(
        latents=latents[index],
        masks=None if masks is None else masks[index],
        prompts=[draw["prompt"] for draw in draws],
        noise=torch.stack([draw["noise"] for draw in draws]).to(latents),
        timesteps=torch.tensor([draw["timestep"] for draw in draws], device=latents.device),
    )


def part_size(batch_size: int, devices: int, parts: int) -> int:
    """Samples of a step that one of `devices` processes sees in one of `parts` parts.

    Raises:
        ConfigError: the batch cannot be divided so.
    """
    for key, count in (("accumulate_grad_batches", parts), ("devices", devices)):
        if batch_size % count:
            raise ConfigError(f"trainer.{key}={count}: expected a divisor of method.batch_size={batch_size}")
    if batch_size % (devices * parts):
        raise ConfigError(
            f"method.batch_size={batch_size}: expected a multiple of {devices * parts}, for trainer.devices={devices} "
            f"and trainer.accumulate_grad_batches={parts} divide it"
        )
    return batch_size // (devices * parts)


class StepBatches:
    """The ready batches that one process sees: of every step its share, in parts, from step `start` on.

    The length is that of the whole run, for Lightning counts batches from the run's start.
    """

    def __init__(self, data: ConceptData, rank: int, devices: int, parts: int, start: int = 0) -> None:
        self.data, self.parts, self.start = data, parts, start
        self.size = part_size(data.batch_size, devices, parts)
        self.offset = rank * parts * self.size
        self.whole = devices * parts == 1

    def __len__(self) -> int:
        return self.data.dataset.steps * self.parts

    def __iter__(self) -> Iterator[tuple[Batch, list[str]]]:
        dataset, prior = self.data.dataset, self.data.prior_dataset
        for j in range(self.start * self.parts, len(self)):
            step, part = divmod(j, self.parts)
            first = step * dataset.batch_size
            prompts = None if self.whole else []
            if part == 0 and not self.whole:
                prompts = [dataset.prompt(k) for k in range(first, first + dataset.batch_size)]
            start = first + self.offset + part * self.size
            slots = range(start, start + self.size)
            yield self.data.batch([dataset[k] for k in slots], [prior[k] for k in slots] if prior else [], prompts)


class PersonalizationModule(LightningModule):
    """Trains an attached method. Nothing here depends on which method or backbone it is.

    The backbone is no torch module, so Lightning neither moves it nor saves it: a checkpoint holds the method alone.

    Args:
        method: attached to `backbone`.
        backbone: frozen.
        run: what tells this run from others; its checkpoints say it, too.

    Attributes:
        validation: the callback that has the training validated, which draws and scores.
        drawn: the pictures of the last validation, in the first process alone.
        scores: their scores, in every process.
    """

    def __init__(self, method: Method, backbone: Backbone, run: str | None = None) -> None:
        super().__init__()
        self.method = method
        self.backbone = backbone
        self.run = run
        self.validation: SelectBestStep | None = None
        self.drawn: list[Image.Image] = []
        self.scores: dict[str, float] = {}

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        checkpoint["run"] = self.run

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Hold that a checkpoint is this run's; those of former versions do not say whose they are, but hold tensors.

        Raises:
            TrainingError: it is another run's.
        """
        here, there = (
            {k: v.shape for k, v in state.items()} for state in (self.state_dict(), checkpoint["state_dict"])
        )
        if here != there or checkpoint.get("run", self.run) != self.run:
            raise TrainingError(
                f"{self.trainer.ckpt_path}: expected a checkpoint of this run, found one of another method or config; "
                "remove it"
            )

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

    def configure_optimizers(self) -> Any:
        """AdamW over the method's groups, each with its own rate, and what changes them all where the options say so.

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
        optimizer, options = torch.optim.AdamW(groups), self.method.options
        optimizer.register_step_post_hook(lambda *_: self.method.after_step())
        if all(options.rate_factor(step) == 1 for step in range(options.steps)):
            return optimizer
        scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, options.rate_factor)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}
