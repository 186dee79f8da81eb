"""From a command line to a checked config, or with `-m` to those of all jobs: Hydra composes, `perfusion.config`
checks, and mistakes read well.
"""

from __future__ import annotations

import dataclasses
import os
import re
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import hydra
from hydra import initialize_config_dir
from hydra._internal.core_plugins.basic_sweeper import BasicSweeper
from hydra.core.global_hydra import GlobalHydra
from hydra.core.hydra_config import HydraConfig
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.errors import HydraException, MissingConfigException, OverrideParseException
from hydra.types import RunMode
from omegaconf import DictConfig, ListConfig, OmegaConf, open_dict
from omegaconf.errors import OmegaConfBaseException

from perfusion.config import CONF, ConceptConfig, ConfigError, TrainConfig, check_ranges, checked, hint
from perfusion.training.folders import quoted

_COMPLETION = ("-sc", "--shell_completion")
_WORD = re.compile(r"(?P<sign>\+{0,2})(?P<key>[A-Za-z_][\w./@:-]*)=(?P<value>.*)", re.DOTALL)


def run(argv: Sequence[str], task: Callable[[TrainConfig], object]) -> None:
    """Call `task` with the config that a command line describes; `perfusion.training.sweep` reads those of sweeps.

    `from=<run folder or config.yaml>` starts from a former run's config instead of conf/train.yaml.

    Raises:
        ConfigError: anything that is wrong with the command line or the config.
    """
    if any(word in _COMPLETION for word in argv):
        hydra_main(argv, lambda values: None)
        return
    sources = [word.partition("=")[2] for word in argv if word.startswith("from=")]
    words = [prepared(word) for word in argv if not word.startswith("from=")]
    if sources:
        task(_former(sources[-1], words))
        return
    composed: list[DictConfig] = []

    def job(values: DictConfig) -> None:
        if HydraConfig.get().mode == RunMode.MULTIRUN:
            raise ConfigError("a sweep is asked for with -m, and with no other flag beside it")
        composed.append(values)  # Hydra's part ends with composing

    hydra_main(words, job)
    for values in composed:  # none after --help or --cfg
        config = checked_config(values)
        _check_beside(words, config.concept)
        task(config)


def _check_beside(words: Sequence[str], concept: ConceptConfig) -> None:
    """Say what of a command line would not count beside the rest of it.

    Raises:
        ConfigError: how Toyland draws pictures, beside pictures.
    """
    keys = [word.partition("=")[0].lstrip("+") for word in words]
    drawn = [key for key in keys if key.startswith("concept.toyland.")]
    if drawn and concept.images is not None:
        raise ConfigError(f"{drawn[0]}: found it beside concept.images, where it would not count; give one of them")
    alone = "concept.superclass" in keys and "concept" not in keys and "concept.placeholder" not in keys
    if alone and concept.superclass not in concept.placeholder:
        print(f"note: concept.placeholder stays {concept.placeholder} for a {concept.superclass}", file=sys.stderr)


def hydra_main(words: Sequence[str], job: Callable[[DictConfig], object]) -> None:
    """Hydra's own command line: it calls `job` with what the words compose, and with `-m` once for each of its jobs.

    Raises:
        ConfigError: anything that is wrong with the words.
    """
    os.environ["HYDRA_FULL_ERROR"] = "1"  # Hydra raises, we explain
    given = sys.argv
    sys.argv = [given[0], *words]  # the only place where Hydra looks
    try:
        hydra.main(config_path=str(CONF), config_name="train", version_base="1.3")(job)()
    except HydraException as error:
        raise explained(error) from error
    finally:
        sys.argv = given


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
    """The jobs that the words of a command line without `-m` mean, all of them composed and checked.

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
            for task in tasks:
                if task.is_sweep_override() and not task.is_discrete_sweep():
                    raise ConfigError(
                        f"{task.input_line}: Hydra's basic sweeper knows no intervals, expected values with commas"
                    )
            (jobs,) = BasicSweeper.split_arguments(tasks, max_batch_size=None)
            configs = [_job_config(loader.load_sweep_config(master, job), job) for job in jobs]
            return Multirun(words, jobs, configs, str(master.hydra.launcher["_target_"]).rpartition(".")[2])
    except HydraException as error:
        raise explained(error) from error


def _job_config(values: DictConfig, overrides: Sequence[str]) -> TrainConfig:
    with open_dict(values):
        del values["hydra"]
    try:
        return checked_config(values)
    except ConfigError as error:
        raise ConfigError(f"{error} (job {' '.join(overrides)})") from error


def prepared(word: str) -> str:
    """A word of the command line as Hydra's grammar wants it.

    A value that the grammar cannot read, such as `<cat*>`, is quoted. A dotted key gets `++`, so that a preset need not
    name every key of the schema; the schema, not Hydra, then says which keys exist.

    Raises:
        ConfigError: a key without dots that is neither a group nor in the schema.
    """
    match = _WORD.fullmatch(word)
    if match is None or re.match(r"hydra[./]", match["key"]):
        return word
    sign, key, value = match.groups()
    if not sign and key == "experiment":
        sign = "+"  # the group; the key of this name is set by the group's presets
    if not sign and re.fullmatch(r"\w+", key):
        known = [field.name for field in dataclasses.fields(TrainConfig)]
        if key not in known:
            raise ConfigError(f"{key}: unknown key{hint(key, known)}. Known here: {', '.join(known)}, from")
        if value == "null" and (CONF / key).is_dir():
            options = sorted(path.stem for path in (CONF / key).glob("*.yaml"))
            raise ConfigError(f"{key}=null: expected one of the group's options: {', '.join(options)}")
    if not sign and "." in key and not re.search(r"[/@:]", key):
        sign = "++"
    if not _readable(f"{sign}{key}={value}") and value[:1] not in ("[", "{", '"', "'"):
        value = quoted(value)
    return f"{sign}{key}={value}"


def _readable(word: str) -> bool:
    try:
        OverridesParser.create().parse_override(word)
    except HydraException:
        return False
    return True


def checked_config(values: DictConfig) -> TrainConfig:
    """What Hydra has composed, without its own part, checked. Raises ConfigError."""
    try:
        for key in sorted(OmegaConf.missing_keys(values)):
            raise ConfigError(f"{key} is not given: add {key}=<value>")
        config = checked(TrainConfig, values)
    except OmegaConfBaseException as error:  # an interpolation that leads nowhere
        raise ConfigError(f"{error.full_key}: {_first_lines(str(error), 1)}") from error
    check_ranges(config)
    return config


def _former(source: str, words: Sequence[str]) -> TrainConfig:
    """The config of a former run with the overrides of a command line."""
    path = Path(source).expanduser()
    path = path / "config.yaml" if path.is_dir() else path
    if not path.is_file():
        raise ConfigError(f"from={source}: found no file {path}, expected the folder of a run, or its config.yaml")
    try:
        values = OmegaConf.load(path)
    except Exception as error:  # YAML errors are of many kinds
        raise ConfigError(f"from={source}: not a readable config: {error}") from error
    if isinstance(values, ListConfig):
        raise ConfigError(f"from={source}: expected the config.yaml of a run, found a list")
    for word in words:
        try:
            override = OverridesParser.create().parse_override(word)
        except HydraException as error:
            raise explained(error) from error
        key, value = override.key_or_group, override.value()
        if (CONF / key).is_dir() or override.is_sweep_override() or override.is_delete():
            raise ConfigError(f"{word}: with from= only single keys can be changed, as in method.steps=100")
        OmegaConf.update(values, key, value, force_add=True)
    return checked_config(values)


def explained(error: HydraException) -> ConfigError:
    """Hydra's words, made short."""
    if isinstance(error, MissingConfigException) and "hydra/launcher/" in str(error.missing_cfg_file):
        name = str(error.missing_cfg_file).rpartition("/")[2]
        there = ", ".join(sorted(error.options or ()))
        return ConfigError(
            f"hydra/launcher={name}: no such launcher here, there are: {there}. joblib, submitit_local, submitit_slurm "
            f"and ray come with extras of this package: see docs/sweeps.md"
        )
    if isinstance(error, MissingConfigException) and error.options is not None:
        group, _, option = str(error.missing_cfg_file).rpartition("/")
        options = sorted(error.options)
        return ConfigError(f"{group}={option}: no such option{hint(option, options)}. There are: {', '.join(options)}")
    if isinstance(error, OverrideParseException):
        return ConfigError(f"{error.override.lstrip('+')}: cannot be read as key=value; maybe quoted: 'key=\"value\"'")
    text = str(error)
    if sweep := re.match(r"(?:Ambiguous value for argument|Sweep parameters) '(.*)'", text):
        given = sweep[1].lstrip("+")
        return ConfigError(
            f"{given}: commas make a sweep, which needs -m; write a list as [a,b], a text as 'key=\"a, b\"'"
        )
    cause = f": {error.__cause__}" if isinstance(error.__cause__, OmegaConfBaseException) else ""
    return ConfigError(_first_lines(text + cause, 2))


def _first_lines(text: str, count: int) -> str:
    return " ".join(line.strip() for line in text.strip().splitlines()[:count])
