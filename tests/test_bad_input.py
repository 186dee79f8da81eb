"""Commands answer bad input with status 2 and one sentence, before any long work. The cases stand in bad_input.yaml."""

from __future__ import annotations

import importlib
import os
import shlex
import shutil
from pathlib import Path

import numpy as np
import pytest
import yaml
from PIL import Image

from perfusion.backbones.base import Backbone
from perfusion.cli import run_cli
from perfusion.concept import save_concept
from perfusion.methods.base import Word
from tests.concepts import random_concept, untrained_concept

TABLE: dict[str, list[list[str]]] = yaml.safe_load(Path(__file__).with_name("bad_input.yaml").read_text("utf-8"))
CASES = [(command, words, says, bool(rest)) for command, rows in TABLE.items() for words, says, *rest in rows]
STANDS_FOR = {
    "{train}": "+experiment=cat_oneshot concept.images=photos method.steps=2 run.dir=run",
    "{draw}": "concept=cat.safetensors prompt='a <cat*>' num=1 steps=1",
    "{two}": "concept=[cat.safetensors,mug.safetensors] prompt='<cat*> and <mug*>' num=1 steps=1",
    "{photos}": "world=photos data=many path=model scorer=s only=size report=false",
}
MODULES = {"perfusion.covariance": "perfusion.covariance.__main__"}


@pytest.fixture(scope="module")
def folder(toyland: Backbone, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Some good files and many bad ones."""
    root = tmp_path_factory.mktemp("given")
    for name in ("photos", "empty", "bad", "pipe", "mix", "cut", "black", "m", "m2", "many"):
        (root / name).mkdir()
    picture = np.random.default_rng(0).integers(0, 255, (70, 80, 3), dtype=np.uint8)
    Image.fromarray(picture).save(root / "photos" / "a.png")
    for name in ("a.png", "a_mask.png"):
        shutil.copy(root / "photos" / "a.png", root / "mix" / name)
    shutil.copytree(root / "photos", root / "many" / "cat")
    (root / "bad" / "a.png").write_bytes(b"no picture")
    (root / "cut" / "a.png").write_bytes((root / "photos" / "a.png").read_bytes()[:3000])
    Image.new("L", (80, 70)).save(root / "black" / "a.png")
    (root / "text.txt").write_text("x")
    (root / "good.yaml").write_text("seed: 1\n")
    (root / "bad.json").write_text("{")
    (root / "bin.json").write_bytes(b"\xff\xfe\x00")
    (root / "m" / "manifest.json").write_bytes(b"\xff\xfe")
    (root / "m2" / "manifest.json").write_text('[{"file": "x.png", "prompt": "a cat"}]')
    for pipe in ("fifo.png", "fifo.safetensors", "pipe/a.png"):
        os.mkfifo(root / pipe)
    save_concept(root / "cat.safetensors", untrained_concept(toyland, Word("<cat*>", "cat"), 0))
    save_concept(root / "mug.safetensors", untrained_concept(toyland, Word("<mug*>", "mug"), 1))
    save_concept(root / "lora.safetensors", random_concept(toyland, Word("<bear*>", "bear"), 0, name="lora"))
    return root


def test_there_are_many() -> None:
    assert len(CASES) >= 200 and len({(command, words) for command, words, *_ in CASES}) == len(CASES)


@pytest.mark.parametrize(("command", "words", "says", "with_model"), CASES)
def test_bad_input_is_answered(
    command: str,
    words: str,
    says: str,
    with_model: bool,
    folder: Path,
    toyland: Backbone,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(folder)
    before = {path: path.stat().st_mtime_ns for path in folder.rglob("*") if "covariance" not in path.parts}
    for short, long in STANDS_FOR.items():
        words = words.replace(short, long)

    def read(*_: object, **__: object) -> object:
        assert with_model, "a model is loaded"
        return toyland.pipe

    monkeypatch.setattr("perfusion.backbones.loading.read_pipeline", read)
    main = importlib.import_module(MODULES.get(command, command)).main
    status = run_cli(main, shlex.split(words))
    answer = capsys.readouterr().err.splitlines()[-1]
    assert status == 2 and answer.startswith("error: " + says.replace("{here}", str(folder)))
    assert {path: path.stat().st_mtime_ns for path in before} == before, "nothing that was there is touched"
    assert not list(folder.rglob("*-0000*.png")), "nothing is drawn"
    shutil.rmtree(folder / "run", ignore_errors=True)
