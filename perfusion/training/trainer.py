"""A quiet Lightning trainer from the config groups trainer, logger and callbacks."""

from __future__ import annotations

import inspect
import logging
import math
import warnings
from collections.abc import Callable, Mapping
from typing import Any

import diffusers
import hydra.utils
import torch
import transformers
from hydra.errors import InstantiationException
from lightning.pytorch import Callback, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint, ProgressBar, Timer
from lightning.pytorch.loggers.logger import Logger
from lightning.pytorch.plugins.environments import LightningEnvironment
from lightning.pytorch.strategies import DDPStrategy
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from lightning.pytorch.utilities.warnings import PossibleUserWarning

from perfusion.config import ConfigError, TrainConfig, hint
from perfusion.training import loggers
from perfusion.training.checkpoint import Checkpoints, SafetensorsCheckpointIO
from perfusion.training.devices import device_count, rank_of
from perfusion.training.progress import StepProgress
from perfusion.training.run_folder import RunFolder

# What ends a training before its last step, and the values that do not.
_SHORTER = {
    "limit_train_batches": ("None", "1.0"),
    "fast_dev_run": ("None", "False", "0"),
    "overfit_batches": ("None", "0", "0.0"),
}
# What is decided elsewhere, and the key that decides it.
_ELSEWHERE = {
    "max_steps": "method.steps",
    "min_steps": "method.steps",
    "max_epochs": "method.steps",
    "min_epochs": "method.steps",
    "callbacks": "the group callbacks",
    "enable_checkpointing": "callbacks.checkpoint",
    "logger": "the group logger",
    "default_root_dir": "run.dir",
    "use_distributed_sampler": "trainer.devices",
    "val_check_interval": "callbacks.select.every",
    "check_val_every_n_epoch": "callbacks.select.every",
}
_PRECISIONS = ("32", "32-true", "16", "16-mixed", "bf16", "bf16-mixed")
_STRATEGIES = {"auto": False, "ddp": False, "ddp_find_unused_parameters_true": True}  # for several devices
_ACCELERATORS = {"cpu": ("cpu",), "cuda": ("gpu", "cuda"), "mps": ("gpu", "mps")}  # torch device -> Lightning's names


def check_keywords(trainer: Mapping[str, Any]) -> None:
    """Raise ConfigError for a key of the group `trainer` that is no keyword of lightning.Trainer, or set elsewhere."""
    known = inspect.signature(Trainer.__init__).parameters.keys() - {"self", "plugins"} - _ELSEWHERE.keys()
    for key in trainer:
        if key in _ELSEWHERE:
            raise ConfigError(f"trainer.{key}: set {_ELSEWHERE[key]} instead")
        if key not in known:
            raise ConfigError(
                f"trainer.{key}: no keyword of lightning.Trainer{hint(key, known)}. Known: {', '.join(sorted(known))}"
            )
    precision = trainer.get("precision")
    if precision is not None and str(precision) not in _PRECISIONS:
        raise ConfigError(
            f"trainer.precision={precision}: expected 32-true, 16-mixed or bf16-mixed. Lower ones would round what is "
            "trained, and a moving average of i* would stand still; backbone.dtype= sets the type of the frozen model"
        )
    every, clip = trainer.get("accumulate_grad_batches"), trainer.get("gradient_clip_val")
    if every is not None and not (type(every) is int and every >= 1):
        raise ConfigError(f"trainer.accumulate_grad_batches={every}: expected a whole number, at least 1")
    if clip is not None and not (type(clip) in (int, float) and 0 <= clip < math.inf):
        raise ConfigError(f"trainer.gradient_clip_val={clip}: expected a finite number, at least 0, or null")
    if device_count(trainer) > 1 and str(trainer.get("strategy") or "auto") not in _STRATEGIES:
        raise ConfigError(
            f"trainer.strategy={trainer['strategy']}: it splits or copies what is trained in a way that a concept is "
            f"not made for; with several devices expected one of {', '.join(_STRATEGIES)}"
        )
    if trainer.get("num_nodes") not in (None, 1, "1"):
        raise ConfigError(f"trainer.num_nodes={trainer['num_nodes']}: a concept trains on one machine, expected 1")
    for key, harmless in _SHORTER.items():
        if str(trainer.get(key)) not in harmless:
            raise ConfigError(
                f"trainer.{key}={trainer[key]}: the training would end before its last step, and a part of it would "
                "pass for the whole; set method.steps instead"
            )


def build(
    config: TrainConfig,
    folder: RunFolder,
    steps: int,
    device: torch.device,
    resumed: int,
    told: Callable[[], bool] = lambda: False,
) -> Trainer:
    """The trainer of a run.

    Args:
        steps: optimizer steps of the whole run.
        device: the backbone's.
        resumed: the step that the run goes on from, 0 for a new one.
        told: whether to stop as soon as a step is done.

    Raises:
        ConfigError: a key of the three groups that cannot be used.
    """
    check_keywords(config.trainer)
    callbacks = [_callback(name, spec) for name, spec in config.callbacks.items()]
    own = any(isinstance(callback, ProgressBar) for callback in callbacks)
    if config.trainer.get("enable_progress_bar", True) and not own:
        callbacks.append(StepProgress())
    log: list[Logger] = []
    if rank_of(config.trainer) == 0:
        log.append(loggers.MetricsCSV(folder.metrics_csv, keep_until=resumed))
        log += [loggers.build(name, spec, folder.path, folder.id) for name, spec in config.logger.items()]
    given = {key: value for key, value in config.trainer.items() if key != "max_time"}
    keywords = {
        "enable_model_summary": False,
        "num_sanity_val_steps": 0,
        "inference_mode": False,  # what is kept of a validation may be used by the next training step
        **given,
        **_hardware(config.trainer, device),
    }
    # Within SLURM, too, a run is one task, which starts its processes itself and is not requeued by Lightning.
    plugins: list[Any] = [SafetensorsCheckpointIO(), LightningEnvironment()]
    if device_count(config.trainer) > 1:
        unused = _STRATEGIES[str(config.trainer.get("strategy") or "auto")]
        # Buffers move alike in all processes, and are replaced rather than written: there is nothing to send.
        keywords["strategy"] = DDPStrategy(find_unused_parameters=unused, broadcast_buffers=False)
    try:
        if config.trainer.get("max_time") is not None or config.run.requeue:
            callbacks.append(TimeLimit(config.trainer.get("max_time"), told))
        trainer = Trainer(
            **keywords,
            max_steps=steps,
            max_epochs=1,  # the whole run is one epoch
            default_root_dir=folder.path,
            logger=log,
            callbacks=callbacks,
            enable_checkpointing=any(isinstance(callback, ModelCheckpoint) for callback in callbacks),
            plugins=plugins,
            use_distributed_sampler=False,  # ConceptData divides the batch
        )
    except (MisconfigurationException, ValueError, TypeError) as error:
        raise ConfigError(f"trainer: {error}") from error
    return trainer


class TimeLimit(Callback):
    """`trainer.max_time`, of one process: it is stopped as by Ctrl-C, but after a checkpoint of its last step; so it is
    when it is `told` to.

    Lightning's own ends the training, counts the time of former processes as well, and validates once more, which a
    training that never stopped would not do; it is asked for the time alone.
    """

    def __init__(self, duration: Any, told: Callable[[], bool] = lambda: False) -> None:
        self.timer, self.told, self.over = Timer(duration, verbose=False), told, False

    def on_train_start(self, trainer: Trainer, pl_module: Any) -> None:
        self.timer.on_train_start(trainer, pl_module)

    def on_train_batch_start(self, trainer: Trainer, pl_module: Any, batch: Any, batch_idx: int) -> None:
        """Between two steps, when all of the first is logged."""
        if batch_idx % trainer.accumulate_grad_batches:
            return
        left = self.timer.time_remaining()
        self.over = trainer.strategy.broadcast(left is not None and left <= 0)
        if self.over or trainer.strategy.broadcast(self.told()):
            for callback in trainer.callbacks:  # type: ignore[attr-defined]
                if isinstance(callback, Checkpoints):
                    callback.save(trainer)
            raise KeyboardInterrupt


def quieten() -> None:
    """Lightning without its notices about devices, workers and products, and loading without a bar for every part."""
    for name in ("lightning.pytorch", "lightning.fabric"):
        logging.getLogger(name).setLevel(logging.WARNING)
    warnings.filterwarnings("ignore", category=PossibleUserWarning)  # many workers, resumable loaders, log intervals
    warnings.filterwarnings("ignore", message=r"Checkpoint directory .* exists and is not empty")  # a resumed run's
    warnings.filterwarnings("ignore", message=r"Total length of `list` across ranks is zero")  # no validation
    warnings.filterwarnings("ignore", message=r".*LeafSpec", module="lightning")  # Lightning's use of torch
    diffusers.utils.logging.disable_progress_bar()
    transformers.utils.logging.disable_progress_bar()


def _callback(name: str, spec: Any) -> Callback:
    if not isinstance(spec, Mapping) or "_target_" not in spec:
        raise ConfigError(f"callbacks.{name}: expected a mapping with a _target_, found {spec!r}")
    try:
        made = hydra.utils.instantiate(dict(spec))
    except InstantiationException as error:
        cause: BaseException = error
        while cause.__cause__ is not None:
            cause = cause.__cause__
        raise ConfigError(f"callbacks.{name}: {cause}") from error
    if not isinstance(made, Callback):
        raise ConfigError(f"callbacks.{name}: expected a Lightning callback, found a {type(made).__name__}")
    return made


def _hardware(trainer: Mapping[str, Any], device: torch.device) -> dict[str, Any]:
    """`accelerator` and `devices` for where the backbone is."""
    accelerator = trainer.get("accelerator") or "auto"
    fitting = _ACCELERATORS.get(device.type, (device.type,))
    if accelerator not in ("auto", *fitting):
        raise ConfigError(
            f"trainer.accelerator={accelerator}: the backbone is on {device}; set backbone.device instead"
        )
    devices = trainer.get("devices") or 1
    if devices in (1, "1", "auto"):
        devices = 1 if device.index is None or device.type == "cpu" else [device.index]
    return {"accelerator": fitting[0], "devices": devices}


def results(trainer: Trainer) -> dict[str, Any]:
    """What metrics.json says of a finished training: the step that was kept and its scores.

    A callback that keeps another step than the last says so in a method `summary()`.
    """
    said: dict[str, Any] = {"step_kept": trainer.global_step, "scores": {}}
    for callback in trainer.callbacks:  # type: ignore[attr-defined]
        if hasattr(callback, "summary"):
            said |= callback.summary()
    return said
