"""Which devices a run has: its share of the machine's GPUs, and its processes' share of those.

Jobs of sweeps, whatever launches them, take turns at the GPUs that they can see: one job per GPU.
"""

from __future__ import annotations

import fcntl
import os
import re
import signal
import tempfile
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

from perfusion.config import ConfigError, TrainConfig

_POLL = 0.5  # seconds between two looks at GPUs that are all taken
_FIRST = "PERFUSION_FIRST"  # variable of the environment: the process that starts the others of its training


@contextmanager
def lease(config: TrainConfig) -> Iterator[tuple[dict[str, str], list[int]]]:
    """Wait until the GPUs of a run are free, and hold them while the block lasts.

    A lease is a lock on a file of this machine, which ends with the last process that has the file open: a kill frees
    the GPU, and a job that outlives its sweep keeps it. Leases bind the jobs of sweeps and searches, nothing else.

    Returns:
        Changes to the environment of the run's process, and descriptors that it has to inherit. Where the config names
        no GPU, `CUDA_VISIBLE_DEVICES` gives the process the one that it was lent; where it names one, it is that one.
        Both are empty for a run on the CPU, and where there are fewer GPUs than it asks for, which Lightning explains.
    """
    seen = visible_gpus() if config.backbone.device.startswith(("auto", "cuda")) else []
    named, count = _wanted(config.backbone.device, config.trainer)
    if not seen or count > len(seen) or any(index >= len(seen) for index in named):
        yield {}, []
        return
    with ExitStack() as held:
        candidates = [seen[index] for index in named] or seen
        while (taken := _take(candidates, count, held)) is None:
            time.sleep(_POLL)
        gpus, descriptors = taken
        yield {} if named else {"CUDA_VISIBLE_DEVICES": ",".join(gpus)}, descriptors


def visible_gpus() -> list[str]:
    """The GPUs of this process, as `CUDA_VISIBLE_DEVICES` names them."""
    given = os.environ.get("CUDA_VISIBLE_DEVICES")
    if given is not None:
        tokens = [token.strip() for token in given.split(",")]
        # As CUDA reads it: what follows an invalid entry does not count.
        end = next((k for k, token in enumerate(tokens) if token in ("", "-1")), len(tokens))
        return tokens[:end]
    if not Path("/dev/nvidiactl").exists():
        return []
    import torch  # seconds, so only where there is something to count

    return [str(index) for index in range(torch.cuda.device_count())]


def device_count(trainer: Mapping[str, Any]) -> int:
    """How many devices, each with a process of its own, `trainer.devices` asks for; `auto` is one.

    Raises:
        ConfigError: neither a number nor a list of them.
    """
    devices = trainer.get("devices") or 1
    if devices == "auto":
        return 1
    if listed := _listed(trainer):
        return len(listed)
    if not str(devices).isdigit():
        raise ConfigError(f"trainer.devices={devices}: expected a number of devices, a list of their indices, or auto")
    return int(devices)


def device_of(config: TrainConfig, rank: int) -> str:
    """Where the backbone of process `rank` lives: `backbone.device`, or the GPU that `trainer.devices` gives it.

    Raises:
        ConfigError: `backbone.device` names a GPU, and `trainer.devices` several, or one itself.
    """
    named, count = _listed(config.trainer), device_count(config.trainer)
    if count == 1 and not named:
        return config.backbone.device
    if ":" in config.backbone.device:
        raise ConfigError(
            f"backbone.device={config.backbone.device}: expected auto or cuda, since trainer.devices="
            f"{config.trainer['devices']} says where"
        )
    if config.backbone.device not in ("auto", "cuda") or not visible_gpus():
        return config.backbone.device
    return f"cuda:{named[rank] if named else rank}"


def rank_of(trainer: Mapping[str, Any]) -> int:
    """Which of the processes that train one concept this is: 0 where there is one alone."""
    return int(os.environ.get("LOCAL_RANK", 0)) if device_count(trainer) > 1 else 0


def join(trainer: Mapping[str, Any]) -> int:
    """What `rank_of` gives; and a process that the first one started ends with it, and leaves Ctrl-C and SIGTERM to it:
    it would wait for half an hour for one that was killed while they loaded."""
    rank = rank_of(trainer)
    if rank == 0:
        os.environ[_FIRST] = str(os.getpid())  # for those that Lightning starts
        return rank
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)
    threading.Thread(target=_end_with, args=(int(os.environ.get(_FIRST, os.getppid())),), daemon=True).start()
    return rank


def _end_with(parent: int) -> None:
    while os.getppid() == parent:
        time.sleep(0.1)
    os._exit(1)


def _listed(trainer: Mapping[str, Any]) -> list[int]:
    """The GPUs that `trainer.devices` lists."""
    devices = trainer.get("devices")
    return [int(index) for index in devices] if isinstance(devices, list | tuple) else []


def _wanted(device: str, trainer: Mapping[str, Any]) -> tuple[list[int], int]:
    """The GPUs that a config names, none if any will do, and how many it needs."""
    if listed := _listed(trainer):
        return listed, len(listed)
    if found := re.fullmatch(r"cuda:(\d+)", device):
        return [int(found[1])], 1
    return [], device_count(trainer)


def _take(candidates: Sequence[str], count: int, held: ExitStack) -> tuple[list[str], list[int]] | None:
    """Leases on `count` of the candidates; None, and no lease, if fewer are free."""
    with ExitStack() as attempt:
        gpus: list[str] = []
        descriptors: list[int] = []
        for gpu in candidates:
            file = attempt.enter_context(open(_lock_file(gpu), "wb"))
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                continue
            gpus.append(gpu)
            descriptors.append(file.fileno())
            if len(gpus) == count:
                held.push(attempt.pop_all())
                return gpus, descriptors
    return None


def _lock_file(gpu: str) -> Path:
    # A scheduler's job may see its own GPUs alone, numbered from 0: numbers of different jobs are different GPUs.
    job = os.environ.get("SLURM_JOB_ID", "")
    folder = Path(tempfile.gettempdir()) / f"perfusion-gpus-{os.getuid()}"
    folder.mkdir(mode=0o700, exist_ok=True)
    return folder / "-".join(re.sub(r"[^\w.-]", "_", part) for part in (job, gpu) if part)
