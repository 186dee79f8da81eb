"""The whole way from an experiment to its page, with trainings of two steps and pictures of two."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from eval.record import read_scores
from experiments import paper, tune
from experiments.evidence import experiments
from experiments.pool import Outcome, Task
from experiments.protocol import TABLE_TOYS, Protocol
from experiments.results import page
from experiments.runner import Runner, Wanted
from experiments.settings import (
    DESCRIBED,
    DREAMBOOTH,
    FEW_BETAS,
    PERFUSION,
    TEXTUAL_INVERSION,
    Setting,
    by_beta,
    config_of,
    preset_value,
)
from perfusion.cli import run_cli
from perfusion.config import ConfigError
from perfusion.manifest import read_manifest
from perfusion.training.run_folder import RunFolder, read_config

CHANGES = "method.steps=2,method.batch_size=1,backbone.covariance.count=50"


class Inline:
    """Stands for a pool: does everything in this process, and remembers it."""

    calls: list[Task]

    def __init__(self, size: int, logs: Path, executor: Any = None) -> None:
        self.size = size
        Inline.calls = []

    def __enter__(self) -> Inline:
        return self

    def __exit__(self, *_: Any) -> None:
        pass

    def run(self, tasks: Sequence[Task], done: Callable[[Outcome], None] = lambda outcome: None) -> list[str]:
        for task in tasks:
            Inline.calls.append(task)
            started = time.monotonic()
            done(Outcome(task, task.call(*task.arguments), seconds=time.monotonic() - started))
        return []


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("paper")


def run(folder: Path, *words: str) -> int:
    small = ["concepts=1", "prompts=2", "seeds=1", "steps=2", "workers=1", "resamples=20"]
    cache = f"backbone.covariance.cache={folder}/covariance"
    return run_cli(paper.main, [*small, f"runs={folder}/runs", f"changes=[{CHANGES},{cache}]", *words])


@pytest.fixture(scope="module")
def ran(folder: Path) -> Iterator[Path]:
    """One experiment, done in this process; `test_two_workers_in_ray_find_what_one_here_found` does it in others."""
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(paper, "Pool", Inline)
        assert run(folder, "only=one_shot", "report=false") == 0
    (root,) = (path for path in (folder / "runs").iterdir() if (path / "trained").is_dir())
    yield root


def pictures(root: Path) -> dict[Path, int]:
    return {file: file.stat().st_mtime_ns for file in root.rglob("pictures/**/*.png")}


def test_a_result_says_what_it_was_found_with(ran: Path, folder: Path) -> None:
    found = json.loads((folder / "runs" / "small" / "results" / "one_shot.json").read_text())
    assert (
        found["id"] == "one_shot"
        and found["verdict"] in ("holds", "fails", "undecided")
        and "2305.01644" in found["source"]
    )
    assert found["provenance"]["versions"] and len(found["config_hash"]) == 12 and found["weights"] == ran.name
    assert found["protocol"]["concepts"][0]["name"] == TABLE_TOYS[0].name and found["protocol"]["seeds"] == [0]
    assert [len(series["settings"]) for series in found["series"]] == [3, 3, 1]
    scores = found["series"][0]["settings"][0]["scores"]
    assert {"identity", "prompt", "clip_i", "clip_t"} <= scores.keys() and {*scores["clip_i"]} == {
        "mean",
        "low",
        "high",
    }
    assert found["seconds"]["training"] > 0 and found["seconds"]["drawing"] > 0
    (decisive,) = (check for check in found["checks"] if check["decides"])
    assert found["verdict"] == decisive["verdict"]


def test_two_workers_in_ray_find_what_one_here_found(
    ran: Path, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ray = pytest.importorskip("ray")
    monkeypatch.setenv("RAY_ADDRESS", "local")  # one of its own
    try:
        elsewhere = ("executor=ray", "workers=2", f"runs={tmp_path}/runs")
        assert run(folder, "only=one_shot", "report=false", *elsewhere) == 0
    finally:
        ray.shutdown()
    here, there = (
        json.loads((path / "runs" / "small" / "results" / "one_shot.json").read_text()) for path in (folder, tmp_path)
    )
    for document in (here, there):
        del document["seconds"], document["provenance"]
    assert there == here and here["series"][0]["settings"]


def test_runs_and_pictures_can_be_used_by_hand(ran: Path) -> None:
    runs = [path for path in (ran / "trained").iterdir() if path.is_dir()]
    assert len(runs) == 2 and all(RunFolder(run).finished for run in runs)
    assert {read_config(run / "config.yaml").concept.toyland.count for run in runs} == {1, 5}
    folders = [path.parent for path in ran.rglob("pictures/**/manifest.json")]
    assert len(folders) == 7
    records = [record for path in folders for record in read_manifest(path)]
    assert len(records) == 14 and {record.dials.get("beta") for record in records} == {None, *FEW_BETAS}
    assert {record.method for record in records} == {"base", "perfusion", "perfusion, 5 pictures"}
    assert {record.instance for record in records} == {TABLE_TOYS[0].instance}


def test_nothing_is_made_twice_and_what_is_missing_is(
    ran: Path, folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(paper, "Pool", Inline)
    before = pictures(ran)
    assert run(folder, "only=one_shot") == 0 and pictures(ran) == before
    assert {task.kind for task in Inline.calls} == {"draw"}
    assert "one_shot: " in capsys.readouterr().out
    lost = next(iter(before))
    lost.unlink()
    assert run(folder, "only=one_shot", "report=false") == 0
    after = pictures(ran)
    assert {file for file in after if after[file] != before[file]} == {lost}, "one picture was missing"
    with Image.open(lost) as image:
        image.save(lost)  # without its text: nobody knows what made it
    assert run(folder, "only=one_shot", "report=false") == 0
    with Image.open(lost) as image:
        assert "prompt" in getattr(image, "text", {})


def test_the_report_has_all_points(ran: Path, folder: Path) -> None:
    _, points = read_scores(ran / "scores.json")
    assert len(points) == 7
    assert "The paper&#x27;s claims on Toyland" in (ran / "report" / "index.html").read_text()[:1000]
    page = (folder / "runs" / "small" / "docs" / "results.md").read_text()
    assert (
        "| [one_shot](#one_shot) |" in page
        and "](images/results/one_shot.png)" in page
        and "![Identity over prompt accuracy]" in page
    )
    assert (folder / "runs" / "small" / "docs" / "images" / "results" / "one_shot-clip.png").is_file()


def test_a_failed_training_is_listed_and_the_rest_goes_on(
    ran: Path, folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    class Broken(Inline):
        def run(self, tasks: Sequence[Task], done: Callable[[Outcome], None] = lambda outcome: None) -> list[str]:
            bad = [task.name for task in tasks if task.kind == "train"]
            assert bad
            lost = [task for task in tasks if {task.name, *task.needs} & {*bad}]
            for task in tasks:
                if task in lost:
                    done(Outcome(task, error="its worker was killed"))
                else:
                    super().run([task], done)
            return [f"{task.name}: its worker was killed" for task in lost]

    monkeypatch.setattr(paper, "Pool", Broken)
    assert run(folder, "only=one_shot,key_lock", "report=false") == 1
    said = capsys.readouterr()
    assert "one_shot: " in said.out
    assert "failed: train perfusion, trained keys, cat-101: its worker was killed" in said.err
    assert "failed: key_lock: not judged, 3 of 10 sets of pictures are missing" in said.err


def test_an_experiment_that_cannot_be_judged_is_listed_and_the_rest_goes_on(
    ran: Path, folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def broken(*_: Any) -> Any:
        raise ZeroDivisionError("no such number")

    monkeypatch.setattr(paper, "Pool", Inline)
    monkeypatch.setattr(paper.results, "document", broken)
    assert run(folder, "only=one_shot", "report=false") == 1
    assert len(Inline.calls) == 3, "all tasks were done"
    assert "failed: one_shot: not judged, ZeroDivisionError: no such number" in capsys.readouterr().err


def test_pairs_the_base_model_and_the_middle_of_a_training(ran: Path, folder: Path) -> None:
    protocol = Protocol(prompts=Protocol.prompts[:1], pair_prompts=Protocol.pair_prompts[:1], seeds=(0,), steps=2)
    changes = (*CHANGES.split(","), f"backbone.covariance.cache={folder}/covariance")
    runner = Runner(folder / "runs", protocol, changes)
    cat, dog = TABLE_TOYS[:2]
    (beta,) = by_beta(PERFUSION, (0.5,))
    early, late = (Setting(TEXTUAL_INVERSION, share=share) for share in (1 / 3, 1.0))
    wanted = [Wanted(beta, (cat, dog)), Wanted(Setting(None), (cat,)), Wanted(early, (cat,)), Wanted(late, (cat,))]
    wanted.append(Wanted(DESCRIBED, (cat,)))
    pool: Any = Inline(1, folder)
    pool.run(runner.tasks(wanted), runner.keep)
    both, base, first, last, told = (runner.points[one] for one in wanted)
    assert both.concept == f"{cat.name} + {dog.name}" and both.pictures[0].prompt == "a photo of a <cat*> and a <dog*>"
    assert "identity" in both.pictures[0].scores and both.setting["setting"] == "2 concepts"
    assert base.method == "base" and "identity" in base.pictures[0].scores and base.pictures[0].training is None
    assert told.pictures[0].prompt.startswith("a photo of a blue-eyed gray spotted green cat ")
    assert "identity" in told.pictures[0].scores, "looks that are told are those of the toy, not wishes of the prompt"
    assert (first.setting["setting"], last.setting["setting"]) == ("trained 1 steps", "trained 2 steps")
    assert first.pictures[0].training != last.pictures[0].training


def test_settings_become_configs_as_the_command_line_makes_them(tmp_path: Path) -> None:
    toy = TABLE_TOYS[3]
    config = config_of(DREAMBOOTH.changed("x", "method.steps=7"), toy, tmp_path)
    assert (config.method["name"], config.method["steps"]) == ("dreambooth", 7)
    assert (config.concept.superclass, config.concept.toyland.instance) == ("teddy", toy.instance)
    assert RunFolder.of(config).path.parent == tmp_path / "trained" and "select" not in config.callbacks
    with pytest.raises(ConfigError, match="method=nothing: no such option"):
        config_of(PERFUSION.__class__("x", "nothing"), toy, tmp_path)
    runner = Runner(tmp_path, Protocol())
    same = PERFUSION.changed("another name")
    with pytest.raises(ConfigError, match="is the same as"):
        runner.tasks(Wanted(s, (toy,)) for t in (PERFUSION, same) for s in by_beta(t, (0.5,)))


def test_a_result_that_cannot_be_read_is_found_before_anything_is_done(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    old = tmp_path / "out" / "results" / "mask.json"
    old.parent.mkdir(parents=True)
    old.write_text('{"version": 0}')
    assert run(tmp_path, f"out={tmp_path}/out") == 2
    assert f"{old}: no result of this version" in capsys.readouterr().err and not (tmp_path / "runs").exists()


def test_tuning_goes_on_and_prints_a_preset(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("optuna")
    monkeypatch.setattr(tune, "Pool", Inline)
    cache = f"backbone.covariance.cache={folder}/covariance"
    words = ["methods=perfusion", "toys=1", "prompts=1", "seeds=1", "steps=1", f"changes=[{CHANGES},{cache}]"]
    assert run_cli(tune.main, [*words, "trials=1", f"out={folder}/tune"]) == 0
    first = len(Inline.calls)
    assert run_cli(tune.main, [*words, "trials=2", f"out={folder}/tune"]) == 0
    assert len(Inline.calls) == first == 2, "a training and its pictures; the first trial is not repeated"
    said = capsys.readouterr().out
    rates = [f"method.{key}={preset_value(PERFUSION, key)}" for key in ("value_rate", "embedding_rate")]
    assert " ".join(rates) in said, "the preset comes first"
    best = (folder / "tune" / "best.yaml").read_text()
    assert best in said and "the best of 2 trials" in best and "\nvalue_rate: " in best and "at beta-" in best
    assert run_cli(tune.main, [*words, "trials=2", f"out={folder}/tune", "steps=2"]) == 2
    assert (
        "perfusion.db holds another search (sampler is 1 steps, guidance 4 there and 2 steps, guidance 4 here)"
        in capsys.readouterr().err
    )


def test_methods_have_as_many_trials_as_each_other(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("optuna")
    monkeypatch.setattr(tune, "Pool", Inline)
    cache = f"backbone.covariance.cache={folder}/covariance"
    words = ["toys=1", "prompts=1", "seeds=1", "steps=1", f"changes=[{CHANGES},{cache}]", f"out={folder}/fair"]
    assert run_cli(tune.main, [*words, "methods=perfusion", "trials=1"]) == 0
    assert run_cli(tune.main, [*words, "methods=perfusion,lora", "trials=2"]) == 0
    best = (folder / "fair" / "best.yaml").read_text()
    assert best.count("the best of 2 trials") == 2 and "lora_toyland.yaml" in best
    asked = [task.name for task in Inline.calls if task.kind == "train"]
    assert sum("lora" in name for name in asked) >= 1


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_every_experiment_from_nothing_to_its_page(tmp_path: Path) -> None:
    words = ["concepts=2", "prompts=1", "seeds=2", "steps=1", f"only={','.join(one.id for one in experiments())}"]
    assert run(tmp_path, *words) == 0
    found = {path.stem for path in (tmp_path / "runs" / "small" / "results").glob("*.json")}
    assert found == {one.id for one in experiments()}
    _, points = read_scores(next((tmp_path / "runs").glob("*/scores.json")))
    of_pairs = [point for point in points if "+" in point.concept]
    assert of_pairs and all("2 concepts" in str(point.setting["setting"]) for point in of_pairs)


def test_a_page_from_results_alone() -> None:
    made_up = {
        "id": "mask", "place": 4, "claim": "It helps.", "source": "there", "verdict": "fails", "key": "−0.1 | of it",
        "test": "Above 0.", "series": [], "tables": [{"title": "T", "head": ["a", "b"], "rows": [["1", "2"]]}],
        "checks": [
            {"what": "gain", "mean": -0.1, "low": -0.2, "high": -0.05, "expected": "above 0", "decides": True,
             "verdict": "fails"},
            {"what": "beside", "mean": 1.0, "low": None, "high": None, "expected": "above 0", "decides": False,
             "verdict": "undecided"},
        ],
        "caveats": "Small.", "notes": "Because.", "weights": "a1", "config_hash": "0" * 12,
        "runs": {"perfusion": ["a"]},
        "seconds": {"training": 60, "drawing": 120},
        "provenance": {"git_commit": None, "git_dirty": None},
        "protocol": {"prompts": [], "concepts": [{}] * 8, "seeds": [], "groups": 8},
    }  # fmt: skip
    text = page([made_up])
    assert "| [mask](#mask) | It helps. | **fails** | −0.1 \\| of it |" in text
    assert "| gain | -0.100 | -0.200 to -0.050 | above 0 | **fails** |" in text
    assert "| beside | 1.000 | – | above 0 | undecided (beside) |" in text and "Not decided" not in text
    assert "| a | b |\n| --- | --- |\n| 1 | 2 |" in text and "Notes: Because." in text and "commit unknown" in text
    assert "same settings" not in text and "same settings** of perfusion" in page(
        [made_up, {**made_up, "id": "size", "runs": {"perfusion": ["b"]}}]
    )
    assert "same weights" not in text and "same weights" in page([made_up, {**made_up, "id": "size", "weights": "b2"}])
    open_ = {"what": "gain", "mean": 0.02, "low": -0.02, "high": 0.06, "expected": "above 0", "decides": True,
             "verdict": "undecided"}  # fmt: skip
    for mean, said in ((0.02, "about 32 would decide it"), (0.0001, "more than 1,000 would decide it")):
        check = {**open_, "mean": mean, "low": mean - 0.04, "high": mean + 0.04}
        text = page([{**made_up, "checks": [check]}])
        assert f"Not decided by 8 concepts: gain. If it is what was measured, {said}" in text
        assert "these decide what is 0.040 or more away" in text
    pairs = {**made_up, "checks": [open_], "protocol": {**made_up["protocol"], "groups": 4}}  # type: ignore[dict-item]
    assert "Not decided by 4 pairs" in page([pairs]) and "about 16 would" in page([pairs])
    drawn = {**made_up["protocol"], "concepts": [], "steps": 12, "guidance": 4, "seeds": [0]}  # type: ignore[dict-item]
    drawn = {**made_up, "series": [{"label": "a", "settings": []}], "axes": ["prompt", "identity"], "protocol": drawn}
    more = {**drawn, "id": "size", "protocol": {**drawn["protocol"], "seeds": [0, 1]}}  # type: ignore[dict-item]
    assert "0 prompts and 1 seed for every setting;" in page([drawn])
    assert "0 prompts and 1 seed for every setting (of size 2);" in page([drawn, more])
