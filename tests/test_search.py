"""The search for settings: three trials on an objective that costs nothing, stopped and taken up again."""

import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from omegaconf import OmegaConf

from experiments import search
from experiments.study import SPACES, read_space
from perfusion.cli import run_cli
from perfusion.config import TrainConfig
from perfusion.training import sweep
from perfusion.training.composition import multirun
from perfusion.training.run_folder import RunFolder, read_config

pytest.importorskip("optuna")

ROOT = Path(__file__).resolve().parents[1]
RATES = "method.value_rate: {low: 0.001, high: 0.1, log: true}\n"


class Runs:
    """Stands for the runs of a trial: leaves what they leave, and remembers their configs."""

    def __init__(self) -> None:
        self.configs: list[TrainConfig] = []
        self.interrupt_at = self.fail_at = 0  # the how-manieth run

    def __call__(self, words: Sequence[str]) -> list[sweep.Result]:
        jobs = multirun(words)
        assert jobs is not None
        planned = sweep.plan(jobs, words)
        for config in jobs.configs:
            self._run(config)
        return [sweep.result_of(job) for job in planned.jobs]

    def _run(self, config: TrainConfig) -> None:
        self.configs.append(config)
        folder = RunFolder.of(config)
        folder.begin(config)
        if len(self.configs) == self.interrupt_at:
            raise KeyboardInterrupt
        if len(self.configs) == self.fail_at:
            folder.error.write_text("killed by SIGKILL\n")
        else:
            folder.concept.touch()
            folder.finish({"scores": {"harmonic": 1 - config.method["value_rate"] + config.seed, "name": "x"}})

    @property
    def rates(self) -> list[float]:
        return [config.method["value_rate"] for config in self.configs]


@pytest.fixture
def runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Runs:
    monkeypatch.chdir(tmp_path)
    Path("rates.yaml").write_text(RATES)
    return Runs()


def run(runs: Runs, *words: str) -> int:
    return run_cli(lambda argv: search.main(argv, runs), ["search.space=rates.yaml", "search.trials=3", *words])


def test_the_best_of_three_trials_is_written(runs: Runs, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(runs) == 0
    rates = runs.rates
    assert len(set(rates)) == 3 and all(0.001 <= rate <= 0.1 for rate in rates)
    best = min(rates)
    shown = capsys.readouterr().out
    assert f"best: scores.harmonic {1 - best:.6g}" in shown and "trial 3 of 3" in shown
    file = Path("runs/.search/search/best.yaml")
    config = read_config(file)
    assert config.method["value_rate"] == best and RunFolder.of(config).finished
    printed = OmegaConf.create(shown[shown.index("\nmethod:") :].rpartition("\n")[0].rpartition("\n")[0])
    assert printed == {"method": {"value_rate": best}}

    assert run(runs) == 0 and len(runs.configs) == 3, "it is over"
    assert run(runs, "search.trials=5") == 0 and len(runs.configs) == 5, "and can go on"
    assert read_config(file).method["value_rate"] == min(runs.rates)
    assert run(runs, "search.name=other", "search.direction=minimize") == 0
    assert read_config(Path("runs/.search/other/best.yaml")).method["value_rate"] == max(runs.rates[5:])


def test_a_stopped_trial_is_taken_up_again(runs: Runs, capsys: pytest.CaptureFixture[str]) -> None:
    runs.interrupt_at = 2
    assert run(runs) == 130
    assert run(runs) == 0
    rates = runs.rates
    assert len(rates) == 4 and rates[1] == rates[2], "with the settings that it had, so its run resumes"
    assert run(runs) == 0 and len(runs.rates) == 4
    whole = Runs()
    assert run(whole, "search.name=whole") == 0
    assert whole.rates == [rates[0], *rates[2:]] and len(set(whole.rates)) == 3, "as if it had never stopped"


def test_a_failed_trial_costs_itself_alone(runs: Runs, capsys: pytest.CaptureFixture[str]) -> None:
    runs.fail_at = 1
    assert run(runs) == 0
    shown = capsys.readouterr().out
    assert "trial 1 failed: runs/" in shown and "killed by SIGKILL" in shown and "none has succeeded yet" in shown
    assert read_config(Path("runs/.search/search/best.yaml")).method["value_rate"] == min(runs.rates[1:])
    runs.fail_at = len(runs.configs) + 1
    assert run(runs, "search.name=bad", "search.trials=1") == 1
    assert "none of 1 trials succeeded" in capsys.readouterr().err


def test_a_trial_with_several_runs_counts_their_mean(runs: Runs, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(runs, "seed=0,4", "search.trials=1") == 0
    assert [config.seed for config in runs.configs] == [0, 4] and len(set(runs.rates)) == 1
    assert f"best: scores.harmonic {3 - runs.rates[0]:.6g}" in capsys.readouterr().out


def test_ranges_choices_and_whole_numbers(runs: Runs) -> None:
    Path("rates.yaml").write_text(
        RATES + "method.steps: {low: 50, high: 150, step: 50}\nmethod.key_lock: {choices: [local, none]}\n"
    )
    assert run(runs, "search.trials=6") == 0
    assert {config.method["steps"] for config in runs.configs} <= {50, 100, 150}
    assert {config.method["key_lock"] for config in runs.configs} == {"local", "none"}


@pytest.mark.parametrize(
    ("space", "words", "parts"),
    [
        ("- a", [], ["rates.yaml", "expected key"]),
        ("method.value_rate: 3", [], ["method.value_rate", "found 3"]),
        ("method.value_rate: {lwo: 3, high: 4}", [], ["method.value_rate.lwo", "'low'"]),
        ("method.value_rate: {low: 4, high: 3}", [], ["expected low below high, found 4 and 3"]),
        ("method.value_rate: {low: 4}", [], ["expected numbers low and high, or choices"]),
        ("method.value_rate: {low: 0, high: 1, log: true}", [], ["method.value_rate.log", "above 0"]),
        ("method.value_rate: {choices: []}", [], ["method.value_rate.choices"]),
        ("concept.nmae: {choices: [a]}", [], ["concept.nmae", "'name'"]),
        (None, ["search.objective=scores.harmonc"], ["search.objective=scores.harmonc", "'harmonc'", "harmonic"]),
        (None, ["search.objective=scores.name"], ["expected a number", "'x'"]),
    ],
)
def test_mistakes(
    runs: Runs, space: str | None, words: list[str], parts: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    if space is not None:
        Path("rates.yaml").write_text(space)
    assert run(runs, *words) == 2
    shown = capsys.readouterr().err
    assert all(part in shown for part in parts), shown
    assert len(runs.configs) == (1 if any("objective" in word for word in words) else 0)


def test_another_search_of_the_same_name_is_refused(runs: Runs, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(runs, "search.trials=1") == 0
    assert run(runs, "seed=3") == 2
    assert "holds another search (words is [] there and ['seed=3'] here)" in capsys.readouterr().err


def test_the_shipped_spaces_are_spaces() -> None:
    names = [path.stem for path in SPACES.glob("*.yaml")]
    assert "perfusion" in names and all(read_space(name) for name in names)


def test_a_trial_runs_in_a_process_of_its_own(runs: Runs, monkeypatch: pytest.MonkeyPatch) -> None:
    """The whole way but for the training itself."""
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(ROOT), str(ROOT / "tests")]))
    stub: Any = [sys.executable, str(ROOT / "tests" / "training_stub.py")]
    words = ["search.space=rates.yaml", "search.trials=1"]
    assert run_cli(lambda argv: search.main(argv, lambda trial: sweep.execute(trial, stub)), words) == 0
    assert read_config(Path("runs/.search/search/best.yaml")).method["value_rate"] > 0
