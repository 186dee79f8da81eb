"""From a command line with sweeps to the jobs that it means, and to the launcher that Hydra has for them."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from hydra import initialize_config_dir
from hydra._internal.callbacks import Callbacks
from hydra._internal.core_plugins.basic_sweeper import BasicSweeper
from hydra.core.global_hydra import GlobalHydra
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.plugins import Plugins
from hydra.errors import HydraException
from hydra.types import HydraContext, RunMode
from omegaconf import DictConfig, OmegaConf, open_dict

from perfusion.config import CONF, ConfigError, TrainConfig
from perfusion.training.composition import checked_config, explained, prepared

_BASIC = "hydra._internal.core_plugins.basic_sweeper.BasicSweeper"


@dataclass(frozen=True)
class Multirun:
    """The jobs of a command line in the order of Hydra's sweeper; valid while the block of `multirun` lasts."""

    overrides: list[list[str]]  # of each job
    configs: list[TrainConfig]
    master: DictConfig
    context: HydraContext

    @property
    def launcher(self) -> str:
        """Name of the launcher's class."""
        return str(self.master.hydra.launcher["_target_"]).rpartition(".")[2]

    def varied(self, number: int) -> list[str]:
        """The overrides of one job that are not those of all."""
        common = set(self.overrides[0]).intersection(*self.overrides)
        return [word.lstrip("+") for word in self.overrides[number] if word not in common]

    def launch(self, numbers: Sequence[int], task: Callable[[DictConfig], None]) -> None:
        """Have Hydra's launcher call `task` once for each of the jobs `numbers`, wherever it does such things.

        `hydra.job.num` is the place in `numbers`. Returns, or raises whatever the launcher raises, when all are over.
        """
        launcher = Plugins.instance().instantiate_launcher(self.context, task, self.master)
        size = self.master.hydra.sweeper.max_batch_size or len(numbers)
        for start in range(0, len(numbers), size):
            part = numbers[start : start + size]
            for job in launcher.launch([self.overrides[number] for number in part], initial_job_idx=start):
                _ = job.return_value  # raises what the task raised


@contextmanager
def multirun(words: Sequence[str]) -> Iterator[Multirun]:
    """The jobs that the words of a command line mean, each composed and checked, before any of them runs.

    Raises:
        ConfigError: anything that is wrong with a word or with the config of a job, which is named.
    """
    try:
        with initialize_config_dir(str(CONF), job_name="perfusion.train", version_base="1.3"):
            loader = GlobalHydra.instance().config_loader()
            master = loader.load_configuration("train", [prepared(word) for word in words], RunMode.MULTIRUN)
            context = HydraContext(config_loader=loader, callbacks=Callbacks(master))
            overrides = _expanded(master, loader)
            configs = [_config(loader.load_sweep_config(master, job), job) for job in overrides]
            yield Multirun(overrides, configs, master, context)
    except HydraException as error:
        raise explained(error) from error


def _expanded(master: DictConfig, loader: Any) -> list[list[str]]:
    """The overrides of every job: the product of `hydra.sweeper.params`, from presets, and of the command line."""
    if master.hydra.sweeper["_target_"] != _BASIC:
        raise ConfigError("hydra/sweeper: expected basic; python -m experiments.search looks for the best settings")
    presets = [prepared(f"{key}={value}") for key, value in (master.hydra.sweeper.params or {}).items()]
    given = OmegaConf.to_container(master.hydra.overrides.task)
    assert isinstance(given, list)
    parsed = OverridesParser.create(config_loader=loader).parse_overrides([*presets, *given])
    (jobs,) = BasicSweeper.split_arguments(parsed, None)
    return [list(job) for job in jobs]


def _config(values: DictConfig, overrides: Sequence[str]) -> TrainConfig:
    with open_dict(values):
        del values["hydra"]
    try:
        return checked_config(values)
    except ConfigError as error:
        raise ConfigError(f"{error} (job {' '.join(overrides)})") from error
