"""`python -m experiments.paper`: every claim of the paper, tried on Toyland. `--help` says how it is used."""

from __future__ import annotations

import importlib.util
import os
import sys
import traceback
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from tqdm import tqdm

from eval.aggregate import RESAMPLES, Bootstrap
from experiments import results
from experiments.evidence import Evidence
from experiments.exclusive import alone
from experiments.experiment import Experiment, experiments
from experiments.pool import Outcome, Pool, seconds_of
from experiments.protocol import Protocol
from experiments.runner import Runner, Wanted, task_name
from perfusion.cli import parse_key_values, run_cli
from perfusion.config import ConfigError

USAGE = """
Try every claim of the paper on Toyland: train and draw what is missing, judge, and write

  results/<id>.json           each experiment's numbers with their intervals, and its verdict
  docs/results.md             all of them on one page, with figures in docs/images/results
  <runs>/<weights>/report/    a page with the pictures behind every point; <weights> is a hash of Toyland's weights

  python -m experiments.paper                        everything: hours of two cores; it says beforehand how many
  python -m experiments.paper quick                  8 toys and 8 prompts: intervals about 2.7 times as wide
  python -m experiments.paper only=mask,pareto       some experiments
  python -m experiments.paper only=covariance        one that is no claim of the paper
  python -m experiments.paper concepts=2 prompts=4 seeds=1     a small trial of the machinery, into <runs>/small

Budgets on two cores: 60 seconds for a training of Perfusion, 4 minutes for 12 points of one concept's front. The same
command goes on where it stopped; nothing is trained or drawn twice. What fails is listed at the end, and the rest goes
on. Other weights of Toyland begin in a folder of their own; after a change to the code of a method, remove that one.
"""


_QUICK = ("concepts=8", "prompts=8")


@dataclass
class PaperConfig:
    """The options of `python -m experiments.paper`."""

    only: str | None = None  # ids of experiments with commas between them; null: all of the paper
    concepts: int = len(Protocol.toys)  # of the held-out toys
    prompts: int = len(Protocol.prompts)  # of the prompts
    seeds: int = len(Protocol.seeds)  # pictures of each prompt
    steps: int = Protocol.steps  # of the sampler
    changes: list[str] = field(default_factory=list)  # words of perfusion.train, for every training
    runs: str = "runs/paper"  # folder of trainings, pictures and the report
    out: str | None = None  # folder of results/ and docs/; null: this one, of a small trial <runs>/small
    workers: int = os.cpu_count() or 1  # processes, one thread each
    resamples: int = RESAMPLES  # of the bootstrap that gives the intervals
    report: bool = True  # make the page with all pictures, which needs plotly


def main(argv: Sequence[str]) -> int:
    """Command line entry point; the exit status, 1 if a task failed."""
    quick = (word for short in argv for word in (_QUICK if short == "quick" else [short]))
    config = parse_key_values([*quick], PaperConfig, USAGE)
    if config.report and importlib.util.find_spec("plotly") is None:
        raise ConfigError(
            "report: found no plotly, expected it (the extra `report` of this project); or go without it, report=false"
        )
    chosen = _chosen(config.only)
    protocol = _protocol(config)
    runs = Path(config.runs).expanduser()
    whole = protocol == Protocol() and not config.changes
    out = Path(config.out).expanduser() if config.out is not None else Path() if whole else runs / "small"
    results.read_all(out / "results")  # that the page will show as well: better now than after an hour
    with alone(runs, "runs="):
        runner = Runner(runs, protocol, tuple(config.changes))
        failures = _run(chosen, runner, config, out)
        for line in failures:
            print(f"failed: {line}", file=sys.stderr)
        if runner.points and config.report:
            _report(runner, Bootstrap(config.resamples))
    return 1 if failures else 0


def _chosen(only: str | None) -> list[Experiment]:
    known = {experiment.id: experiment for experiment in experiments()}
    of_paper = [name for name, experiment in known.items() if experiment.of_paper]
    names = of_paper if only is None else [name.strip() for name in only.split(",")]
    if unknown := [name for name in names if name not in known]:
        raise ConfigError(f"only: found {unknown[0]!r}, expected some of {', '.join(known)}")
    return [experiment for name, experiment in known.items() if name in names]


def _protocol(config: PaperConfig) -> Protocol:
    whole = Protocol()
    for key, limit in (("concepts", len(whole.toys)), ("prompts", len(whole.prompts))):
        if not 1 <= getattr(config, key) <= limit:
            raise ConfigError(f"{key}: found {getattr(config, key)}, expected 1 to {limit}")
    for key in ("seeds", "steps", "workers", "resamples"):
        if getattr(config, key) < 1:
            raise ConfigError(f"{key}: found {getattr(config, key)}, expected at least 1")
    return whole.smaller(config.concepts, config.prompts, config.seeds, config.steps)


def _run(chosen: Sequence[Experiment], runner: Runner, config: PaperConfig, out: Path) -> list[str]:
    """Do what is missing, and judge each experiment as soon as all of it is there; gives what failed."""
    wanted = {one.id: one.wanted(runner.protocol) for one in chosen}
    tasks = runner.tasks((w for some in wanted.values() for w in some), (t for one in chosen for t in one.trainings))
    needed = {one.id: {t.name for t in _tasks_of(tasks, one, wanted[one.id], runner)} for one in chosen}
    over: set[str] = set()
    failures: list[str] = []
    evidence: dict[Any, Evidence] = {}  # by what its pictures are of: experiments share what they have in common

    def settle() -> None:
        for one in [one for one in chosen if one.id in needed and needed[one.id] <= over]:
            del needed[one.id]
            if not (groups := one.groups(runner.protocol)):
                tqdm.write(f"{one.id}: left out, it needs two concepts")
                continue
            new = Evidence(runner, groups, one.times, Bootstrap(config.resamples))
            mine = evidence.setdefault((one.pairs, one.times), new)
            try:
                failures.extend(_judge(one, mine, out))
            except Exception as error:  # what is still to be trained and drawn does not depend on it
                traceback.print_exc()
                failures.append(f"{one.id}: not judged, {type(error).__name__}: {error}")

    def done(outcome: Outcome) -> None:
        runner.keep(outcome)
        over.add(outcome.task.name)
        settle()

    minutes = seconds_of(tasks) / config.workers / 60
    print(f"{len(tasks)} tasks for {', '.join(wanted)}; about {minutes:.0f} minutes", flush=True)
    settle()
    with Pool(config.workers, runner.root / "log") as pool:
        failed = pool.run(tasks, done)
    print(f"results: {out / 'results'}, {out / 'docs' / 'results.md'}")
    return failed + failures


def _tasks_of(tasks: Sequence[Any], one: Experiment, wanted: Sequence[Wanted], runner: Runner) -> list[Any]:
    """The tasks that an experiment waits for."""
    mine = {*wanted}
    world = runner.protocol
    named = {task_name(t, subject) for t in one.trained(world) for subject in world.subjects}
    return [task for task in tasks if task.name in named or (task.about and mine & {*task.about})]


def _judge(one: Experiment, evidence: Evidence, out: Path) -> list[str]:
    """Write an experiment's result, figures and the page anew; gives why it could not be judged."""
    runner = evidence.runner
    wanted = one.wanted(runner.protocol)
    missing = [w.name for w in wanted if w not in runner.points]
    if missing or not runner.trained(one.trainings):
        return [f"{one.id}: not judged, {len(missing)} of {len(wanted)} sets of pictures are missing"]
    finding = one.judge(evidence)
    content = results.document(one, finding, evidence)
    if one.series:
        results.draw(one, evidence, runner.root / "figures", out / "docs" / results.IMAGES)
    results.write(out, content)
    tqdm.write(f"{one.id}: {finding.verdict.value} ({finding.key})")
    return []


def _report(runner: Runner, bootstrap: Bootstrap) -> None:
    """One page with all pictures, and the record of scores that it is made from."""
    from eval.record import merged, write_scores
    from eval.report import ReportConfig, report

    scores = runner.root / "scores.json"
    document = {**runner.document, "bootstrap": asdict(bootstrap), "summary": []}
    write_scores(scores, document, [(point, {}) for point in merged(runner.points.values())])
    out = str(runner.root / "report")
    settings = {"x": "prompt", "y": "identity", "resamples": bootstrap.resamples}
    report(ReportConfig(scores=str(scores), out=out, title="The paper's claims on Toyland", **settings))


if __name__ == "__main__":
    sys.exit(run_cli(main))
