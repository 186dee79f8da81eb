"""Pareto fronts of points whose coordinates are all better when they are higher."""

from __future__ import annotations

import numpy as np


def non_dominated(points: np.ndarray) -> np.ndarray:
    """Which of n points (n, d) no other point is at least as good as everywhere and better somewhere: bool (n,).

    Of equal points none dominates the other.
    """
    points = np.asarray(points, float)
    no_worse = (points[:, None] >= points[None]).all(-1)  # [i, j]: i is nowhere worse than j
    better = (points[:, None] > points[None]).any(-1)
    return np.logical_not((no_worse & better).any(0))


def hypervolume(points: np.ndarray, reference: np.ndarray) -> float:
    """The volume that n points (n, d) dominate above `reference` (d,): of the union of the boxes between them.

    Points that are not above the reference in every coordinate add nothing. By slices along the last coordinate, in
    the manner of HSO (While et al., IEEE Trans. Evol. Comput. 10(1), 2006); exact, and meant for few coordinates.
    """
    reference = np.asarray(reference, float)
    points = np.asarray(points, float).reshape(-1, len(reference))
    points = points[(points > reference).all(-1)]
    if not len(points):
        return 0.0
    if len(reference) == 1:
        return float(points.max() - reference[0])
    heights = np.unique(points[:, -1])
    volume, below = 0.0, reference[-1]
    for height in heights:
        volume += (height - below) * hypervolume(points[points[:, -1] >= height, :-1], reference[:-1])
        below = height
    return float(volume)
