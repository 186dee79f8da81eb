"""The simulation of a cluster against what is known in closed form."""

import json
import math
import re
from pathlib import Path

import numpy as np
import pytest

from benchmarks import cluster
from benchmarks.cluster import simulate
from perfusion.cli import run_cli


def test_without_failures_it_takes_as_long_as_it_must_and_no_longer_than_any_list_schedule() -> None:
    """Graham's bound for tasks that begin as soon as a worker is free, with chains of two."""
    random = np.random.default_rng(0)
    for workers in (1, 7, 64):
        tasks = random.gamma(4.0, 25.0, (100, 2))
        found = simulate(tasks, workers, 0.0, 0.0, 0.0, random)
        work, chain = tasks.sum() / workers, tasks.sum(axis=1).max()
        assert max(work, chain) - 1e-6 <= found.until <= work + (1 - 1 / workers) * chain + 1e-6
        assert found.useful == pytest.approx(tasks.sum()) and found.lost == found.failures == 0
        assert found.idle == pytest.approx(workers * found.until - tasks.sum(), abs=1e-6)
    tasks = np.full((12, 2), 10.0)
    assert simulate(tasks, 4, 5.0, 0.0, 0.0, random).until == 5 + 6 * 10, "each worker loads its models once"


def test_what_failures_cost_is_what_is_expected() -> None:
    """A task of d seconds that begins anew after each failure fails exp(rate d) - 1 times in the mean, and takes
    (exp(rate d) - 1) / rate seconds."""
    seconds, rate, count, repair = 100.0, 0.002, 20_000, 30.0
    found = simulate(np.full((count, 2), seconds), 16, 0.0, rate, repair, np.random.default_rng(0))
    failures = 2 * count * (math.exp(rate * seconds) - 1)
    assert found.failures == pytest.approx(failures, rel=0.05)
    assert found.lost == pytest.approx(failures / rate - 2 * count * seconds, rel=0.05)
    assert found.repair == pytest.approx(found.failures * repair, rel=0.001), "but for those at the end"
    assert 0 <= found.idle < 16 * 20 * seconds


def test_the_command_takes_times_and_files_from_a_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = tmp_path / "trained" / "cat"
    run.mkdir(parents=True)
    (run / "metrics.json").write_text(json.dumps({"seconds": {"total": 20}}))
    (tmp_path / "pictures" / "cat" / "beta").mkdir(parents=True)
    (tmp_path / "pictures" / "cat" / "beta" / "a.png").write_bytes(bytes(10**6))
    (tmp_path / "seconds.json").write_text(json.dumps({"pictures/cat/beta": 4, "pictures/cat/gamma": 6}))
    words = ["concepts=240", "workers=2", "load=0", "failures=[0]"]
    assert run_cli(cluster.main, [*words, f"runs={tmp_path}"]) == 0
    said = capsys.readouterr().out
    assert "trainings of 20 s, drawings of 10 s" in said and "480 files, 0.2 GB" in said
    assert re.search(r"hours until all is done +1\.00\n", said)
    assert run_cli(cluster.main, [*words, "runs=nowhere"]) == 2
    assert "expected a folder that experiments.paper left" in capsys.readouterr().err
    assert run_cli(cluster.main, [*words, "workers=0"]) == 2
