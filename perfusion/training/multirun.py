"""From a command line with sweeps to the jobs that it means, all of them composed before the first is run."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass

from hydra import initialize_config_dir
from hydra.core.global_hydra import GlobalHydra
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override
from hydra.errors import HydraException
from hydra.types import RunMode
from omegaconf import DictConfig, open_dict

from perfusion.config import CONF, ConfigError, TrainConfig
from perfusion.training.composition import checked_config, explained, prepared


@dataclass(frozen=True)
class Multirun:
    """The jobs of a command line, in the order in which Hydra runs them."""

    words: list[str]  # for Hydra, which makes of them, with -m, these jobs
    overrides: list[list[str]]  # of each job
    configs: list[TrainConfig]
    launcher: str  # name of the class

    def varied(self, number: int) -> list[str]:
        """The overrides of one job that are not those of all."""
        common = set(self.overrides[0]).intersection(*self.overrides)
        return [word.lstrip("+") for word in self.overrides[number] if word not in common]


def multirun(words: Sequence[str]) -> Multirun | None:
    """The jobs that the words of a command line mean, each composed and checked.

    What varies stands in `hydra.sweeper.params`, from presets, and on the command line, which goes before them.

    Returns:
        None where `hydra/sweeper` names one that chooses each job by how those before it went.

    Raises:
        ConfigError: anything that is wrong with a word or with the config of a job, which is named.
    """
    words = [prepared(word) for word in words]
    try:
        with initialize_config_dir(str(CONF), job_name="perfusion.train", version_base="1.3"):
            loader = GlobalHydra.instance().config_loader()
            master = loader.load_configuration("train", words, RunMode.MULTIRUN)
            if not master.hydra.sweeper["_target_"].endswith(".BasicSweeper"):
                return None
            parser = OverridesParser.create(config_loader=loader)
            given = {override.key_or_group for override in parser.parse_overrides(words)}
            presets = [f"{key}={value}" for key, value in (master.hydra.sweeper.params or {}).items()]
            presets = [prepared(word) for word in presets if word.partition("=")[0].lstrip("+") not in given]
            words = [*presets, *words, "hydra.sweeper.params=null"]
            tasks = [word for word in parser.parse_overrides(words) if not word.key_or_group.startswith("hydra")]
            choices = {word.get_key_element(): _choices(word) for word in tasks}  # of a key given twice the last counts
            overrides = [list(job) for job in itertools.product(*choices.values())]
            configs = [_config(loader.load_sweep_config(master, job), job) for job in overrides]
            launcher = str(master.hydra.launcher["_target_"]).rpartition(".")[2]
            return Multirun(words, overrides, configs, launcher)
    except HydraException as error:
        raise explained(error) from error


def _choices(override: Override) -> list[str]:
    """The words that an override stands for: one, or with commas, or as `range(...)`, several."""
    key = override.get_key_element()
    if not override.is_sweep_override():
        return [f"{key}={override.get_value_element_as_str()}"]
    if not override.is_discrete_sweep():
        raise ConfigError(
            f"{override.input_line}: Hydra's basic sweeper knows no intervals, expected values with commas"
        )
    return [f"{key}={value}" for value in override.sweep_string_iterator()]


def _config(values: DictConfig, overrides: Sequence[str]) -> TrainConfig:
    with open_dict(values):
        del values["hydra"]
    try:
        return checked_config(values)
    except ConfigError as error:
        raise ConfigError(f"{error} (job {' '.join(overrides)})") from error
