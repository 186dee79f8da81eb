"""What scores of a folder are made of: drift, the toy that is looked for, the attribute reader."""

from __future__ import annotations

from pathlib import Path

import pytest
from PIL import Image

from eval import scorers
from eval.folder_scores import drift, toy
from eval.record import ScoreError
from eval.scorers import load_reader
from perfusion.config import ConceptConfig, ToylandConcept
from perfusion.scoring.clip import ClipScorer, ScorerError
from perfusion.toyland.reader import Reader
from perfusion.toyland.world import COLOURS
from perfusion.training.module import examples_of
from tests.scored import noise
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


def test_the_toy_of_a_seed_is_the_one_that_training_draws():
    assert toy(16, "cat") == toy(16, "cat") != toy(17, "cat")
    pixels = examples_of(ConceptConfig("x", "cat", "<x>", toyland=ToylandConcept(16, 1)), 64).pixels[0]
    colours = {tuple(c) for c in ((pixels.permute(1, 2, 0) + 1) * 127.5).round().int().reshape(-1, 3).tolist()}
    near = [min(sum(abs(a - b) for a, b in zip(c, COLOURS[toy(16, "cat").body], strict=True)) for c in colours)]
    assert near[0] < 30
    with pytest.raises(ScorerError, match="found the superclass 'hamster', expected one of Toyland's: cat"):
        toy(16, "hamster")


def test_the_reader_is_loaded_or_says_what_is_missing(tmp_path: Path, monkeypatch):
    Reader().save(tmp_path / "reader")
    assert isinstance(load_reader(tmp_path / "reader"), Reader)
    monkeypatch.setattr(scorers, "READER", tmp_path / "none")
    with pytest.raises(ScorerError, match=r"the attribute reader is not there; run `make toyland`, or .* reader=none"):
        load_reader()
    with pytest.raises(ScorerError, match="is not there; expected a reader's folder"):
        load_reader(tmp_path / "none")
    (tmp_path / "reader" / "reader.safetensors").write_bytes(b"\0" * 9)
    with pytest.raises(ScorerError, match="cannot be loaded"):
        load_reader(tmp_path / "reader")
