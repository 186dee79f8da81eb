"""Fronts of methods from a record of scores: numbers, files and figures."""

from __future__ import annotations

import csv
import json
import math
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from eval.aggregate import Bootstrap, Interval, Summary, summarize
from eval.figures import draw_fronts, save_figure
from eval.front import fronts, hypervolume
from eval.looks import looks
from eval.pareto import main
from eval.record import read_scores
from eval.score_kinds import BY_NAME
from experiments.results import shrink
from perfusion.cli import run_cli
from tests.scored import made_up

X, Y = BY_NAME["clip_t"], BY_NAME["clip_i"]


@pytest.fixture(scope="module")
def scores(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return made_up(tmp_path_factory.mktemp("made"), {"perfusion": [0.2, 0.5, 0.8], "dreambooth": [None]})


def of(method: str, beta: float, x: float, y: float, **more: float) -> Summary:
    means = {"clip_t": x, "clip_i": y, **more}
    rng = np.random.default_rng(0)
    draws = {name: value + 0.01 * rng.standard_normal(200) for name, value in means.items()}
    scores = {name: Interval(value, value - 0.1, value + 0.1) for name, value in means.items()}
    return Summary(method, {"beta": beta}, ("cat",), 4, scores, draws)


def test_each_method_has_a_front_and_all_have_one_together():
    places = {"a": [(1.0, 3.0), (0.5, 2.0), (3.0, 1.0)], "b": [(2.0, 2.0), (1.0, 2.0)]}
    given = [of(method, k, x, y) for method, found in places.items() for k, (x, y) in enumerate(found, 1)]
    a, b = fronts(given, X, Y, [0, 0], 0.95)
    assert [p.label for p in a.points] == ["β 1", "β 2", "β 3"]
    assert [(p.on_front, p.best) for p in a.points] == [(True, True), (False, False), (True, True)]
    assert [(p.on_front, p.best) for p in b.points] == [(True, True), (False, False)]
    assert (a.hypervolume.mean, b.hypervolume.mean) == pytest.approx((3 + 2, 4))
    assert a.hypervolume.low < 5 < a.hypervolume.high and a.hypervolume.high - a.hypervolume.low < 0.5
    (shifted, _) = fronts(given, X, Y, [0.5, 0.5], 0.95)
    assert shifted.hypervolume.mean == pytest.approx(0.5 * 2.5 + 2 * 0.5)


def test_a_score_that_is_better_when_lower_counts_downwards():
    given = [of("a", 1, 1.0, 0.0, drift=0.2), of("a", 2, 2.0, 0.0, drift=0.4), of("a", 3, 0.5, 0.0, drift=0.3)]
    (front,) = fronts(given, X, BY_NAME["drift"], [0.0, 1.0], 0.95)
    assert [p.on_front for p in front.points] == [True, True, False]
    assert front.hypervolume.mean == pytest.approx(1 * 0.8 + 1 * 0.6)


def test_files(scores: Path, tmp_path: Path, capsys: pytest.CaptureFixture):
    main([f"scores={scores}", f"out={tmp_path / 'p'}", "resamples=60", "reference=[0.1,0.2]"])
    said = json.loads((tmp_path / "p" / "front.json").read_text())
    assert (said["x"], said["y"], said["reference"]) == ("clip_t", "clip_i", [0.1, 0.2])
    assert said["scorer"] == {"clip": "0123"}
    found = {s.method + str(s.setting): s for s in summarize(read_scores(scores)[1], Bootstrap(60))}
    dreambooth, perfusion = said["fronts"]
    assert [p["setting"]["beta"] for p in perfusion["points"]] == [0.2, 0.5, 0.8]
    assert [p["label"] for p in dreambooth["points"]] == [""]
    expected = [(s.scores["clip_t"].mean, s.scores["clip_i"].mean) for s in found.values() if s.method == "perfusion"]
    np.testing.assert_allclose([(p["x"]["mean"], p["y"]["mean"]) for p in perfusion["points"]], expected)
    volume = hypervolume(np.array(expected), np.array([0.1, 0.2]))
    assert perfusion["hypervolume"]["mean"] == pytest.approx(volume)
    rows = list(csv.DictReader((tmp_path / "p" / "front.csv").read_text().splitlines()))
    assert [row["method"] for row in rows] == ["dreambooth"] + 3 * ["perfusion"]
    assert all(float(row["clip_i_low"]) <= float(row["clip_i"]) <= float(row["clip_i_high"]) for row in rows)
    assert {row["concepts"] for row in rows} == {"2"}
    out = capsys.readouterr().out
    assert "hypervolume above (0.1, 0.2)" in out and "perfusion          3" in out


def test_figures_are_drawn_and_the_same_each_time(scores: Path, tmp_path: Path):
    for name in "ab":
        main([f"scores={scores}", f"out={tmp_path / name}", "resamples=20"])
    with Image.open(tmp_path / "a" / "front.png") as image:
        assert image.width == 1280 and len(image.convert("RGB").getcolors(2**24) or ()) > 20
    svg = (tmp_path / "a" / "front.svg").read_text()
    assert all(word in svg for word in ("Perfusion", "DreamBooth", "CLIP-I", "CLIP-T", "β 0.2"))
    for suffix in ("png", "svg"):
        assert len({(tmp_path / name / f"front.{suffix}").read_bytes() for name in "ab"}) == 1


METHODS = ("perfusion", "textual_inversion", "dreambooth", "custom_diffusion", "lora", "base")


def test_labels_do_not_lie_on_one_another():
    """Of two settings at one place, the one on the front says its name."""
    summaries = [of(m, beta, x, 0.1 * k) for k, m in enumerate(METHODS) for beta, x in ((0.2, 0.5), (0.4, 0.5 - 1e-6))]
    figure = draw_fronts(fronts(summaries, X, Y, (0.0, 0.0), 0.95), X, Y)
    labels = [text for text in figure.axes[0].texts if text.get_visible()]
    assert [label.get_text() for label in labels] == ["β 0.2"] * len(METHODS)


def test_a_small_figure_keeps_the_colours_of_methods(tmp_path: Path):
    places = np.random.default_rng(0).random((len(METHODS), 3, 2))
    summaries = [of(m, beta, *xy) for m, three in zip(METHODS, places, strict=True) for beta, xy in enumerate(three)]
    save_figure(draw_fronts(fronts(summaries, X, Y, (0.0, 0.0), 0.95), X, Y), tmp_path / "figure")
    shrink(tmp_path / "figure.png", tmp_path / "small.png")
    with Image.open(tmp_path / "small.png") as image:
        found = np.array([colour for _, colour in image.convert("RGB").getcolors() or ()], dtype=int)
    for look in looks(METHODS).values():
        wanted = [int(look.colour[i : i + 2], 16) for i in (1, 3, 5)]
        assert np.abs(found - wanted).max(1).min() <= 30, f"{look.title} has lost its colour"


def test_one_concept(scores: Path, tmp_path: Path):
    main([f"scores={scores}", f"out={tmp_path}", "resamples=20", "concept=dog"])
    said = json.loads((tmp_path / "front.json").read_text())
    assert {p["concepts"] for front in said["fronts"] for p in front["points"]} == {1}


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["x=identity"], "x=identity, y=clip_i: nothing has both scores; there are clip_i, clip_t"),
        (["concept=mug"], "concept: found 'mug', expected one of cat, dog"),
        (["reference=[0]"], "reference: found [0.0], expected two numbers"),
    ],
)
def test_mistakes_are_named(
    scores: Path, tmp_path: Path, capsys: pytest.CaptureFixture, words: list[str], message: str
):
    assert run_cli(main, [f"scores={scores}", f"out={tmp_path / 'p'}", *words]) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "p").exists()


def test_without_intervals_there_are_none(tmp_path: Path):
    draws = {"clip_t": np.full(3, 0.5), "clip_i": np.full(3, math.nan)}
    given = Summary("a", {}, ("cat",), 1, {"clip_t": Interval(0.5), "clip_i": Interval(0.5)}, draws)
    (front,) = fronts([given], X, Y, [0, 0], 0.95)
    assert front.hypervolume == Interval(0.25)
