"""A folder of folders is a sweep of concepts, each named after its folder."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
from PIL import Image

from perfusion import train
from perfusion.cli import run_cli
from perfusion.config import ConfigError, TrainConfig
from perfusion.training import sweep
from perfusion.training.composition import multirun
from perfusion.training.folders import each_folder, placeholder_of, superclass_of
from perfusion.training.run_folder import read_config

STUB = [sys.executable, str(Path(__file__).with_name("training_stub.py"))]


@pytest.fixture(autouse=True)
def photos(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    for name in ("cat2", "Teddy bear", "my's dog", "2023", "mask"):
        (tmp_path / "photos" / name).mkdir(parents=True)
        Image.new("RGB", (8, 8)).save(tmp_path / "photos" / name / "1.png")
    (tmp_path / "photos" / "empty").mkdir()
    (tmp_path / "photos" / "notes.txt").touch()
    return tmp_path / "photos"


def configs(*words: str) -> list[TrainConfig]:
    made = each_folder(words)
    assert made[0] == "-m" and sweep.asked_for(made)
    jobs = multirun(made[1:])
    assert jobs is not None
    return jobs.configs


def test_each_is_named_after_its_folder(photos: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (photos / "2023" / "1.png").unlink()
    found = [config.concept for config in configs("concept=photos", "concept.images=photos", "seed=3")]
    assert [(one.name, one.superclass, one.placeholder, one.images) for one in found] == [
        ("Teddy bear", "teddy bear", "<teddy-bear*>", "photos/Teddy bear"),
        ("cat2", "cat", "<cat2*>", "photos/cat2"),
        ("my's dog", "my's dog", "<my-s-dog*>", "photos/my's dog"),
    ]
    assert "3 concepts in photos: Teddy bear, cat2, my's dog" in capsys.readouterr().out
    assert superclass_of("Teddy-bear 2") == "teddy bear" and placeholder_of("Teddy-bear 2") == "<teddy-bear-2*>"


def test_what_is_given_goes_before_and_sweeps_go_on() -> None:
    found = configs(
        "-m", "concept.images=photos/", "concept.superclass=cat", "seed=0,1", "concept.masks=photos/${concept.name}/m"
    )
    assert len(found) == 8 and {config.concept.superclass for config in found} == {"cat"}
    assert [(config.seed, config.concept.masks) for config in found[:3]] == [
        (0, "photos/2023/m"), (0, "photos/Teddy bear/m"), (0, "photos/cat2/m"),
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["concept.images=photos"], "found a folder '2023', expected the kind of thing as its name"),
        (["concept.images=twins"], "found the folders a-1 and a_1, which would both be <a-1[*]>"),
    ],
)
def test_folders_that_cannot_be_told(words: list[str], says: str, photos: Path) -> None:
    for name in ("a-1", "a_1"):
        (photos.parent / "twins" / name).mkdir(parents=True)
        Image.new("RGB", (8, 8)).save(photos.parent / "twins" / name / "1.png")
    with pytest.raises(ConfigError, match=says):
        each_folder(words)


def test_all_else_is_one_concept_as_before(photos: Path) -> None:
    for words in (
        ["concept.images=photos/cat2"],
        ["concept.images=photos/*/*.png"],
        ["concept.images=[photos/cat2,photos/2023]"],
        ["concept.images=photos/empty"],
        ["concept.images=nope"],
        ["seed=1"],
        ["concept.images=photos", "--cfg", "job"],
        ["from=runs/x", "concept.images=photos"],
    ):
        assert each_folder(words) == words
    Image.new("RGB", (8, 8)).save(photos / "1.png")
    assert each_folder(["concept.images=photos"]) == ["concept.images=photos"]


def test_jobs_have_the_config_of_their_folder(photos: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = each_folder(["concept.images=photos", "concept.superclass=cat", "concept.placeholder=<x*>"])
    assert run_cli(lambda argv: sweep.run(argv, STUB), words) == 0
    assert "4 done, 0 skipped, 0 failed, 0 open" in capsys.readouterr().out
    found = {read_config(path).concept.images for path in Path("runs/default").glob("*/config.yaml")}
    assert found == {f"photos/{name}" for name in ("2023", "Teddy bear", "cat2", "my's dog")}


def test_the_command_trains_them_all(
    photos: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    ran: list[str] = []
    monkeypatch.setattr(sweep, "execute", lambda words, command, results: ran.extend(words))
    assert run_cli(train.main, ["concept.images=photos", "concept.superclass=cat"]) == 0
    assert 'concept.name="2023","Teddy bear","cat2","my\'s dog"' in ran
