"""`python -m experiments.tune`: settings of every method on Toyland, found with the same budget of trials for each.

A trial trains the tuning toys with some settings and draws the tuning prompts at several values of the method's dial.
What counts is the harmonic mean of identity and prompt accuracy, both means over the toys, at the best of these values.
Tables use other toys, prompts and seeds. All methods take turns, so that a run that is stopped was fair as well.
"""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from eval.aggregate import concept_scores
from experiments.exclusive import alone
from experiments.pool import Pool
from experiments.protocol import TUNING
from experiments.runner import Runner, Wanted
from experiments.settings import METHODS, Setting, Training, dial, preset_value
from experiments.study import Study, read_space
from perfusion.cli import parse_key_values, run_cli
from perfusion.config import ConfigError
from perfusion.files import atomic_write_text
from perfusion.scoring import harmonic_mean

USAGE = """
Find settings of every method on Toyland, with the same number of trials for each. Needs Optuna, the
extra `search` of this project. A trial trains six toys and draws 200 pictures or fewer: some minutes of a
core.

  python -m experiments.tune                                    all methods
  python -m experiments.tune methods=perfusion,lora trials=20

The first trial of a method is its preset, conf/method/<method>_toyland.yaml, as it stands;
experiments/spaces/<method>_toyland.yaml lists what else is tried. The same command resumes; a larger trials= extends a
finished search. The best settings are printed as they go into the preset, and written to <out>/best.yaml.
"""
_AT = "at"  # attribute of a trial: what was found, and where on the dial
_STARTUP = 4  # trials before the sampler learns from them
_BETAS = (0.55, 0.7, 0.85, 1.0)  # that a trial of Perfusion is looked at with; others as in tables


@dataclass
class TuneConfig:
    """The options of `python -m experiments.tune`."""

    methods: str | None = None  # which, with commas between them; null: all
    trials: int = 12  # of each method, those of former runs included
    out: str = "runs/tune"  # folder
    workers: int = 2  # processes, one thread each
    toys: int = len(TUNING.subjects)  # of the tuning toys
    prompts: int = len(TUNING.prompts)  # of the tuning prompts
    seeds: int = len(TUNING.seeds)  # pictures of each prompt
    steps: int = TUNING.steps  # of the sampler
    changes: list[str] = field(default_factory=list)  # words of perfusion.train, for every training
    seed: int = 0  # of the search


def main(argv: Sequence[str]) -> int:
    """Command line entry point; the exit status, 1 if a trial failed."""
    config = parse_key_values(argv, TuneConfig, USAGE)
    if min(config.toys, config.prompts, config.seeds, config.workers, config.trials) < 1:
        raise ConfigError("toys, prompts, seeds, workers, trials: expected at least 1 of each")
    known = {training.label: training for training in METHODS}
    names = known if config.methods is None else dict.fromkeys(name.strip() for name in config.methods.split(","))
    if unknown := [name for name in names if name not in known]:
        raise ConfigError(f"methods: found {unknown[0]!r}, expected some of {', '.join(known)}")
    protocol = TUNING.smaller(config.toys, config.prompts, config.seeds, config.steps)
    out = Path(config.out).expanduser()
    with alone(out, "out="):
        runner = Runner(out, protocol, tuple(config.changes))
        studies = {known[name]: _opened(known[name], runner) for name in names}
        with Pool(config.workers, out / "log") as pool:
            rounds = [_round(number, studies, runner, pool, config) for number in range(config.trials)]
        text = "\n".join(_best(*one) for one in studies.items())
        atomic_write_text(out / "best.yaml", text)
    print(text + f"written to {out / 'best.yaml'}")
    failures = [line for failed in rounds for line in failed]
    for line in failures:
        print(f"failed: {line}", file=sys.stderr)
    return 1 if failures else 0


def _opened(training: Training, runner: Runner) -> Study:
    """The search of a method, new or with the trials of former processes; its preset comes first."""
    space, protocol = read_space(training.preset), runner.protocol
    asked = {
        "toys": [toy.name for toy in protocol.subjects],
        "prompts": protocol.listed_prompts(pairs=False),
        "seeds": protocol.seeds,
        "sampler": f"{protocol.steps} steps, guidance {protocol.guidance:g}",
        "changes": runner.changes,
        "dial": [setting.name for setting in dial(training, _BETAS)],
    }
    file = runner.root / "studies" / f"{training.label}.db"
    first = {key: preset_value(training, key.removeprefix("method.")) for key in space}
    return Study(file, space, asked, startup=_STARTUP, first=first, instead="out=")


def _round(number: int, studies: Mapping[Training, Study], runner: Runner, pool: Pool, config: TuneConfig) -> list[str]:
    """One trial of every method that has had no more than `number`; what failed."""
    asked: list[tuple[Study, Any, Training, list[Wanted]]] = []
    for training, study in studies.items():
        if len(study.over) <= number:
            trial, words = study.ask(config.seed)
            training = dataclasses.replace(training, changes=tuple(words))
            wanted = [Wanted(setting, (toy,)) for setting in dial(training, _BETAS) for toy in runner.protocol.subjects]
            asked.append((study, trial, training, wanted))
    if not asked:
        return []
    print(f"trial {number + 1} of {config.trials}", flush=True)
    failures = runner.run(pool, runner.tasks(one for *_, wanted in asked for one in wanted))
    for study, trial, training, wanted in asked:
        name = f"{training.label}: {' '.join(training.changes)}"
        if all(one in runner.points for one in wanted):
            value, said = objective(runner, dial(training, _BETAS))
            trial.set_user_attr(_AT, said)
            study.tell(trial, value)
            print(f"  {value:.4f}  {name}  ({said})", flush=True)
        else:
            study.tell(trial, None, "; ".join(failures))
            print(f"  failed  {name}", flush=True)
    return failures


def objective(runner: Runner, settings: Sequence[Setting]) -> tuple[float, str]:
    """The best harmonic mean of identity and prompt accuracy over some settings, and where it was found."""
    found = []
    for setting in settings:
        scores = [concept_scores(runner.points[Wanted(setting, (toy,))]) for toy in runner.protocol.subjects]
        identity, prompt = (float(np.mean([s[name] for s in scores])) for name in ("identity", "prompt"))
        said = f"identity {identity:.3f}, prompt {prompt:.3f} at {setting.name}"
        found.append((float(harmonic_mean(identity, prompt)), said))
    return max(found)


def _best(training: Training, study: Study) -> str:
    """The best trial of a method as keys of its preset."""
    over, best = study.over, study.best
    head = f"# conf/method/{training.preset}.yaml: "
    if best is None:
        return f"{head}no trial of {len(over)} succeeded\n"
    first = next(trial.value for trial in over if trial.value is not None)
    head += f"{best.value:.4f}, the best of {len(over)} trials; the preset as it stood has {first:.4f}\n"
    head += f"# {best.user_attrs[_AT]}\n"
    values = {key: f"{v:.4g}" if isinstance(v, float) else str(v) for key, v in best.params.items()}
    return head + "".join(f"{key.removeprefix('method.')}: {value}\n" for key, value in values.items())


if __name__ == "__main__":
    sys.exit(run_cli(main))
