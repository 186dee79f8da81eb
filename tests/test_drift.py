"""How much pictures changed."""

from __future__ import annotations

from pathlib import Path

import pytest
from PIL import Image

from eval.drift import Base, drift
from eval.folders import ImageFolder
from eval.record import ScoreError
from perfusion.manifest import ImageRecord
from perfusion.scoring.clip import ClipScorer
from tests.scored import noise, record
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


def test_what_cannot_be_compared():
    base = [ImageRecord("0.png", "a dog", 0), ImageRecord("1.png", "a dog", 0)]
    with pytest.raises(ScoreError, match="base=base: has no picture of 'a dog' with seed 3"):
        Base(ImageFolder(Path("base"), tuple(base[:1]))).file(record("0.png", "a dog", 3))
    with pytest.raises(ScoreError, match="base=twice: has two pictures of 'a dog' with seed 0"):
        Base(ImageFolder(Path("twice"), tuple(base)))
