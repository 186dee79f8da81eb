"""What both searches for settings share: a space of settings, and a study in a file that goes on where it stopped.

A trial whose process was stopped is asked for again, with the same settings, so that its runs resume.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
from omegaconf import OmegaConf

from perfusion.config import ConfigError, checked

SPACES = Path(__file__).with_name("spaces")
_ERROR, _ASKED = "error", "asked"  # attributes: of a trial, why it failed; of a study, what its trials have in common


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


Space = Mapping[str, Dimension]


def read_space(name: str) -> dict[str, Dimension]:
    """The space of that name, or in that file: key -> what its value may be. Raises ConfigError: no such file, or not
    such a file."""
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


def words_of(point: Mapping[str, Any]) -> list[str]:
    """Values of keys as words of a command line."""
    return [f"{key}={str(value).lower() if isinstance(value, bool) else value}" for key, value in point.items()]


class Study:
    """The trials of one search. One process works on it at a time."""

    def __init__(
        self,
        file: Path,
        space: Space,
        asked: Mapping[str, Any],
        *,
        direction: Literal["maximize", "minimize"] = "maximize",
        startup: int = 10,
        first: Mapping[str, Any] | None = None,
        instead: str = "",
    ) -> None:
        """Open the study in `file`, or begin it; trials that were stopped are asked for first.

        Args:
            asked: what all trials have in common beside the space, in values that JSON can hold.
            startup: trials before the sampler learns from them; `first`: the settings of the first one.
            instead: the key that names another file, for the message.

        Raises:
            ConfigError: Optuna is missing; or the file holds a search for something else.
        """
        try:
            import optuna
        except ImportError as error:
            raise ConfigError(f"a search needs Optuna, the extra `search` of this project: {error}") from error
        optuna.logging.set_verbosity(optuna.logging.WARNING)
        self._optuna: Any = optuna
        self._space, self._startup = space, startup
        file.parent.mkdir(parents=True, exist_ok=True)
        place = f"sqlite:///{file}"
        self._study = optuna.create_study(storage=place, study_name="search", direction=direction, load_if_exists=True)
        asked = {**asked, "space": {key: repr(dimension) for key, dimension in space.items()}}
        asked = json.loads(json.dumps(asked))  # as it will be found there
        found = self._study.user_attrs.get(_ASKED, asked)
        if other := next((key for key in asked if found.get(key) != asked[key]), None):
            raise ConfigError(
                f"{file} holds another search ({other} is {found.get(other)} there and {asked[other]} here): "
                f"choose another {instead}"
            )
        self._study.set_user_attr(_ASKED, asked)
        trials = self._study.get_trials(deepcopy=False)
        if first is not None and not trials:
            self._study.enqueue_trial(dict(first))
        for trial in trials:
            if trial.state == optuna.trial.TrialState.RUNNING:  # and its process is gone
                self._study.tell(trial.number, state=optuna.trial.TrialState.FAIL)
                self._study.enqueue_trial(trial.params)

    @property
    def over(self) -> list[Any]:
        """Trials with a score or an error, but not those that were stopped."""
        return [t for t in self._study.get_trials(deepcopy=False) if t.value is not None or _ERROR in t.user_attrs]

    @property
    def best(self) -> Any:
        """The trial with the best score; None before any has succeeded."""
        return self._study.best_trial if any(trial.value is not None for trial in self.over) else None

    def ask(self, seed: int) -> tuple[Any, list[str]]:
        """The next trial, and its settings as words of a command line. Every trial has a seed of its own: a search that
        was stopped tries what one that never stopped would try."""
        own = int(np.random.SeedSequence([seed, len(self.over)]).generate_state(1)[0])
        self._study.sampler = self._optuna.samplers.TPESampler(seed=own, n_startup_trials=self._startup)
        trial = self._study.ask()
        return trial, words_of({key: dimension.suggest(trial, key) for key, dimension in self._space.items()})

    def tell(self, trial: Any, value: float | None, error: str = "") -> None:
        """A trial's score; or None, and why it has none."""
        if value is not None:
            self._study.tell(trial, value)
        else:
            trial.set_user_attr(_ERROR, error)
            self._study.tell(trial, state=self._optuna.trial.TrialState.FAIL)


def error_of(trial: Any) -> str:
    """Why a trial failed; empty if it did not."""
    return trial.user_attrs.get(_ERROR, "")
