"""Means level by level, and intervals that follow the same levels."""

from __future__ import annotations

import math
from dataclasses import replace
from itertools import combinations
from pathlib import Path

import numpy as np
import pytest

from eval.aggregate import (
    Bootstrap,
    Interval,
    as_json,
    concept_draws,
    concept_scores,
    prompt_scores,
    summarize,
    summary,
)
from eval.record import Picture, Point, ScoreError

MANY = Bootstrap(resamples=4000)


def picture(prompt: str, seed: int | None = None, training: str | None = None, **scores: float) -> Picture:
    return Picture(Path(f"{prompt}-{seed}-{training}-{sorted(scores.items())}.png"), prompt, seed, training, scores)


def point(*pictures: Picture, concept: str = "cat", method: str = "m", pairs: tuple = (), **setting) -> Point:
    return Point(method, concept, setting, pictures, pairs)


def grid(values: np.ndarray, name: str = "clip_i", **kwargs) -> Point:
    """values (prompts, seeds)."""
    return point(
        *(picture(f"p{p}", s, **{name: float(v)}) for p, row in enumerate(values) for s, v in enumerate(row)), **kwargs
    )


def test_a_prompt_counts_once_however_many_pictures_it_has():
    one = point(*(picture("a", s, clip_i=1.0) for s in range(9)), picture("b", 0, clip_i=0.0))
    assert concept_scores(one) == {"clip_i": 0.5}
    assert prompt_scores(one) == [
        {"prompt": "a", "images": 9, "scores": {"clip_i": 1.0}},
        {"prompt": "b", "images": 1, "scores": {"clip_i": 0.0}},
    ]


def test_a_concept_counts_once_however_many_prompts_it_has():
    cat = grid(np.ones((5, 2)))
    dog = grid(np.zeros((1, 2)), concept="dog")
    found = summary([cat, dog], MANY)
    assert found.scores["clip_i"].mean == 0.5 and found.concepts == ("cat", "dog") and found.images == 12


def test_pictures_without_a_score_do_not_count():
    one = point(picture("a", 0, identity=1.0, dino=0.5), picture("a", 1, identity=0.0), picture("b", 0, identity=0.5))
    assert concept_scores(one) == {"identity": 0.5, "dino": 0.5}


def test_the_harmonic_mean_is_of_the_concepts_scores():
    one = point(picture("a", 0, clip_i=0.9, clip_t=0.1), picture("a", 1, clip_i=0.1, clip_t=0.3))
    assert concept_scores(one)["harmonic"] == pytest.approx(2 / (1 / 0.5 + 1 / 0.2))
    other = point(picture("a", 0, clip_i=0.9, clip_t=-0.1), concept="dog")
    assert concept_scores(other)["harmonic"] == 0.0
    both = summary([one, other], MANY)
    assert both.scores["harmonic"].mean == pytest.approx(concept_scores(one)["harmonic"] / 2)


def test_an_interval_over_seeds_is_that_of_the_mean():
    """Of one prompt with n seeds: the draws' deviation is the values' over √n."""
    values = np.random.default_rng(0).normal(0.5, 0.1, size=(1, 25))
    drawn = concept_draws(grid(values), MANY)["clip_i"]
    assert drawn.mean() == pytest.approx(values.mean(), abs=3e-3)
    assert drawn.std() == pytest.approx(values.std() / 5, rel=0.05)
    found = summary([grid(values)], MANY).scores["clip_i"]
    assert found.mean == pytest.approx(values.mean())
    assert found.low == pytest.approx(np.quantile(drawn, 0.025)) and found.high == pytest.approx(
        np.quantile(drawn, 0.975)
    )
    assert (found.high - found.low) / 2 == pytest.approx(1.96 * values.std() / 5, rel=0.06)


def test_a_seed_is_drawn_for_all_prompts_at_once():
    """What two prompts share through their noise does not average out."""
    shared = np.random.default_rng(0).normal(size=(1, 16)).repeat(4, axis=0)
    assert concept_draws(grid(shared), MANY)["clip_i"].std() == pytest.approx(shared.std() / 4, rel=0.05)


def test_an_interval_over_concepts_is_that_of_their_mean():
    values = np.random.default_rng(1).normal(size=16)
    points = [grid(np.full((2, 1), v), concept=f"c{k}") for k, v in enumerate(values)]
    found = summary(points, MANY)
    assert found.draws["clip_i"].std() == pytest.approx(values.std() / 4, rel=0.05)
    assert found.scores["clip_i"].low < values.mean() < found.scores["clip_i"].high


def test_both_levels_add_up():
    """Between concepts and within: the variances add."""
    rng = np.random.default_rng(2)
    means, noise = rng.normal(size=20), rng.normal(0, 2, size=(20, 8))
    noise -= noise.mean(1, keepdims=True)
    points = [grid((m + row)[None], concept=f"c{k}") for k, (m, row) in enumerate(zip(means, noise, strict=True))]
    expected = means.var() / 20 + (noise.var(1).mean() / 8) / 20
    assert summary(points, MANY).draws["clip_i"].var() == pytest.approx(expected, rel=0.1)


def test_trainings_are_drawn_before_their_seeds():
    """Two trainings of which each always scores the same: (m0 + m1) / 2 deviates by their difference / √8."""
    one = point(*(picture("a", s, t, clip_i=float(t == "x")) for t in "xy" for s in range(8)))
    assert concept_draws(one, MANY)["clip_i"].std() == pytest.approx(1 / math.sqrt(8), rel=0.05)


def test_pictures_without_seeds_are_drawn_one_by_one():
    values = np.random.default_rng(0).normal(size=16)
    seedless = point(*(picture("a", None, clip_i=float(v)) for v in values))
    assert concept_draws(seedless, MANY)["clip_i"].std() == pytest.approx(values.std() / 4, rel=0.05)


def test_without_anything_to_draw_there_is_no_interval():
    assert summary([grid(np.array([[0.2], [0.4]]))], MANY).scores["clip_i"] == Interval(pytest.approx(0.3), None, None)
    assert as_json({"x": Interval(0.12345678)}) == {"x": {"mean": 0.123457, "low": None, "high": None}}


def test_diversity_is_over_pairs_of_a_prompt_and_a_resample_makes_no_pairs_with_itself():
    """All distances 1: every resample that has a pair at all says 1."""
    pictures = [picture(prompt, s, clip_i=0.0) for prompt in "ab" for s in range(3)]
    pairs = tuple((i, j, 1.0) for i, j in combinations(range(6), 2) if i // 3 == j // 3)
    one = point(*pictures, pairs=pairs)
    assert concept_scores(one)["diversity"] == 1.0
    drawn = concept_draws(one, MANY)["diversity"]
    assert np.nanmin(drawn) == np.nanmax(drawn) == pytest.approx(1.0)
    assert np.isnan(drawn).mean() == pytest.approx(1 / 9, abs=0.02), "three times the same seed has no pair"
    uneven = replace(one, pairs=tuple((i, j, 0.3 if j < 3 else 0.7) for i, j, _ in pairs))
    assert concept_scores(uneven)["diversity"] == pytest.approx(0.5)
    assert [row["scores"]["diversity"] for row in prompt_scores(uneven)] == pytest.approx([0.3, 0.7])


def test_draws_are_seeded():
    points = [grid(np.random.default_rng(k).random((2, 4)), concept=f"c{k}") for k in range(3)]
    a, b, c = (summary(points, Bootstrap(50, seed)).draws["clip_i"] for seed in (0, 0, 1))
    assert np.array_equal(a, b) and not np.array_equal(a, c)
    reordered = summary(points[::-1], Bootstrap(50)).draws["clip_i"]
    np.testing.assert_allclose(reordered, a)


def test_methods_are_compared_on_the_same_draws():
    rng = np.random.default_rng(3)
    values = rng.random((6, 2, 4))
    ours = [grid(v + 0.01, concept=f"c{k}", method="ours") for k, v in enumerate(values)]
    theirs = [grid(v, concept=f"c{k}", method="theirs") for k, v in enumerate(values)]
    a, b = summary(ours, MANY), summary(theirs, MANY)
    assert a.scores["clip_i"].low < b.scores["clip_i"].high, "apart, the intervals overlap"
    assert a.draws["clip_i"] - b.draws["clip_i"] == pytest.approx(np.full(MANY.resamples, 0.01))


def test_one_summary_for_each_method_and_setting():
    given = [("m", 0.1, "cat", 1.0), ("m", 0.1, "dog", 0.0), ("m", 0.2, "cat", 0.3), ("n", 0.1, "cat", 0.4)]
    points = [grid(np.full((1, 2), v), concept=c, method=m, beta=b) for m, b, c, v in given]
    found = summarize(points, MANY)
    assert [(s.method, s.setting, s.concepts) for s in found] == [
        ("m", {"beta": 0.1}, ("cat", "dog")),
        ("m", {"beta": 0.2}, ("cat",)),
        ("n", {"beta": 0.1}, ("cat",)),
    ]
    assert [s.scores["clip_i"].mean for s in found] == pytest.approx([0.5, 0.3, 0.4])


@pytest.mark.parametrize("wrong", [{"resamples": 0}, {"level": 1.0}])
def test_bootstraps_that_cannot_be(wrong: dict):
    with pytest.raises(ScoreError, match="expected at least 1 resample"):
        Bootstrap(**wrong)
