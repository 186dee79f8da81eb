"""Fronts as lines, and how far one lies before another. Arrays (k, 2): prompt accuracy to the right, identity up.

Between two neighbouring settings of a front any mixture can be had, by drawing some pictures with one and some with the
other, so a front is the line through its points, and what it attains is all below and to the left of that line.
"""

from __future__ import annotations

import numpy as np

from eval.front import non_dominated

_HALVINGS = 40
_LEVELS = 5


def line(points: np.ndarray) -> np.ndarray:
    """The non-dominated of some points (k, 2), from left to right, each once."""
    kept = np.unique(points[non_dominated(points)], axis=0)
    return kept[np.argsort(kept[:, 0])]


def area(points: np.ndarray) -> float:
    """What a front attains above (0, 0): the area below its line, and to the left of it."""
    x, y = line(np.maximum(points, 0)).T
    return float(x[0] * y[0] + np.sum((x[1:] - x[:-1]) * (y[1:] + y[:-1]) / 2))


def lead(points: np.ndarray, point: np.ndarray, slack: float) -> float:
    """How much more identity a front has than a point, at the point's prompt accuracy less `slack`; beyond the front's
    right end it has none."""
    on = line(points)
    return float(np.interp(point[0] - slack, on[:, 0], on[:, 1], right=0.0) - point[1])


def margin(points: np.ndarray, point: np.ndarray) -> float:
    """By how much a point could be better in both scores and still be attained by a front: the negative of the additive
    ε-indicator (Zitzler et al., IEEE Trans. Evol. Comput. 7(2), 2003). Below 0: it lies beyond the front."""
    on = line(points)
    low, high = -2.0, 2.0
    for _ in range(_HALVINGS):
        middle = (low + high) / 2
        attained = np.interp(point[0] + middle, on[:, 0], on[:, 1], right=-np.inf) >= point[1] + middle
        low, high = (middle, high) if attained else (low, middle)
    return low


def levels(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Identities that two fronts both attain, evenly spread from the lower of their lower ends to the lower of their
    upper ends. The lower end itself is none of them: there both are the base model, which differs from itself in
    nothing."""
    ends = [(on[-1, 1], on[0, 1]) for on in (line(a), line(b))]
    return np.linspace(min(low for low, _ in ends), min(high for _, high in ends), _LEVELS + 1)[1:]


def gain(a: np.ndarray, b: np.ndarray, at: np.ndarray) -> float:
    """How much more prompt accuracy front `a` has than `b`, the mean over some identities, at most those of their upper
    ends. Below its lower end a front attains what it has there."""
    found = [np.interp(at, on[::-1, 1], on[::-1, 0]) for on in (line(a), line(b))]
    return float(np.mean(found[0] - found[1]))
