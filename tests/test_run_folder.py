"""The folder of a run: its name, its states, and what is written into it."""

import dataclasses
import json
import os
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


def test_a_folder_of_another_run_is_refused(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path)
    folder.check(CONFIG)  # nothing there yet
    folder.begin(CONFIG)
    with pytest.raises(ConfigError, match=r"another config \(seed is 0 there and 3 here, 1 more keys differ\)"):
        folder.check(changed(seed=3, trainer={"precision": 16, "enable_progress_bar": True}))
    folder.config.write_text("seed: [")
    with pytest.raises(ConfigError, match=r"config\.yaml: not a readable config"):
        folder.check(CONFIG)


def test_finishing_leaves_metrics_and_marker_and_no_checkpoints(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path / "run")
    folder.begin(CONFIG)
    folder.checkpoints.mkdir()
    (folder.checkpoints / "step-000050.safetensors").write_bytes(b"x")
    assert not folder.finished
    folder.finish({"step_kept": 50})
    assert folder.finished and json.loads(folder.metrics.read_text()) == {"step_kept": 50}
    assert sorted(os.listdir(folder.path)) == ["DONE", "config.yaml", "metrics.json"]


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
    own = folder.checkpoints / "sd15.safetensors"
    mine = [own, folder.metrics, folder.samples]
    for file in mine:
        file.write_text("mine")
    folder.clear()
    assert all(file.read_text() == "mine" for file in mine)
    folder.config.write_text("mine: 1\n")
    with pytest.raises(ConfigError, match="was not written by a run, so nothing is removed"):
        folder.clear()
    assert all(file.exists() for file in [*mine, folder.config])
    (folder.checkpoints / "step-000004.safetensors").touch()
    folder.finish({})
    assert [*folder.checkpoints.iterdir()] == [own]


def test_replacing_a_run_is_not_asked_for_again_by_its_config(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path / "run")
    folder.begin(changed(run=RunConfig(overwrite=True)))
    assert not read_config(folder.config).run.overwrite


def test_numbers_of_other_types_differ_by_name(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path / "run")
    folder.begin(changed(method={**CONFIG.method, "beta": 1}))
    with pytest.raises(ConfigError, match=r"method\.beta is 1 there and 1\.0 here"):
        folder.check(changed(method={**CONFIG.method, "beta": 1.0}))


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
