"""`python -m experiments.search`: look for the settings of a method that score best, with Optuna.

A trial is one command line, the search's words and the trial's settings, so its runs are ordinary runs in folders of
their own. The study is a SQLite file: the same command goes on where it stopped, and a trial that was stopped is taken
up again with the same settings, whose runs resume.
"""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from omegaconf import MISSING, OmegaConf

from experiments.exclusive import alone
from experiments.study import Study, error_of, read_space, words_of
from perfusion.bars import Bar
from perfusion.cli import parse_key_values, run_cli
from perfusion.config import ConfigError
from perfusion.files import atomic_write_text
from perfusion.training import sweep
from perfusion.training.composition import multirun

Execute = Callable[[Sequence[str]], list[sweep.Result]]  # runs the jobs of one trial, as its words say
_FOLDER = "folder"  # attribute of a trial: of its first run

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


def main(argv: Sequence[str], execute: Execute = sweep.execute) -> int:
    """Search as a command line says; the exit status, 1 if no trial succeeded."""
    own = [word.removeprefix("search.") for word in argv if word.startswith("search.") or word in ("-h", "--help")]
    words = [word for word in argv if not word.startswith("search.")]
    settings = parse_key_values(own, SearchConfig, USAGE)
    if settings.direction not in ("maximize", "minimize"):
        raise ConfigError(f"search.direction={settings.direction}: expected maximize or minimize")
    space = read_space(settings.space)
    first = {key: one.low if one.choices is None else one.choices[0] for key, one in space.items()}
    if multirun([*words, *words_of(first)]) is None:  # which also finds a key that is none
        raise ConfigError("hydra/sweeper: expected basic, for what a trial tries is this search's to choose")
    folder = Path(settings.root).expanduser() / settings.name
    with alone(folder, "search.name="):
        asked = {"words": words, "objective": settings.objective}
        study = Study(folder / "study.db", space, asked, direction=settings.direction, instead="search.name=")
        before = len(study.over)
        for number in Bar(range(before, settings.trials), initial=before, total=settings.trials, desc="trials"):
            _try(study, number + 1, settings, words, execute)
        return _report(study, settings, folder)


def _try(study: Study, number: int, settings: SearchConfig, words: Sequence[str], execute: Execute) -> None:
    """Run one trial."""
    trial, point = study.ask(settings.sampler_seed)
    print(f"trial {number} of {settings.trials}: {' '.join(point)}", flush=True)
    results = execute([*words, *point])
    trial.set_user_attr(_FOLDER, results[0].job.folder)
    errors = [f"{result.job.folder}: {result.error}" for result in results if result.state == "failed"]
    values = [] if errors else [_value(result, settings.objective) for result in results]
    if not errors and all(math.isfinite(value) for value in values):
        study.tell(trial, sum(values) / len(values))
    else:
        error = errors[0] if errors else f"{settings.objective} is {values}"
        study.tell(trial, None, error)
        print(f"trial {number} failed: {error}", flush=True)
    print(f"best so far {study.best.value:.4g}" if study.best else "none has succeeded yet", flush=True)


def _report(study: Study, settings: SearchConfig, folder: Path) -> int:
    """Print all trials and write the config of the best one."""
    for trial in study.over:
        value = f"{trial.value:.4f}" if trial.value is not None else "failed"
        print(f"{trial.number:>5}  {value:>8}  {' '.join(words_of(trial.params))}  {error_of(trial)}")
    best, trials = study.best, len(study.over)
    if best is None:
        print(f"none of {trials} trials succeeded", file=sys.stderr)
        return 1
    found = OmegaConf.create()
    for key, value in best.params.items():
        OmegaConf.update(found, key, value, force_add=True)
    text, file = OmegaConf.to_yaml(found), folder / "best.yaml"
    config = Path(best.user_attrs[_FOLDER]) / "config.yaml"
    comment = f"# {settings.objective} {best.value:.6g}, the best of {trials} trials, with\n"
    comment += "".join(f"#   {line}\n" for line in text.splitlines())
    atomic_write_text(file, comment + config.read_text(encoding="utf-8"))
    print(f"best: {settings.objective} {best.value:.6g} in {config.parent}\n{text}{file}")
    return 0


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


if __name__ == "__main__":
    sys.exit(run_cli(main))
