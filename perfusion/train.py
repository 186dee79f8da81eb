"""`python -m perfusion.train`: from a few pictures to a concept file. `--help` says how it is used."""

from __future__ import annotations

import contextlib
import dataclasses
import os
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Any

from perfusion.cli import OK, run_cli
from perfusion.config import ConfigError, TrainConfig, which_weights

# Hydra, torch and its friends take seconds to import: `--help` and a mistyped key do without them.
if TYPE_CHECKING:
    from PIL.Image import Image

    from perfusion.backbones.base import Backbone
    from perfusion.concept import Concept
    from perfusion.data.captions import TrainingPrompts
    from perfusion.data.images import Examples
    from perfusion.methods.base import Method
    from perfusion.training.prior import PriorImages
    from perfusion.training.run_folder import RunFolder


_PATIENCE = 3.0  # seconds


def main(argv: Sequence[str]) -> int | None:
    """Train what a command line describes; with `-m`, or with a folder of folders, all of it
    (`perfusion.training.sweep`)."""
    if [*argv] in (["--help"], ["-h"]):
        from perfusion.training import help

        print(help.text())
        raise SystemExit(OK)
    from perfusion.training import composition, sweep
    from perfusion.training.folders import each_folder

    signal.signal(signal.SIGTERM, _interrupt)
    argv = each_folder(argv)
    if sweep.asked_for(argv):
        return sweep.run(argv)
    return composition.run(argv, train)


def train(config: TrainConfig) -> RunFolder:
    """One run, from its config to its finished folder; goes on where a former process stopped.

    Raises:
        ConfigError, ConceptImageError, TokenError, BackboneError, CovarianceError: the config cannot be trained. Its
            pictures, masks, words, captions and matrix are checked before a model is loaded. Or another process trains
            in the run's folder, or that holds another run, one that has read other files, or what is no run's.
        TrainingError: the loss became NaN, or a checkpoint is another run's.
        KeyboardInterrupt: stopped; its message says how to go on.
    """
    started = time.monotonic()
    from perfusion.training.devices import join

    rank = join(config.trainer)  # of the processes that train together; files and words are the first one's
    from lightning.pytorch import seed_everything

    from perfusion.backbones import backbone_class
    from perfusion.concept import Concept, save_concept
    from perfusion.data.captions import own_prompts
    from perfusion.methods.base import Word, build
    from perfusion.provenance import provenance
    from perfusion.training.devices import device_count, device_of
    from perfusion.training.inputs import inputs_of
    from perfusion.training.module import examples_of, part_size
    from perfusion.training.prior import prior_of
    from perfusion.training.run_folder import RunFolder, peak_memory_bytes
    from perfusion.training.trainer import check_keywords, quieten

    word = Word(config.concept.placeholder, config.concept.superclass)
    method = build(config.method, word)
    for key in ("steps", "batch_size"):
        if getattr(method.options, key) < 1:
            raise ConfigError(f"method.{key}={getattr(method.options, key)}: expected at least 1")
    if not 0 <= config.seed < 2**32:
        raise ConfigError(f"seed={config.seed}: expected a whole number from 0 to {2**32 - 1}")
    check_keywords(config.trainer)
    told = _slurm_signal() if config.run.requeue else lambda: False
    part_size(
        method.options.batch_size, device_count(config.trainer), config.trainer.get("accumulate_grad_batches") or 1
    )
    device = device_of(config, rank)
    examples = examples_of(config.concept, config.backbone.resolution)
    prompts = own_prompts(config.concept, config.backbone.prompts, getattr(method.options, "prompt", None))
    kind = backbone_class(config.backbone.name)
    if kind.flows and method.options.min_snr_gamma is not None:
        found = f"{method.options.min_snr_gamma:g} with backbone {config.backbone.name}"
        raise ConfigError(f"method.min_snr_gamma: found {found}, which is trained by flow matching; expected null")
    kind.check_words(config.backbone, word.placeholder, word.superclass)
    if method.needs_covariance:
        kind.check_covariance(config.backbone)
    prior_for = prior_of(config.concept, method.options, config.trainer.get("enable_progress_bar", True))

    inputs = inputs_of(config, method)
    folder = RunFolder.of(config)
    folder.check_place()
    with contextlib.ExitStack() as held:
        if rank == 0 and (config.run.overwrite or folder.unsettled or not folder.finished):
            held.enter_context(folder.held())
            folder.settle()
        # What is finished stays until what replaces it is finished, too.
        replaces = (
            config.run.overwrite and folder.config.exists() and (folder.finished or not folder.holds(config, inputs))
        )
        place = folder.replacement if replaces else folder
        if replaces and rank == 0 and not place.holds(config, inputs):
            place.clear()
        place.check(config, inputs)
        if place.finished:
            folder.tidy()
            print(f"finished already: {folder.path} (run.overwrite=true trains it again)")
            return folder

        if replaces:
            print(f"{folder.path} stays as it is until the new run is finished")
        if config.concept.masks is not None and not method.masked and rank == 0:
            print("concept.masks: they do not count, since method.masked_loss is false")
        quieten()
        backbone = kind.load(dataclasses.replace(config.backbone, device=device))
        prior = prior_for(backbone)
        # For what a method starts from, and what a third party's callback may draw: training's own draws have other
        # seeds.
        seed_everything(config.seed, verbose=False)
        method.attach(backbone)
        try:
            if rank == 0:
                place.begin(config, inputs)
            try:
                metrics = _fit(config, place, method, backbone, examples, prompts, prior, told)
            except Exception:
                if (
                    rank > 0
                ):  # where the first process has ended, it has said why, and `join` ends this one without a word
                    time.sleep(_PATIENCE)
                raise
            if rank > 0:
                return folder
            concept = save_concept(place.concept, Concept.of(method, backbone, config.seed))
            rounded = {name: tensor.float() for name, tensor in concept.tensors.items()}  # as in the file
            method.load_state(rounded)
            exported = [file.relative_to(place.path) for file in method.export(place.diffusers)]
        finally:
            method.detach()
        _draw_samples(config, place, concept, backbone, examples, metrics)
        seconds = {"training": metrics.pop("seconds"), "total": time.monotonic() - started}
        masks = method.masked and examples.masks is not None
        made_with = {"images": examples.names, "masks": masks, "provenance": provenance()}
        place.finish({**metrics, "seconds": seconds, "peak_memory_bytes": peak_memory_bytes(), **made_with})
        if replaces:
            folder.settle()
        _say_where(config, folder, [folder.path / file for file in exported])
        return folder


def _fit(
    config: TrainConfig,
    folder: RunFolder,
    method: Method,
    backbone: Backbone,
    examples: Examples,
    prompts: TrainingPrompts | None,
    prior: PriorImages | None,
    told: Callable[[], bool],
) -> dict[str, Any]:
    """Train the attached method, from the newest checkpoint if there is one, until it is `told` to stop; gives what
    metrics.json says of it."""
    from perfusion.training import loggers
    from perfusion.training.checkpoint import newest_readable, step_of
    from perfusion.training.devices import rank_of
    from perfusion.training.module import ConceptData, PersonalizationModule, TrainingError
    from perfusion.training.run_folder import config_hash
    from perfusion.training.trainer import TimeLimit, build, results

    checkpoint = newest_readable(folder.checkpoints)
    resumed = step_of(checkpoint) if checkpoint else 0
    options = method.options
    if rank_of(config.trainer) == 0:
        print(f"run folder: {folder.path}" + (f" (going on at step {resumed})" if resumed else ""))
    word, mirror = method.word.placeholder, config.concept.mirror
    data = ConceptData(examples, backbone, options, word, config.seed, prior, prompts, mirror)
    trainer = build(config, folder, options.steps, backbone.device, resumed, told)
    for logger in trainer.loggers:
        logger.log_hyperparams(dataclasses.asdict(config))
    started = time.monotonic()
    try:
        trainer.fit(PersonalizationModule(method, backbone, config_hash(config)), datamodule=data, ckpt_path=checkpoint)
    except SystemExit as error:  # Lightning's answer to Ctrl-C
        signal.signal(signal.SIGINT, signal.default_int_handler)  # which Lightning has switched off
        kept = newest_readable(folder.checkpoints)
        at = f"goes on at step {step_of(kept)}" if kept else "starts anew (no checkpoint was due yet)"
        limits = [c for c in trainer.callbacks if isinstance(c, TimeLimit)]  # type: ignore[attr-defined]
        why = " by trainer.max_time" if any(limit.over for limit in limits) else ""
        if told() and rank_of(config.trainer) == 0:
            why = f" by SIGUSR1, {_queued_again()}"
        raise KeyboardInterrupt(f"stopped at step {trainer.global_step}{why}; the same command {at}") from error
    finally:
        loggers.close()
    if trainer.global_step < options.steps and not trainer.should_stop:  # which callbacks set that end a training early
        raise TrainingError(f"trainer: the training ended at step {trainer.global_step} of {options.steps}")
    seconds = time.monotonic() - started
    return {"steps": options.steps, **results(trainer), "resumed_at_step": resumed, "seconds": seconds}


def _draw_samples(
    config: TrainConfig,
    folder: RunFolder,
    concept: Concept,
    backbone: Backbone,
    examples: Examples,
    metrics: dict[str, Any],
) -> None:
    """Draw the base model beside the concept, as its file holds it."""
    from perfusion.data.prompts import fill, validation_prompts
    from perfusion.drawing import sample
    from perfusion.training.samples import save_samples

    def draw(prompts: list[str]) -> list[Image]:
        return sample(
            backbone.pipe,
            prompts,
            range(config.seed, config.seed + len(prompts)),
            config.backbone.steps,
            config.backbone.guidance,
            progress=config.trainer.get("enable_progress_bar", True),
            size=config.backbone.resolution,
            exact=False,
        )

    templates = validation_prompts(config.backbone.prompts)
    plain = [fill(template, config.concept.superclass) for template in templates]
    personal = [fill(template, config.concept.placeholder) for template in templates]
    rows = [([f"base model: {prompt}" for prompt in plain], draw(plain))]
    with concept.attach(backbone):
        rows.append((personal, draw(personal)))
    count = f"{len(examples)} picture" + "s" * (len(examples) > 1)
    title = f"{config.concept.placeholder} from {count}, step {metrics['step_kept']} of {metrics['steps']}"
    save_samples(folder.samples, examples.pictures(), rows, title)


def _say_where(config: TrainConfig, folder: RunFolder, exported: Sequence[Path]) -> None:
    from perfusion.data.prompts import validation_prompts

    prompt = validation_prompts(config.backbone.prompts)[0].replace("{}", config.concept.placeholder)
    words = {"concept": folder.concept, "prompt": prompt, **which_weights(config.backbone)}
    command = " ".join(f"{key}={shlex.quote(str(value))}" for key, value in words.items())
    print(f"concept: {folder.concept} ({folder.concept.stat().st_size / 1000:.1f} kB)")
    if exported:
        size = sum(file.stat().st_size for file in exported)
        print(f"for stock diffusers: {folder.diffusers} ({size / 1000:.1f} kB)")
    print(f"samples: {folder.samples}")
    print(f"next: python -m perfusion.generate {command}")


def _slurm_signal() -> Callable[[], bool]:
    """Whether SIGUSR1 has arrived, by which SLURM says that a job's time is nearly over. Raises ConfigError."""
    if "SLURM_JOB_ID" not in os.environ:
        raise ConfigError("run.requeue=true: found no SLURM_JOB_ID, expected a job of SLURM; only such a one can queue")
    received: list[int] = []
    signal.signal(signal.SIGUSR1, lambda signum, frame: received.append(signum))
    return lambda: bool(received)


def _queued_again() -> str:
    """Have SLURM queue this job again; what came of it."""
    command = ["scontrol", "requeue", os.environ["SLURM_JOB_ID"]]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    except (OSError, subprocess.TimeoutExpired) as error:
        return f"not queued again ({error})"
    return "queued again" if not done.returncode else f"not queued again ({done.stderr.strip()})"


def _interrupt(signum: int, frame: FrameType | None) -> None:
    raise KeyboardInterrupt


if __name__ == "__main__":
    sys.exit(run_cli(main))
