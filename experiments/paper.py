"""`python -m experiments.paper`: every claim of the paper, tried on Toyland or on photos. `--help` says how."""

from __future__ import annotations

import importlib.util
import os
import sys
import traceback
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

from tqdm import tqdm

from eval.aggregate import RESAMPLES, Bootstrap
from experiments import results
from experiments.evidence import Evidence, Experiment, experiments
from experiments.exclusive import alone
from experiments.photo_protocols import read_photos
from experiments.photos import PhotoOptions
from experiments.pool import Pool, Task, executor_of
from experiments.protocol import Protocol
from experiments.runner import Runner, task_name
from experiments.world import PHOTOS, TOYLAND, World
from perfusion.cli import parse_key_values, run_cli
from perfusion.config import ConfigError

USAGE = """
Try every claim of the paper on Toyland, or on photos: train and draw what is missing, judge, and write

  results/<id>.json           each experiment's numbers with their intervals, and its verdict
  docs/results.md             all of them on one page, with figures in docs/images/results
  <runs>/<weights>/report/    a page with the pictures behind every point; <weights> is a hash of Toyland's weights

  python -m experiments.paper                        everything: hours of two cores; it says beforehand how many
  python -m experiments.paper quick                  5 toys and 8 prompts: intervals about 4 times as wide
  python -m experiments.paper only=mask,pareto       some experiments
  python -m experiments.paper only=covariance        one that is no claim of the paper
  python -m experiments.paper concepts=2 prompts=4 seeds=1     a small trial of the machinery, into <runs>/small
  python -m experiments.paper executor=ray workers=8           on a Ray cluster; executor=submitit: as jobs of SLURM
  python -m experiments.paper world=photos data=dreambooth/dataset backbone=sd15 path=<weights> \\
      scorer=ViT-B-32 dino=vit_small_patch16_224.dino masks=clipseg

Budgets on two cores: 60 seconds for a training of Perfusion, 4 minutes for 12 points of one concept's front. The same
command goes on where it stopped; nothing is trained or drawn twice. What fails is listed at the end, and the rest goes
on. Other weights of Toyland begin in a folder of their own; after a change to the code of a method, remove that one.

With world=photos, data= is a folder like DreamBench, with a folder of photos for each subject, or like
CustomConcept101, with its dataset.json. All that is made lies below <runs>/<protocol>-<weights>, with results/ (tables
in LaTeX among them) and docs/. It says beforehand how many trainings and pictures that is, and how long it takes on
this device. docs/experiments.md says more.
"""


_QUICK = ("concepts=5", "prompts=8")


@dataclass
class PaperConfig:
    """The options of `python -m experiments.paper`."""

    only: str | None = None  # ids of experiments with commas between them; null: all of the paper
    concepts: int | None = None  # of the held-out toys, or of the subjects; null: all
    prompts: int | None = None  # of the prompts of each; null: all
    seeds: int | None = None  # pictures of each prompt; null: 1 of toys, as the protocol says of photos
    steps: int | None = None  # of the sampler; null: 12 of toys, as the protocol says of photos
    changes: list[str] = field(default_factory=list)  # words of perfusion.train, for every training
    runs: str = "runs/paper"  # folder of trainings, pictures and the report
    out: str | None = None  # folder of results/ and docs/; null: this one, of a small trial or of photos below <runs>
    executor: str = "local"  # where tasks run: local, ray (a Ray cluster) or submitit (SLURM)
    workers: int | None = None  # how many work at a time; null: here one for each core, of photos 1
    slurm: list[str] = field(default_factory=list)  # of executor=submitit: parameters of submitit, as timeout_min=240
    resamples: int = RESAMPLES  # of the bootstrap that gives the intervals
    report: bool = True  # make the page with all pictures, which needs plotly
    world: str = "toyland"  # toyland or photos; all that follows is of photos
    data: str | None = None  # folder with a folder of photos for each subject, or with CustomConcept101's dataset.json
    protocol: str | None = None  # dreambench, customconcept101 or a YAML file; null: as the data folder looks
    masks: str | None = None  # clipseg, or a folder with a folder of masks for each subject; null: none
    backbone: str | None = None  # sd15, sd21 or sdxl; null: sd15
    path: str | None = None  # its diffusers folder, .safetensors file or hub id
    layout: str | None = None  # configs of a .safetensors file: known layout or diffusers folder; null: as it looks
    dtype: str | None = None  # float32, float16 or bfloat16; null: float32
    device: str | None = None  # null: cuda, then mps, then cpu
    scorer: str | None = None  # gives CLIP-T and CLIP-I: an open_clip name, or a folder
    pretrained: str | None = None  # the scorer's weights: a file or a tag
    dino: str | None = None  # timm name or folder, as vit_small_patch16_224.dino; null: no DINO score
    dino_pretrained: str | None = None  # its weights: a safetensors file; null: the hub's


def main(argv: Sequence[str]) -> int:
    """Command line entry point; the exit status, 1 if a task failed."""
    quick = (word for short in argv for word in (_QUICK if short == "quick" else [short]))
    config = parse_key_values([*quick], PaperConfig, USAGE)
    if config.report and importlib.util.find_spec("plotly") is None:
        raise ConfigError(
            "report: found no plotly, expected it (the extra `report` of this project); or go without it, report=false"
        )
    gpus = int(config.world == PHOTOS and (config.device or "cuda").startswith("cuda"))
    executor = executor_of(config.executor, gpus, config.slurm)
    if config.workers is None and config.executor != "local":
        raise ConfigError(f"workers: not given beside executor={config.executor}; expected how many work at a time")
    workers = config.workers or (1 if config.world == PHOTOS else os.cpu_count() or 1)
    whole = _whole(config, workers)
    for key, most in (("concepts", len(whole.subjects)), ("prompts", whole.prompts_each)):
        if (value := getattr(config, key)) is not None and not 1 <= value <= most:
            raise ConfigError(f"{key}: found {value}, expected 1 to {most}")
    world = whole.smaller(
        config.concepts or len(whole.subjects),
        config.prompts or whole.prompts_each,
        config.seeds or len(whole.seeds),
        config.steps or whole.steps,
    )
    chosen = _chosen(config.only, world)
    runs = Path(config.runs).expanduser()
    if config.out is not None:
        out = Path(config.out).expanduser()
    else:
        out = runs / world.folder if world.kind == PHOTOS else Path()
        if world != whole or config.changes:
            out = (out if world.kind == PHOTOS else runs) / "small"
    results.check_world(results.read_all(out / "results"), world)  # that the page will show as well: better now
    with alone(runs, "runs="):
        runner = Runner(runs, world, tuple(config.changes))
        failures = _run(chosen, runner, config, Pool(workers, runner.root / "log", executor), out)
        for line in failures:
            print(f"failed: {line}", file=sys.stderr)
        if runner.points and config.report:
            _report(runner, Bootstrap(config.resamples))
    return 1 if failures else 0


def _whole(config: PaperConfig, workers: int) -> World:
    """All of the world that is asked for. Raises ConfigError, also for options that do not depend on it."""
    for key in ("seeds", "steps", "workers", "resamples"):
        if (value := getattr(config, key)) is not None and value < 1:
            raise ConfigError(f"{key}: found {value}, expected at least 1")
    if config.world not in (TOYLAND, PHOTOS):
        raise ConfigError(f"world: found {config.world!r}, expected {TOYLAND} or {PHOTOS}")
    options = {one.name: getattr(config, one.name) for one in fields(PhotoOptions)}
    if config.world == PHOTOS:
        return read_photos(PhotoOptions(**options), workers)
    if given := [key for key, value in options.items() if value is not None]:
        raise ConfigError(f"{given[0]}: found it beside world={TOYLAND}, expected it beside world={PHOTOS} alone")
    return Protocol()


def _chosen(only: str | None, world: World) -> list[Experiment]:
    """The experiments that are named, or those of the paper that can be tried in this world."""
    known = {experiment.id: experiment for experiment in experiments()}
    of_paper = [name for name, experiment in known.items() if experiment.of_paper]
    names = of_paper if only is None else [name.strip() for name in only.split(",")]
    if unknown := [name for name in names if name not in known]:
        raise ConfigError(f"only: found {unknown[0]!r}, expected some of {', '.join(known)}")
    chosen = []
    for name, experiment in known.items():
        if name in names and (lacking := experiment.lacks(world)) is None:
            chosen.append(experiment)
        elif name in names and only is not None:
            raise ConfigError(f"only: found {name}, which needs {lacking}")
        elif name in names:
            print(f"{name}: left out, it needs {lacking}")
    return chosen


def _run(chosen: Sequence[Experiment], runner: Runner, config: PaperConfig, pool: Pool, out: Path) -> list[str]:
    """Do what is missing, and judge each experiment as soon as all of it is there; gives what failed."""
    world = runner.protocol
    wanted = {one.id: one.wanted(world) for one in chosen}

    def planned() -> list[Task]:
        return runner.tasks((w for some in wanted.values() for w in some), (t for one in chosen for t in one.trainings))

    tasks = planned()
    needed: dict[str, set[str]] = {}  # names of the tasks that an experiment waits for
    for one in chosen:
        trained = {task_name(training, subject) for training in one.trained(world) for subject in world.subjects}
        drawn = {task.name for task in tasks if task.about and {*wanted[one.id]} & {*task.about}}
        needed[one.id] = {task.name for task in tasks} & (trained | drawn)
    over: set[str] = set()
    failures: list[str] = []
    evidence: dict[Any, Evidence] = {}  # by what its pictures are of: experiments share what they have in common

    def settle(name: str = "") -> None:
        over.add(name)
        for one in [one for one in chosen if one.id in needed and needed[one.id] <= over]:
            del needed[one.id]
            if not (groups := one.groups(world)):
                tqdm.write(f"{one.id}: left out, it needs two concepts")
                continue
            times = one.times(world)
            new = Evidence(runner, groups, times, Bootstrap(config.resamples))
            try:
                tqdm.write(results.settle(one, evidence.setdefault((one.pairs, times), new), out))
            except results.Unfinished as error:
                failures.append(f"{one.id}: not judged, {error}")
            except Exception as error:  # what is still to be trained and drawn does not depend on it
                traceback.print_exc()
                failures.append(f"{one.id}: not judged, {type(error).__name__}: {error}")

    with pool:
        if world.measured and tasks:
            trainings, pictures, priors = runner.amount(tasks)
            prior = f" and at most {priors} pictures of superclasses for prior preservation" if priors else ""
            print(
                f"{trainings} trainings and {pictures} pictures{prior}, of {len(world.subjects)} {world.thing}s, "
                f"{world.prompts_each} prompts and {len(world.seeds)} seeds; timing a picture on this device",
                flush=True,
            )
            if failed := runner.run(pool, [runner.timing()]):
                raise ConfigError(f"nothing was begun: {failed[0]}")
            tasks = planned()
        *_, priors = runner.amount(tasks)
        minutes = (sum(task.guess for task in tasks) + priors * runner.pace["draw"]) / pool.size / 60
        print(f"{len(tasks)} tasks for {', '.join(wanted)}; about {minutes:.0f} minutes", flush=True)
        settle()
        failed = runner.run(pool, tasks, settle)
    print(f"results: {out / 'results'}, {out / 'docs' / 'results.md'}")
    return failed + failures


def _report(runner: Runner, bootstrap: Bootstrap) -> None:
    """One page with all pictures, and the record of scores that it is made from."""
    from eval.record import merged, write_scores
    from eval.report import ReportConfig, report

    scores = runner.root / "scores.json"
    document = {**runner.document, "bootstrap": asdict(bootstrap), "summary": []}
    write_scores(scores, document, [(point, {}) for point in merged(runner.points.values())])
    out = str(runner.root / "report")
    world = runner.protocol
    settings = {"x": world.x, "y": world.y, "resamples": bootstrap.resamples}
    report(ReportConfig(scores=str(scores), out=out, title=f"The paper's claims on {world.title}", **settings))


if __name__ == "__main__":
    sys.exit(run_cli(main))
