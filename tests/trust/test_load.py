"""`make demo` beside as many busy processes as there are cores takes at most four times as long as alone."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
TIMES = 4.0
BUSY = "import torch; a = torch.ones(256, 256)\nwhile True: a @ a"


@contextmanager
def busy(count: int) -> Iterator[None]:
    """Others that compute: a thread each, in sessions of their own, as another user's would be."""
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", BUSY]
    others = [subprocess.Popen(command, env=environment, start_new_session=True) for _ in range(count)]
    try:
        yield
    finally:
        for other in others:
            other.kill()
            other.wait()


def seconds(folder: Path) -> float:
    environment = {name: value for name, value in os.environ.items() if not name.startswith("OMP_")}
    command = [sys.executable, "-m", "perfusion.demo", f"run.root={folder}", "trainer.enable_progress_bar=false"]
    started = time.monotonic()
    subprocess.run(command, cwd=ROOT, env=environment, check=True, stdout=subprocess.DEVNULL)
    return time.monotonic() - started


@pytest.mark.trust
@pytest.mark.timeout(1800)
def test_demo_beside_others(tmp_path: Path, record_property: Callable[[str, object], None]) -> None:
    alone = seconds(tmp_path / "alone")
    with busy(os.cpu_count() or 1):
        beside = seconds(tmp_path / "beside")
    record_property("seconds alone", round(alone))
    record_property("seconds beside busy processes", round(beside))
    record_property("busy processes", os.cpu_count())
    record_property("times as long", round(beside / alone, 2))
    assert beside <= TIMES * alone
