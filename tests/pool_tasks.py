"""What workers do in the tests of the pool: nothing that takes time."""

from __future__ import annotations

import os
import signal
import time
from pathlib import Path

_kept: list[int] = []


def double(number: int) -> int:
    print(f"doubling {number}")
    return 2 * number


def remembered(number: int) -> list[int]:
    """All numbers that this process was given so far."""
    _kept.append(number)
    return [*_kept]


def fail(message: str) -> None:
    raise ValueError(message)


def kill_once(marker: Path) -> str:
    """Kill the process, but not where another one has been killed for the same marker."""
    if marker.exists():
        return "alive"
    marker.touch()
    os.kill(os.getpid(), signal.SIGKILL)
    return "never"


def kill() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def sleep(said: Path) -> None:
    """Say which process this is, and be long."""
    said.write_text(f"{os.getpid()}")
    time.sleep(600)


def wait_for(*files: Path) -> None:
    while not all(file.exists() for file in files):
        time.sleep(0.05)


def gpu_of_one_of_two(mine: Path, other: Path) -> str | None:
    """Which GPU this worker sees, while another one is at work."""
    mine.touch()
    wait_for(other)
    return os.environ.get("CUDA_VISIBLE_DEVICES")


def threads() -> str | None:
    return os.environ.get("OMP_NUM_THREADS")
