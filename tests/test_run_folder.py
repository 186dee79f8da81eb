"""The folder of a run: its name, its states, and what is written into it."""

import dataclasses
import json
import os
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from perfusion.config import BackboneConfig, ConceptConfig, ConfigError, CovarianceConfig, RunConfig, TrainConfig
from perfusion.training.loggers import MetricsCSV
from perfusion.training.run_folder import RunFolder, config_hash, peak_memory_bytes, read_config

CONFIG = TrainConfig(
    experiment="cat_oneshot",
    backbone=BackboneConfig(name="toyland", covariance=CovarianceConfig(cache="/a")),
    method={"name": "perfusion", "steps": 300, "beta": 0.75},
    concept=ConceptConfig(name="my cat", superclass="cat", placeholder="<cat*>"),
    trainer={"enable_progress_bar": True, "precision": 32},
    callbacks={"checkpoint": {"every": 50}, "select": {"every": 25}},
)


def changed(**changes: Any) -> TrainConfig:
    return dataclasses.replace(CONFIG, **changes)


def test_the_name_follows_from_the_config() -> None:
    folder = RunFolder.of(CONFIG)
    assert folder == RunFolder.of(changed()) and not folder.path.exists()
    assert folder.path.parent == Path("runs/cat_oneshot")
    assert folder.path.name == f"my_cat-perfusion-{config_hash(CONFIG)}"
    assert RunFolder.of(changed(run=RunConfig(dir="/x/y"))).path == Path("/x/y")
    assert RunFolder.of(changed(run=RunConfig(root="/r"))).path == Path("/r/cat_oneshot") / folder.path.name
    assert RunFolder.of(changed(experiment="../..")).path.parts[:2] == ("runs", "_")


@pytest.mark.parametrize(
    "changes",
    [
        {"seed": 1},
        {"method": {**CONFIG.method, "beta": 0.7}},
        {"trainer": {**CONFIG.trainer, "precision": "bf16-mixed"}},
        {"concept": dataclasses.replace(CONFIG.concept, images=["a.jpg"])},
        {"concept": dataclasses.replace(CONFIG.concept, masks="clipseg")},
        {"backbone": dataclasses.replace(CONFIG.backbone, covariance=CovarianceConfig(cache="/a", positions="words"))},
        {"callbacks": {"checkpoint": {"every": 50}, "select": {"every": 5}}},
        {"callbacks": {"checkpoint": {"every": 50}}},
    ],
)
def test_what_changes_the_result_changes_the_hash(changes: dict[str, Any]) -> None:
    assert config_hash(changed(**changes)) != config_hash(CONFIG)


@pytest.mark.parametrize(
    "changes",
    [
        {"run": RunConfig(dir="/elsewhere", overwrite=True)},
        {"logger": {"wandb": {"_target_": "x"}}},
        {"trainer": {**CONFIG.trainer, "enable_progress_bar": False}},
        {"callbacks": {"checkpoint": {"every": 3}, "select": {"every": 25}}},
        {"backbone": dataclasses.replace(CONFIG.backbone, covariance=CovarianceConfig(cache="/b"))},
        {"backbone": dataclasses.replace(CONFIG.backbone, gradient_checkpointing=True)},
        {"concept": dataclasses.replace(CONFIG.concept, masks_cache="/b")},
    ],
)
def test_what_does_not_change_the_result_does_not(changes: dict[str, Any]) -> None:
    assert config_hash(changed(**changes)) == config_hash(CONFIG)


def test_a_config_comes_back_from_its_file(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path / "run")
    folder.begin(CONFIG)
    assert read_config(folder.config) == CONFIG
    assert folder.config.read_text().startswith("# Train this again")
    folder.check(CONFIG)
    assert folder.holds(CONFIG) and not folder.holds(changed(seed=1))
    folder.begin(changed(run=RunConfig(overwrite=True)))
    assert not read_config(folder.config).run.overwrite, "replacing a run is not asked for again by its config"


def test_a_folder_of_another_run_is_refused(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path)
    folder.check(CONFIG)  # nothing there yet
    folder.begin(CONFIG)
    with pytest.raises(ConfigError, match=r"another config \(seed is 0 there and 3 here, 1 more keys differ\)"):
        folder.check(changed(seed=3, trainer={"precision": 16, "enable_progress_bar": True}))
    folder.begin(changed(method={**CONFIG.method, "beta": 1}))
    with pytest.raises(ConfigError, match=r"method\.beta is 1 there and 1\.0 here"):
        folder.check(changed(method={**CONFIG.method, "beta": 1.0}))
    folder.config.write_text("seed: [")
    with pytest.raises(ConfigError, match=r"config\.yaml: not a readable config"):
        folder.check(CONFIG)


def test_finishing_leaves_metrics_and_marker_and_no_checkpoints(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path / "run")
    folder.begin(CONFIG)
    folder.checkpoints.mkdir()
    (folder.checkpoints / "step-000050.safetensors").write_bytes(b"x")
    folder.finish({})
    assert folder.marker.exists() and not folder.finished, "without its concept"
    folder.begin(CONFIG)
    folder.concept.touch()  # written before the samples are drawn
    assert not folder.finished
    folder.finish({"step_kept": 50})
    assert folder.finished and json.loads(folder.metrics.read_text()) == {"step_kept": 50}
    assert sorted(os.listdir(folder.path)) == ["DONE", "concept.safetensors", "config.yaml", "metrics.json"]


def test_clearing_leaves_what_is_not_the_runs(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path)
    folder.begin(CONFIG)
    for name in ("concept.safetensors", "samples.png", "metrics.csv", "notes.txt"):
        (tmp_path / name).write_text("x")
    for name in ("checkpoints/step-000050.safetensors", "diffusers/x.safetensors"):
        (tmp_path / name).parent.mkdir()
        (tmp_path / name).write_text("x")
    folder.finish({})
    folder.clear()
    assert os.listdir(tmp_path) == ["notes.txt"]


def test_files_that_no_run_wrote_stay(tmp_path: Path) -> None:
    """`run.dir=.` beside a user's own models."""
    folder = RunFolder(tmp_path)
    folder.checkpoints.mkdir()
    mine = [folder.checkpoints / "sd15.safetensors", folder.checkpoints / "step-abc.safetensors", tmp_path / "notes"]
    for file in mine:
        file.write_text("mine")
    folder.clear()
    folder.check_place()
    folder.config.write_text("mine: 1\n")
    for refuses in (folder.clear, folder.check_place):
        with pytest.raises(ConfigError, match="was not written by a run, so it stays"):
            refuses()
    assert all(file.read_text() == "mine" for file in mine)
    folder.begin(CONFIG)
    (folder.checkpoints / "step-000002.safetensors").mkdir()
    (folder.checkpoints / "step-000004.safetensors").touch()
    folder.finish({})
    assert sorted(os.listdir(folder.checkpoints)) == ["sd15.safetensors", "step-000002.safetensors", mine[1].name]


@pytest.mark.parametrize(
    "name", ["concept.safetensors", "metrics.json", "DONE", "checkpoints/step-000002.safetensors", "diffusers/x"]
)
def test_what_a_run_would_replace_is_no_place_for_one(name: str, tmp_path: Path) -> None:
    """A user's own files, or those of a run whose config is gone, so that nobody knows which it was."""
    (tmp_path / name).parent.mkdir(exist_ok=True)
    (tmp_path / name).write_text("mine")
    for refuses in (RunFolder(tmp_path).check_place, RunFolder(tmp_path).clear):
        with pytest.raises(ConfigError, match=f"holds {name.removesuffix('/x')}, and no config.yaml that says"):
            refuses()
    assert (tmp_path / name).read_text() == "mine"


def test_a_folder_of_photos_is_no_place_for_a_run(tmp_path: Path) -> None:
    (tmp_path / "cat.JPG").touch()
    with pytest.raises(ConfigError, match=r"no run's folder, for it holds pictures \(cat\.JPG\)"):
        RunFolder(tmp_path).check_place()
    assert os.listdir(tmp_path) == ["cat.JPG"]
    RunFolder(tmp_path / "run").check_place()
    RunFolder(tmp_path).begin(CONFIG)  # as former versions let it happen
    RunFolder(tmp_path).check_place()


def contents(folder: Path) -> dict[str, str]:
    return {str(file.relative_to(folder)): file.read_text() for file in folder.rglob("*") if file.is_file()}


def finished_with_a_replacement(path: Path) -> RunFolder:
    folder = RunFolder(path)
    for run, seed in ((folder, 0), (folder.replacement, 1)):
        run.begin(changed(seed=seed))
        for name in ("concept.safetensors", "progress/1.png", "tensorboard/events"):
            (run.path / name).parent.mkdir(exist_ok=True)
            (run.path / name).write_text(f"{name} of {seed}")
        run.finish({})
    (path / "diffusers").mkdir()
    for name in ("notes.txt", "tensorboard/notes.txt", "diffusers/old"):
        (path / name).write_text("mine")
    return folder


def test_a_replacement_takes_the_place_of_the_run_and_leaves_other_files(tmp_path: Path) -> None:
    folder = finished_with_a_replacement(tmp_path)
    folder.settle()
    assert folder.finished and folder.holds(changed(seed=1)) and not folder.unsettled
    found = contents(tmp_path)
    assert {"notes.txt", "tensorboard/notes.txt", "DONE"} < {*found} and "diffusers/old" not in found
    assert not [name for name in found if name.startswith(".")] and found["progress/1.png"] == "progress/1.png of 1"
    folder.settle()
    assert contents(tmp_path) == found


def test_a_kill_at_any_moment_leaves_one_of_the_two_and_is_gone_on_with(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of every change that is made on the disk, all that follow are left out in turn."""
    finished_with_a_replacement(tmp_path / "whole").settle()
    expected = contents(tmp_path / "whole")
    for moment in range(100):
        folder, left = finished_with_a_replacement(tmp_path / str(moment)), [moment]

        def dying(change: Any, left: list[int] = left) -> Any:
            def change_or_die(*args: Any, **keywords: Any) -> Any:
                if left[0] == 0:
                    raise KeyboardInterrupt
                left[0] -= 1
                return change(*args, **keywords)

            return change_or_die

        with monkeypatch.context() as patch:
            for owner, name in ((os, "replace"), (os, "unlink"), (os, "rmdir"), (Path, "unlink"), (Path, "rmdir")):
                patch.setattr(owner, name, dying(getattr(owner, name)))
            try:
                folder.settle()
                break
            except KeyboardInterrupt:
                pass
        found, concept = contents(folder.path), "concept.safetensors"
        assert f"{concept} of 1" in [found.get(f"{place}{concept}") for place in ("", ".new/", ".ready/")]
        assert not folder.finished or found[concept] == f"{concept} of {read_config(folder.config).seed}"
        RunFolder(folder.path).check_place()
        folder.settle()
        assert contents(folder.path) == expected
    assert 8 < moment < 99


def test_what_a_run_has_read_is_part_of_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder, read = RunFolder(tmp_path), {"concept.images": {"a.png": "1", "b.png": "2"}}
    folder.begin(CONFIG)
    folder.check(CONFIG, read)  # of a former version
    monkeypatch.chdir(tmp_path)
    folder.begin(CONFIG, read)
    folder.check(CONFIG, read)
    folder.check(CONFIG)
    other = {"concept.images": {"a.png": "3", "c.png": "2"}, "concept.masks": {"a.png": "1"}}
    assert folder.holds(CONFIG, read) and not folder.holds(CONFIG, other)
    changes = "concept.images: a.png is another; concept.images: b.png is gone; concept.images: c.png is new; .* is new"
    with pytest.raises(ConfigError, match=changes):
        folder.check(CONFIG, other)
    for text in ("[", "[]", '{"files": 3}'):
        folder.inputs.write_text(text)
        with pytest.raises(ConfigError, match=r"inputs\.json: "):
            folder.check(CONFIG, read)
    folder.clear()
    assert not os.listdir(tmp_path)


def test_a_runs_pictures_are_found_from_everywhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The config stays as it was written, so that it is the same run."""
    folder = RunFolder(tmp_path / "run")
    (tmp_path / "photos").mkdir()
    concept = dataclasses.replace(CONFIG.concept, images=["photos", "/x/y"], masks="clipseg", prior="~/prior")
    monkeypatch.chdir(tmp_path)
    folder.begin(changed(concept=concept), {})
    monkeypatch.chdir("/")
    found = read_config(folder.config).concept
    assert found.images == [str(tmp_path / "photos"), "/x/y"] and (found.masks, found.prior) == ("clipseg", "~/prior")
    assert folder.holds(changed(concept=concept), {})
    folder.check(changed(concept=concept), {})


def test_one_process_at_a_time(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path / "run")
    holds = f"""
import sys, time
from pathlib import Path
from perfusion.training.run_folder import RunFolder
with RunFolder(Path({str(folder.path)!r})).held():
    print("held", flush=True)
    time.sleep(60)
"""
    other = subprocess.Popen([sys.executable, "-c", holds], stdout=subprocess.PIPE)
    try:
        assert other.stdout is not None and other.stdout.readline()
        with pytest.raises(ConfigError, match=rf"process {other.pid} on {socket.gethostname()} trains there"):
            folder.held().__enter__()
    finally:
        other.kill()
        other.wait()
    assert os.listdir(folder.path) == [".training"], "what a killed one leaves holds nobody"
    with folder.held():
        with pytest.raises(ConfigError, match=f"process {os.getpid()} on "):
            folder.held().__enter__()
        folder.begin(CONFIG)
    assert os.listdir(folder.path) == ["config.yaml"]
    with RunFolder(tmp_path / "other").held():
        pass
    assert os.listdir(tmp_path) == ["run"], "a folder that nothing was written to is not left"


def test_metrics_csv_has_one_row_per_step_and_grows_columns(tmp_path: Path) -> None:
    path = tmp_path / "metrics.csv"
    log = MetricsCSV(path)
    assert path.read_text() == "step\n"
    log.log_metrics({"loss": 0.5, "step": 1.0, "epoch": 0}, 1)
    log.log_metrics({"clip_i": 0.25}, 2)
    log.log_metrics({"loss": 0.125}, 2)
    log.log_metrics({"loss": 1.0}, 3)
    assert path.read_text() == "step,loss,clip_i\n1,0.5,\n2,0.125,0.25\n3,1.0,\n"


def test_metrics_csv_goes_on_where_the_checkpoint_was(tmp_path: Path) -> None:
    path = tmp_path / "metrics.csv"
    log = MetricsCSV(path)
    for step in (1, 2, 3):
        log.log_metrics({"loss": 1 / step, "x": step}, step)
    path.write_text(path.read_text() + "4,0.2")  # cut off by a kill
    resumed = MetricsCSV(path, keep_until=2)
    resumed.log_metrics({"loss": 9.0, "x": 9}, 3)
    assert path.read_text() == "step,loss,x\n1,1.0,1\n2,0.5,2\n3,9.0,9\n"
    assert MetricsCSV(path).rows == [] and path.read_text() == "step\n", "a new run begins a new file"


def test_peak_memory_is_in_bytes() -> None:
    assert 10_000_000 < peak_memory_bytes() < 1e12
