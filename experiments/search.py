"""`python -m experiments.search`: look for the settings of a method that score best, with Optuna.

A trial is one command line, the search's words and the trial's settings, so its runs are ordinary runs in folders of
their own. The study is a SQLite file: the same command goes on where it stopped, and a trial that was stopped is taken
up again with the same settings, whose runs resume.
"""

from __future__ import annotations

import functools
import json
import math
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
from omegaconf import MISSING, OmegaConf

from experiments.exclusive import alone
from perfusion.cli import parse_key_values, run_cli
from perfusion.config import ConfigError, checked
from perfusion.files import atomic_write_text
from perfusion.training import sweep
from perfusion.training.multirun import multirun

SPACES = Path(__file__).with_name("spaces")
_ERROR, _FOLDER = "error", "folder"  # attributes of trials

USAGE = """
Look for the settings of a method that score best. Needs Optuna, the extra `search` of this project

usage: python -m experiments.search search.space=<name or file> [search.key=value ...] [words of perfusion.train ...]

  python -m experiments.search search.space=perfusion search.trials=30 +experiment=cat_oneshot
  python -m experiments.search search.space=perfusion +experiment=cat_oneshot concept.toyland.instance=3,5 seed=0,1

Words with commas give every trial several runs; their mean counts. hydra/launcher= runs them side by side.
The same command goes on where it was stopped; a larger search.trials= goes on with a search that was over.

A space is a YAML file, key: {low: 0.001, high: 0.1, log: true}, {low: 50, high: 200, step: 50} or {choices: [a, b]}.
Keys below are given with search. before them.
"""


@dataclass
class SearchConfig:
    """The words of a command line that begin with `search.`."""

    space: str = MISSING  # name of a file in experiments/spaces, or a YAML file
    name: str = "search"  # names the folder <root>/<name>
    trials: int = 20  # in all, those of former processes included
    objective: str = "scores.harmonic"  # a number in metrics.json
    direction: str = "maximize"  # or minimize
    sampler_seed: int = 0
    root: str = "runs/.search"


@dataclass
class Dimension:
    """What a setting may be: one of `choices`, or from `low` to `high`, whole numbers where both are whole."""

    low: Any = None
    high: Any = None
    log: bool = False  # evenly in the logarithm
    step: Any = None
    choices: Any = None

    def suggest(self, trial: Any, key: str) -> Any:
        """A value that the study's sampler thinks worth a trial."""
        if self.choices is not None:
            return trial.suggest_categorical(key, self.choices)
        if isinstance(self.low, int) and isinstance(self.high, int):
            return trial.suggest_int(key, self.low, self.high, step=self.step or 1, log=self.log)
        return trial.suggest_float(key, self.low, self.high, step=self.step, log=self.log)

    def check(self, key: str) -> None:
        """Raise ConfigError for what is no range and no choice."""
        numbers = all(isinstance(v, int | float) and not isinstance(v, bool) for v in (self.low, self.high))
        if (self.choices is None) != numbers or (self.choices is not None and (self.low, self.high) != (None, None)):
            raise ConfigError(f"{key}: expected numbers low and high, or choices, found {self}")
        if self.choices is not None and not (isinstance(self.choices, list) and self.choices):
            raise ConfigError(f"{key}.choices: expected a list of values, found {self.choices!r}")
        if numbers and not self.low <= self.high:
            raise ConfigError(f"{key}: expected low below high, found {self.low} and {self.high}")
        if self.log and (self.step is not None or not numbers or self.low <= 0):
            raise ConfigError(f"{key}.log: expected low above 0 and no step, found {self}")


def main(argv: Sequence[str], execute: Callable[[Sequence[str]], list[sweep.Result]] = sweep.execute) -> int:
    """Search as a command line says; `execute` runs the jobs of one trial. The exit status, 1 if no trial succeeded."""
    own = [word.removeprefix("search.") for word in argv if word.startswith("search.") or word in ("-h", "--help")]
    words = [word for word in argv if not word.startswith("search.")]
    settings = parse_key_values(own, SearchConfig, USAGE)
    if settings.direction not in ("maximize", "minimize"):
        raise ConfigError(f"search.direction={settings.direction}: expected maximize or minimize")
    space = read_space(settings.space)
    # A key that is none is found here.
    if multirun([*words, *settings_of({key: _first(dimension) for key, dimension in space.items()})]) is None:
        raise ConfigError("hydra/sweeper: expected basic, for what a trial tries is this search's to choose")
    folder = Path(settings.root).expanduser() / settings.name
    folder.mkdir(parents=True, exist_ok=True)
    with alone(folder, "search.name="):  # so a trial that nobody finishes was stopped
        study = open_study(folder, settings, space, words)
        _search(study, settings, space, words, execute)
        return _report(study, settings, folder)


def read_space(name: str) -> dict[str, Dimension]:
    """The space of that name, or in that file: key -> what its value may be.

    Raises:
        ConfigError: no such file, or not such a file.
    """
    shipped = {path.stem: path for path in SPACES.glob("*.yaml")}
    path = shipped.get(name, Path(name))
    try:
        values = OmegaConf.to_container(OmegaConf.load(path))
    except Exception as error:  # YAML errors are of many kinds
        known = ", ".join(sorted(shipped))
        raise ConfigError(f"search.space={name}: no readable YAML file, and none of {known}: {error}") from error
    if not isinstance(values, dict) or not values:
        raise ConfigError(f"{path}: expected key: {{low: ..., high: ...}} or key: {{choices: [...]}}, found {values!r}")
    space: dict[str, Dimension] = {}
    for key, value in values.items():
        if not isinstance(value, dict):
            raise ConfigError(f"{path}: {key}: expected low and high, or choices, found {value!r}")
        space[str(key)] = checked(Dimension, value, f"{path}: {key}")
        space[str(key)].check(f"{path}: {key}")
    return space


def open_study(folder: Path, settings: SearchConfig, space: Mapping[str, Dimension], words: Sequence[str]) -> Any:
    """The study in `folder`, new or with the trials of former processes; those that were stopped come first again.

    Raises:
        ConfigError: Optuna is missing; or the folder holds a search for something else.
    """
    optuna = optuna_module()
    study = optuna.create_study(
        storage=f"sqlite:///{folder / 'study.db'}",
        study_name="search",
        direction=settings.direction,
        load_if_exists=True,
    )
    asked = {"words": [*words], "space": {k: repr(v) for k, v in space.items()}, "objective": settings.objective}
    found = study.user_attrs.get("asked")
    if found is not None and found != asked:
        key = next(key for key in asked if found[key] != asked[key])
        raise ConfigError(
            f"{folder} holds another search ({key} is {found[key]} there and {asked[key]} here): "
            "choose another search.name="
        )
    study.set_user_attr("asked", asked)
    for trial in study.get_trials(states=(optuna.trial.TrialState.RUNNING,)):  # nobody else works on it: see `alone`
        study.tell(trial.number, state=optuna.trial.TrialState.FAIL)
        study.enqueue_trial(trial.params)
    return study


def _search(
    study: Any,
    settings: SearchConfig,
    space: Mapping[str, Dimension],
    words: Sequence[str],
    execute: Callable[[Sequence[str]], list[sweep.Result]],
) -> None:
    """Run trials until there are as many as asked for."""
    optuna = optuna_module()
    begun, before = time.monotonic(), len(_counted(study))
    while len(_counted(study)) < settings.trials:
        number = len(_counted(study)) + 1
        # A seed for every trial: a search that was stopped tries what one that never stopped would try.
        seed = int(np.random.SeedSequence([settings.sampler_seed, number]).generate_state(1)[0])
        study.sampler = optuna.samplers.TPESampler(seed=seed)
        trial = study.ask()
        point = {key: dimension.suggest(trial, key) for key, dimension in space.items()}
        print(f"trial {number} of {settings.trials}: {' '.join(settings_of(point))}", flush=True)
        results = execute([*words, *settings_of(point)])
        trial.set_user_attr(_FOLDER, results[0].job.folder)
        errors = [f"{result.job.folder}: {result.error}" for result in results if result.state == "failed"]
        values = [] if errors else [_value(result, settings.objective) for result in results]
        if not errors and all(math.isfinite(value) for value in values):
            study.tell(trial, sum(values) / len(values))
        else:
            error = errors[0] if errors else f"{settings.objective} is {values}"
            trial.set_user_attr(_ERROR, error)
            study.tell(trial, state=optuna.trial.TrialState.FAIL)
            print(f"trial {number} failed: {error}", flush=True)
        mean = (time.monotonic() - begun) / (number - before)
        best = f"best so far {study.best_value:.4g}" if _succeeded(study) else "none has succeeded yet"
        print(f"{best}; about {mean * (settings.trials - number) / 60:.0f} minutes left", flush=True)


def _report(study: Any, settings: SearchConfig, folder: Path) -> int:
    """Print all trials and write the config of the best one."""
    for trial in _counted(study):
        value = f"{trial.value:.4f}" if trial.value is not None else "failed"
        print(
            f"{trial.number:>5}  {value:>8}  {' '.join(settings_of(trial.params))}  {trial.user_attrs.get(_ERROR, '')}"
        )
    if not _succeeded(study):
        print(f"none of {len(_counted(study))} trials succeeded", file=sys.stderr)
        return 1
    best = study.best_trial
    found = OmegaConf.create()
    for key, value in best.params.items():
        OmegaConf.update(found, key, value, force_add=True)
    text = OmegaConf.to_yaml(found)
    config = Path(best.user_attrs[_FOLDER]) / "config.yaml"
    file = folder / "best.yaml"
    comment = f"# {settings.objective} {best.value:.6g}, the best of {len(_counted(study))} trials, with\n"
    comment += "".join(f"#   {line}\n" for line in text.splitlines())
    atomic_write_text(file, comment + config.read_text(encoding="utf-8"))
    print(f"best: {settings.objective} {best.value:.6g} in {config.parent}\n{text}{file}")
    return 0


def _counted(study: Any) -> list[Any]:
    """Trials that are over: with a score, or with an error, but not those that were stopped."""
    state = optuna_module().trial.TrialState
    over = study.get_trials(deepcopy=False, states=(state.COMPLETE, state.FAIL))
    return [trial for trial in over if trial.state == state.COMPLETE or _ERROR in trial.user_attrs]


def _succeeded(study: Any) -> bool:
    return any(trial.value is not None for trial in _counted(study))


def _value(result: sweep.Result, objective: str) -> float:
    found: Any = json.loads(result.job.run.metrics.read_text(encoding="utf-8"))
    for part in objective.split("."):
        known = found if isinstance(found, dict) else {}
        if part not in known:
            raise ConfigError(
                f"search.objective={objective}: {result.job.run.metrics} has no {part!r}; there are: "
                f"{', '.join(known) or 'none'}"
            )
        found = known[part]
    if not isinstance(found, int | float):
        raise ConfigError(f"search.objective={objective}: expected a number in metrics.json, found {found!r}")
    return float(found)


def settings_of(point: Mapping[str, Any]) -> list[str]:
    """Values of keys as words of a command line."""
    return [f"{key}={str(value).lower() if isinstance(value, bool) else value}" for key, value in point.items()]


def _first(dimension: Dimension) -> Any:
    return dimension.low if dimension.choices is None else dimension.choices[0]


@functools.cache
def optuna_module() -> ModuleType:
    """Optuna, quiet. Raises ConfigError if it is not installed."""
    try:
        import optuna
    except ImportError as error:
        raise ConfigError(f"a search needs Optuna, the extra `search` of this project: {error}") from error
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    return optuna


if __name__ == "__main__":
    sys.exit(run_cli(main))
