"""Tasks in workers, one thread each: what a worker has loaded, it keeps for its next task.

A task that raises costs itself and those that need it; the others go on. One whose worker is killed is tried again, for
the worker need not have been killed because of it.

Workers are processes of this machine, actors of a Ray cluster or jobs of SLURM. An executor is a context manager. What
it gives is called from several threads at once: it makes a call in some worker, waits, and returns the value; or it
raises BrokenExecutor, if the worker was killed. On the way out all workers end. Those elsewhere work in the folder that
this process works in, which they have to share with it.
"""

from __future__ import annotations

import importlib.util
import itertools
import logging
import multiprocessing
import os
import signal
import sys
import threading
import time
import traceback
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, BrokenExecutor, Future, ProcessPoolExecutor, wait
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from queue import LifoQueue
from textwrap import shorten
from typing import Any

import yaml

from perfusion.bars import Bar
from perfusion.config import ConfigError
from perfusion.files import first_line

Make = Callable[..., Any]  # make(call, *arguments)
Executor = Callable[[int, Path], AbstractContextManager[Make]]  # of so many workers, which print into files of a folder

_TRIES = 3  # of a task whose workers are killed
_SAID = 200  # characters at most that an executor says of it
_EVERY = 20.0  # seconds between two lines of progress where nobody watches a terminal
_THREADS = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS")
_KINDS = ("local", "ray", "submitit")
_JOB = {"timeout_min": 240}  # of SLURM, where nothing else is said; submitit's own default is 5 minutes


@dataclass(frozen=True)
class Task:
    """A call of a function at the top level of a module, made in a worker."""

    name: str  # for people, and unique
    call: Callable[..., Any]
    arguments: tuple[Any, ...]
    kind: str  # tasks of one kind take time in proportion to their size
    size: float = 1.0
    needs: tuple[str, ...] = ()  # names of tasks that have to succeed before it
    about: Any = None  # whatever the one who made it wants to find again in its outcome
    pace: float = 1.0  # seconds of a core for one unit of its size

    @property
    def guess(self) -> float:
        """Seconds that it takes, about."""
        return self.size * self.pace


@dataclass(frozen=True)
class Outcome:
    """How a task ended: with a value, or with an error in one line."""

    task: Task
    value: Any = None
    error: str | None = None
    seconds: float = 0.0


@dataclass
class Pool:
    """So many workers, which print into a folder: `with Pool(2, logs) as pool: failed = pool.run(tasks)`."""

    size: int
    logs: Path
    executor: Executor = field(default_factory=lambda: local)
    _held: ExitStack = field(default_factory=ExitStack)
    _make: Make | None = None

    def __enter__(self) -> Pool:
        self.logs.mkdir(parents=True, exist_ok=True)
        self._make = self._held.enter_context(self.executor(self.size, self.logs))
        return self

    def __exit__(self, *error: Any) -> None:
        self._held.__exit__(*error)

    def run(self, tasks: Sequence[Task], done: Callable[[Outcome], None] = lambda outcome: None) -> list[str]:
        """What failed, a line for each task. Tasks begin in their order as far as what they need is there; `done` is
        called with each outcome, in this process, as soon as it is known."""
        errors: dict[str, str | None] = {}  # of tasks that are over
        waiting, busy, kills = list(tasks), dict[Future[Any], Task](), Counter[str]()
        bar = _bar(tasks)

        def settle(outcome: Outcome) -> None:
            errors[outcome.task.name] = outcome.error
            bar.set_postfix_str(outcome.task.name, refresh=False)
            bar.update(outcome.task.guess)
            if outcome.error is not None:
                bar.write(f"failed: {outcome.task.name}: {outcome.error}")
            done(outcome)

        with bar:
            while waiting or busy:
                for task in [*waiting]:
                    if lost := [name for name in task.needs if errors.get(name) is not None]:
                        waiting.remove(task)
                        settle(Outcome(task, error=f"not tried, for {lost[0]} failed"))
                    elif len(busy) < self.size and errors.keys() >= {*task.needs}:
                        waiting.remove(task)
                        busy[self._begun(task)] = task
                for future in wait(busy, return_when=FIRST_COMPLETED).done:
                    task, error = busy.pop(future), future.exception()
                    if isinstance(error, BrokenExecutor):
                        kills[task.name] += 1
                        if kills[task.name] < _TRIES:
                            bar.write(f"its worker was killed, so it is tried again: {task.name}")
                            waiting.insert(0, task)
                            continue
                        said = shorten(str(error).strip().splitlines()[-1], _SAID)  # what a traceback ends with
                        error = f"its worker was killed {_TRIES} times: {said}"
                    settle(Outcome(task, *future.result()) if error is None else Outcome(task, error=str(error)))
        return [f"{name}: {error}" for name, error in errors.items() if error is not None]

    def _begun(self, task: Task) -> Future[Any]:
        """A task that a thread makes and waits for. Nothing waits for the thread, where all is left by an error."""
        future, make = Future[Any](), self._make
        assert make is not None

        def run() -> None:
            try:
                future.set_result(make(_call, task.call, task.arguments))
            except BaseException as error:
                future.set_exception(error)

        threading.Thread(target=run, daemon=True).start()
        return future


def _bar(tasks: Sequence[Task]) -> Any:
    """Progress in guessed seconds of one core, from which tqdm tells the time that is left."""
    shape = f"{{percentage:3.0f}}% of {len(tasks)} tasks after {{elapsed}}, about {{remaining}} left{{postfix}}"
    pace = 0.1 if sys.stderr.isatty() else _EVERY
    return Bar(
        total=sum(task.guess for task in tasks), bar_format=shape, mininterval=pace, maxinterval=pace, smoothing=0
    )


def _call(call: Callable[..., Any], arguments: tuple[Any, ...]) -> tuple[Any, str | None, float]:
    """A task's value or error, and the seconds that it took. Errors travel as text: not every exception can be sent."""
    begun, value, error = time.monotonic(), None, None
    try:
        value = call(*arguments)
    except BaseException as raised:  # a library's SystemExit included
        traceback.print_exc()
        error = first_line(raised)
    sys.stdout.flush()
    return value, error, time.monotonic() - begun


# --- where workers are ------------------------------------------------------------------------------------------------


def executor_of(kind: str, gpus: int = 0, slurm: Sequence[str] = ()) -> Executor:
    """The executor of a name.

    Args:
        gpus: of each worker elsewhere.
        slurm: `key=value` words, parameters of submitit's AutoExecutor.

    Raises:
        ConfigError: no such executor, its package is not installed, or words that are not for it.
    """
    if kind not in _KINDS:
        raise ConfigError(f"executor: found {kind!r}, expected one of {', '.join(_KINDS)}")
    if kind != "local" and importlib.util.find_spec(kind) is None:
        raise ConfigError(f"executor: found no {kind}, expected it (the extra `{kind}` of this project)")
    if slurm and kind != "submitit":
        raise ConfigError(f"slurm: found it beside executor={kind}, expected it beside executor=submitit alone")
    if kind == "ray":
        return partial(in_ray, gpus=gpus)
    if kind == "submitit":
        if wrong := [word for word in slurm if "=" not in word]:
            raise ConfigError(f"slurm: found {wrong[0]!r}, expected key=value")
        given = {key: yaml.safe_load(value) for key, _, value in (word.partition("=") for word in slurm)}
        return partial(in_slurm, parameters=_JOB | ({"gpus_per_node": gpus} if gpus else {}) | given)
    return local


@contextmanager
def local(size: int, logs: Path) -> Iterator[Make]:
    """Processes of this machine, which end with this one, however that ends. One executor of `size` processes, the
    standard library's or joblib's, is broken as a whole by one kill, so each worker is an executor of its own."""
    idle = LifoQueue[tuple[int, ProcessPoolExecutor]]()

    def worker(number: int) -> ProcessPoolExecutor:
        """A process, which begins with its first call."""
        spawn = multiprocessing.get_context("spawn")
        return ProcessPoolExecutor(1, spawn, initializer=_begin, initargs=(logs / f"worker-{number}.log",))

    def make(call: Callable[..., Any], *arguments: Any) -> Any:
        number, one = idle.get()
        try:
            return one.submit(call, *arguments).result()
        except BrokenExecutor:
            one = worker(number)
            raise
        finally:
            idle.put((number, one))

    for number in range(size):
        idle.put((number, worker(number)))
    try:
        yield make
    except BaseException:
        for process in multiprocessing.active_children():  # nobody waits for their tasks any more
            process.terminate()
        raise
    while not idle.empty():
        idle.get()[1].shutdown()


@contextmanager
def in_ray(size: int, logs: Path, gpus: int = 0) -> Iterator[Make]:
    """Actors of a Ray cluster, each with a CPU and so many GPUs: that which RAY_ADDRESS names or this machine belongs
    to, else one of this machine alone. Fewer work where the cluster has not the room, until it has.

    Raises:
        ConfigError: no cluster at RAY_ADDRESS; or it has no GPU, and they need one.
    """
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")  # which Ray would send home
    import ray
    from ray.exceptions import RayError

    try:
        ray.init(ignore_reinit_error=True, include_dashboard=False, log_to_driver=False, logging_level=logging.ERROR)
    except ConnectionError as error:
        raise ConfigError(f"executor=ray: {first_line(error)}") from error
    room = ray.cluster_resources()
    print(f"Ray: {room.get('CPU', 0):g} CPUs and {room.get('GPU', 0):g} GPUs", flush=True)
    if room.get("GPU", 0) < gpus:
        raise ConfigError("device: found no GPU in the Ray cluster, expected one for each worker; or device=cpu")
    actor: Any = ray.remote(num_cpus=1, num_gpus=gpus)(_Worker)
    numbers, workers, idle = itertools.count(), set[Any](), LifoQueue[Any]()

    def begin() -> None:
        worker = actor.remote(os.getcwd(), logs.resolve() / f"worker-{next(numbers)}.log")
        workers.add(worker)
        # One that still waits for room is given no task.
        worker.__ray_ready__.remote().future().add_done_callback(lambda _: idle.put(worker))

    def make(call: Callable[..., Any], *arguments: Any) -> Any:
        worker = idle.get()
        try:
            return ray.get(worker.make.remote(call, *arguments))
        except RayError as error:
            if worker in workers:  # else all of them are being ended
                workers.remove(worker)
                ray.kill(worker)
                begin()
            worker = None
            raise BrokenExecutor(str(error)) from error
        finally:
            if worker is not None:
                idle.put(worker)

    for _ in range(size):
        begin()
    try:
        yield make
    finally:
        while workers:
            ray.kill(workers.pop())


@contextmanager
def in_slurm(size: int, logs: Path, parameters: dict[str, Any], cluster: str | None = None) -> Iterator[Make]:
    """A job of SLURM for each task; where there is no SLURM, a process of this machine.

    Args:
        parameters: of submitit's AutoExecutor, as `timeout_min` and `slurm_partition`.
        cluster: `slurm` or `local`; None: as this machine looks.

    Raises:
        ConfigError: parameters that there are not.
    """
    from submitit import AutoExecutor
    from submitit.core.utils import UncompletedJobError

    executor = AutoExecutor(logs.resolve() / "jobs", cluster)
    try:
        executor.update_parameters(**parameters)
    except (NameError, AssertionError, ValueError, TypeError) as error:
        raise ConfigError(f"slurm: {first_line(error)}") from None
    where = "of SLURM" if executor.cluster == "slurm" else "processes of this machine, which has no SLURM"
    print(f"submitit: jobs are {where}", flush=True)
    one_at_a_time, jobs = threading.Lock(), set[Any]()

    def make(call: Callable[..., Any], *arguments: Any) -> Any:
        with one_at_a_time:
            job = executor.submit(call, *arguments)
            jobs.add(job)
        try:
            return job.result()
        except UncompletedJobError as error:
            raise BrokenExecutor(str(error)) from error
        finally:
            jobs.remove(job)

    try:
        yield make
    finally:
        for job in [*jobs]:
            job.cancel(check=False)


class _Worker:
    """An actor of Ray's."""

    def __init__(self, folder: str, log: Path) -> None:
        os.chdir(folder)
        _prepare(log)

    def make(self, call: Callable[..., Any], *arguments: Any) -> Any:
        return call(*arguments)


def _begin(log: Path) -> None:
    """What a process of this machine does first. Ctrl-C is for the one that started it, with which it ends."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    threading.Thread(target=_end_with_parent, daemon=True).start()
    _prepare(log)


def _end_with_parent() -> None:
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)


def _prepare(log: Path) -> None:
    """One thread, and what is printed goes into a file."""
    os.environ |= dict.fromkeys(_THREADS, "1")
    output = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    for descriptor in (1, 2):
        os.dup2(output, descriptor)
