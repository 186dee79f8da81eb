"""`python -m perfusion.train -m ...`: many runs, each in a process and a folder of its own, and a table at the end.

A sweep is written down before its first job begins: `<run.root>/.sweep/<experiment>-<hash of the jobs>/sweep.json`
lists the jobs with their overrides, folders and configs. What became of a job is read from its folder alone. So the
table can be made at any time, and the same command finds what is missing, whatever happened before.
"""

from __future__ import annotations

import hashlib
import json
import os
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig, OmegaConf

from perfusion.cli import aligned
from perfusion.config import ConfigError, TrainConfig
from perfusion.files import atomic_write_text
from perfusion.training.composition import Multirun, checked_config, hydra_main, multirun, prepared
from perfusion.training.job import TRAIN, error_of, run_apart
from perfusion.training.run_folder import RunFolder, config_hash

FILE = "sweep.json"
_FLAGS = ("-m", "--multirun")


@dataclass(frozen=True)
class Job:
    """One job as `sweep.json` lists it; paths are relative to the working directory of the sweep."""

    overrides: str  # those that not all jobs share
    folder: str
    config: str

    @property
    def run(self) -> RunFolder:
        return RunFolder(Path(self.folder))


@dataclass(frozen=True)
class Sweep:
    """The jobs of one command, and the file that lists them."""

    file: Path
    jobs: list[Job]


@dataclass(frozen=True)
class Result:
    """What became of a job: done, skipped (it was done before), failed, or open (stopped, or never begun)."""

    job: Job
    state: str
    seconds: float | None
    scores: dict[str, float]
    error: str | None


def asked_for(argv: Sequence[str]) -> bool:
    """Whether a command line is that of a sweep."""
    flags = [word for word in argv if word.startswith("-")]
    return bool(flags) and all(flag in _FLAGS for flag in flags)


def run(argv: Sequence[str], command: Sequence[str] = TRAIN) -> int:
    """Run what is missing of a sweep and print the table of all its jobs; the exit status, 1 if a job failed.

    Args:
        argv: words of a command line.
        command: what trains one config, see `run_apart`.

    Raises:
        ConfigError: the words, or the config of any job, are wrong; nothing has been run then.
        KeyboardInterrupt: stopped; the table has been printed.
    """
    words = [word for word in argv if word not in _FLAGS]
    if any(word.startswith("from=") for word in words):
        raise ConfigError("from=: a sweep (-m) starts from presets; from= trains one run again")
    results: list[Result] = []
    try:
        execute(words, command, results)
    except KeyboardInterrupt:
        raise KeyboardInterrupt("stopped; the same command goes on with what is missing") from None
    finally:
        if results:
            print(table(results), flush=True)
    return 0 if all(result.state in ("done", "skipped") for result in results) else 1


def execute(words: Sequence[str], command: Sequence[str] = TRAIN, results: list[Result] | None = None) -> list[Result]:
    """Have Hydra run the jobs that words without `-m` mean, with the sweeper and the launcher that they name.

    A job that is done already ends at once. A sweeper that chooses each job by how those before it went is told
    `scores.harmonic` of each; its jobs are not known beforehand, so they are not listed, and `results` stays empty.

    Args:
        results: filled with what became of every job, also if this raises in the middle; default: a new list.

    Returns:
        `results`.

    Raises:
        ConfigError: see `run`. KeyboardInterrupt: stopped. Whatever a launcher raises that lost a worker.
    """
    results = [] if results is None else results
    jobs = multirun(words)
    if jobs is None:
        hydra_main(["-m", *map(prepared, words)], _task(None, command, show=True))
        return results
    sweep = plan(jobs, words)
    again = [config.run.overwrite for config in jobs.configs]
    missing = [k for k, job in enumerate(sweep.jobs) if again[k] or result_of(job).state != "done"]
    before = len(sweep.jobs) - len(missing)
    print(f"sweep of {len(sweep.jobs)} jobs, {before} of them done before: {sweep.file}", flush=True)
    try:
        if missing:
            hydra_main(["-m", *jobs.words], _task(sweep, command, show=jobs.launcher == "BasicLauncher"))
    finally:
        results += [result_of(job, k not in missing) for k, job in enumerate(sweep.jobs)]
    return results


def plan(jobs: Multirun, words: Sequence[str]) -> Sweep:
    """Write down the jobs of a command: their list, and a config file for each.

    Raises:
        ConfigError: two jobs have one folder, or one that is no place for a run; a finished run has read other files.
    """
    folders = [RunFolder.of(config) for config in jobs.configs]
    for k, folder in enumerate(folders):
        folder.check_place()
        if folder.finished and not jobs.configs[k].run.overwrite:
            _check_inputs(folder, jobs.configs[k])
        first = folders.index(folder)
        if first != k:
            raise ConfigError(
                f"jobs {first} ({' '.join(jobs.varied(first))}) and {k} ({' '.join(jobs.varied(k))}) would share the "
                f"folder {folder.path}: expected jobs that differ in what changes the result, and no run.dir="
            )
    paths = json.dumps(sorted(str(folder.path) for folder in folders))  # the same jobs, in whatever order
    name = f"{folders[0].path.parent.name}-{hashlib.sha256(paths.encode()).hexdigest()[:8]}"
    place = Path(jobs.configs[0].run.root).expanduser() / ".sweep" / name
    listed = [
        _listed(config, place / f"{k:04d}.yaml", " ".join(jobs.varied(k))) for k, config in enumerate(jobs.configs)
    ]
    text = {"words": list(words), "jobs": [asdict(job) for job in listed]}
    atomic_write_text(place / FILE, json.dumps(text, indent=2) + "\n")
    return Sweep(place / FILE, listed)


def _check_inputs(folder: RunFolder, config: TrainConfig) -> None:
    from perfusion.methods.base import Word, build
    from perfusion.training.inputs import inputs_of

    method = build(config.method, Word(config.concept.placeholder, config.concept.superclass))
    folder.check(config, inputs_of(config, method))


def read(path: Path) -> Sweep:
    """A sweep from its `sweep.json`, or from the folder that holds it.

    Raises:
        ConfigError: the file cannot be read, or is another kind of file.
    """
    file = path / FILE if path.is_dir() else path
    if not file.is_file():
        raise ConfigError(f"{file}: found no such file, expected the {FILE} of a sweep, or the folder that holds it")
    try:
        return Sweep(file, [Job(**job) for job in json.loads(file.read_text(encoding="utf-8"))["jobs"]])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ConfigError(f"{file}: expected the list of a sweep's jobs, found none: {error!r}") from error


def result_of(job: Job, skipped: bool = False) -> Result:
    """What a job's folder says of it."""
    error = error_of(job.run)
    if not job.run.finished:
        return Result(job, "failed" if error else "open", None, {}, error)
    metrics: dict[str, Any] = json.loads(job.run.metrics.read_text(encoding="utf-8"))
    seconds = metrics.get("seconds", {}).get("total")
    scores = {k: float(v) for k, v in metrics.get("scores", {}).items() if isinstance(v, int | float)}
    return Result(job, "failed" if error else "skipped" if skipped else "done", seconds, scores, error)


def table(results: Sequence[Result]) -> str:
    """All jobs, one in a line; then those that failed, and why; then how many there are of each kind."""
    scores = list(dict.fromkeys(name for result in results for name in result.scores))
    rows = [["job", "state", "seconds", *scores, "folder", "settings"]]
    for k, result in enumerate(results):
        seconds = "" if result.seconds is None else f"{result.seconds:.0f}"
        values = [f"{result.scores[name]:.4f}" if name in result.scores else "" for name in scores]
        rows.append([str(k), result.state, seconds, *values, result.job.folder, result.job.overrides])
    lines = ["", *aligned(rows, right=[0, *range(2, 3 + len(scores))])]
    failed = [(k, result) for k, result in enumerate(results) if result.state == "failed"]
    if failed:
        lines += ["", "failed (ERROR and output.log in a job's folder have more):"]
        lines += [f"  job {k}: {result.error}" for k, result in failed]
    counts = Counter(result.state for result in results)
    lines += ["", ", ".join(f"{counts[state]} {state}" for state in ("done", "skipped", "failed", "open"))]
    return "\n".join(lines)


def _task(sweep: Sweep | None, command: Sequence[str], show: bool) -> Callable[[DictConfig], float | None]:
    """What Hydra's launcher calls for each job, maybe in another process. Failures are left in the run's folder, not
    raised; it gives the job's score."""
    here = os.getcwd()

    def task(values: DictConfig) -> float | None:
        os.chdir(here)  # where relative paths start, also in a worker that was started elsewhere
        config = checked_config(values)
        if sweep is None:
            root, name = Path(config.run.root).expanduser(), f"{config_hash(config)}.yaml"
            job, place = _listed(config, root / ".sweep" / "chosen" / name), ""
        else:
            number = HydraConfig.get().job.num
            job, place = sweep.jobs[number], f"[{number + 1}/{len(sweep.jobs)}] "
        if job.run.finished and not config.run.overwrite and not error_of(job.run):
            return result_of(job).scores.get("harmonic")
        started = time.monotonic()
        print(f"{place}{job.overrides or job.config}", flush=True)
        error = error_of(run_apart(Path(job.config), command, show=show))
        took = f"{time.monotonic() - started:.0f} s"
        print(f"{place}{f'failed after {took}: {error}' if error else f'done in {took}'}", flush=True)
        return None if error else result_of(job).scores.get("harmonic")

    return task


def _listed(config: TrainConfig, file: Path, overrides: str = "") -> Job:
    """A job whose config is in a file from now on."""
    file.parent.mkdir(parents=True, exist_ok=True)
    atomic_write_text(file, OmegaConf.to_yaml(asdict(config)))
    return Job(overrides, str(RunFolder.of(config).path), str(file))
