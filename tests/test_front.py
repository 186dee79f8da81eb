"""Fronts and the volume below them, against their definitions and against counting."""

import itertools

import numpy as np
import pytest

from eval.front import hypervolume, non_dominated


def test_what_is_not_above_the_reference_adds_nothing():
    reference = np.array([0.2, 0.2])
    assert hypervolume(np.zeros((0, 2)), reference) == 0.0
    assert hypervolume(np.array([[0.2, 0.9], [0.9, 0.1]]), reference) == 0.0
    both = np.array([[0.5, 0.4], [0.1, 99.0]])
    assert hypervolume(both, reference) == pytest.approx(0.3 * 0.2)


def test_against_counting_cells():
    rng = np.random.default_rng(0)
    cells = np.array(list(itertools.product(range(6), repeat=2))) + 0.5
    for _ in range(50):
        points = rng.integers(-1, 6, size=(int(rng.integers(1, 7)), 2)).astype(float)
        covered = (cells[:, None] < points[None]).all(-1).any(1).sum()
        assert hypervolume(points, np.zeros(2)) == pytest.approx(float(covered))


def test_non_dominated_against_its_definition():
    rng = np.random.default_rng(2)
    for _ in range(30):
        points = rng.integers(0, 4, size=(8, 3)).astype(float)
        expected = [
            not any((q >= p).all() and (q > p).any() for j, q in enumerate(points) if j != i)
            for i, p in enumerate(points)
        ]
        assert non_dominated(points).tolist() == expected
    twins = np.array([[1.0, 1.0], [1.0, 1.0], [0.0, 1.0]])
    assert non_dominated(twins).tolist() == [True, True, False]
