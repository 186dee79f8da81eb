"""How much pictures changed, from two folders."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from eval.clip import ClipScorer
from eval.drift import drift, main
from eval.scores import ScoreError
from perfusion.manifest import ImageRecord
from tests.scored import folder, noise, record
from tests.scorers import make_scorer


@pytest.fixture(scope="module")
def scorer(tmp_path_factory: pytest.TempPathFactory) -> str:
    return make_scorer(tmp_path_factory.mktemp("scorer") / "model")


def test_the_same_picture_did_not_drift_and_black_is_as_far_from_white_as_can_be(scorer: str):
    clip = ClipScorer(scorer)
    cosine, square = drift([noise(0), noise(1)], [noise(0), noise(1)], clip)
    assert cosine == pytest.approx([0, 0], abs=1e-6) and square.tolist() == [0, 0]
    black, white, grey = (Image.new("RGB", (8, 8), (v, v, v)) for v in (0, 255, 51))
    _, square = drift([black, black], [white, grey], clip)
    assert square == pytest.approx([1, 0.04])
    with pytest.raises(ScoreError, match=r"found pictures of \(8, 8\) and \(32, 32\) pixels"):
        drift([black], [noise(0)], clip)


def test_two_folders(tmp_path: Path, scorer: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture):
    monkeypatch.chdir(tmp_path)
    folder(Path("base"), [ImageRecord(f"{s}.png", "a dog", s) for s in range(3)], first=0)
    attached = [record(f"{s}.png", "a dog", s, beta=0.4) for s in range(3)]
    folder(Path("images"), [*attached, record("x.png", "a <cat*>")], first=1)
    main(["base=base", "images=images", f"scorer={scorer}", "out=drift.json", "resamples=100"])
    (row,) = json.loads(Path("drift.json").read_text())
    assert (row["method"], row["concept"], row["setting"], row["images"]) == ("perfusion", "cat", {"beta": 0.4}, 3)
    expected, square = drift([noise(s) for s in range(3)], [noise(s + 1) for s in range(3)], ClipScorer(scorer))
    assert row["scores"]["drift"]["mean"] == pytest.approx(expected.mean(), abs=1e-6)
    assert row["scores"]["drift_mse"]["mean"] == pytest.approx(square.mean(), abs=1e-6)
    assert row["scores"]["drift_mse"]["low"] < np.mean(square) < row["scores"]["drift_mse"]["high"]
    assert "perfusion, cat, 3 pictures: drift 0." in capsys.readouterr().out


def test_what_cannot_be_compared(tmp_path: Path, scorer: str, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)
    folder(Path("base"), [ImageRecord("0.png", "a dog", 0)])
    folder(Path("images"), [record("0.png", "a <cat*>")])
    words = ["base=base", f"scorer={scorer}"]
    with pytest.raises(ScoreError, match="every prompt names the concept, expected some that do not"):
        main([*words, "images=images"])
    folder(Path("more"), [record("0.png", "a dog", 3)])
    with pytest.raises(ScoreError, match="base=base: has no picture of 'a dog' with seed 3"):
        main([*words, "images=more"])
    folder(Path("twice"), [ImageRecord("0.png", "a dog", 0), ImageRecord("1.png", "a dog", 0)])
    with pytest.raises(ScoreError, match="base=twice: has two pictures of 'a dog' with seed 0"):
        main([*words, "images=more", "base=twice"])
