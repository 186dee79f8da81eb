"""Pareto fronts of methods: which settings no other dominates, and the volume that they dominate together."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from eval.aggregate import Interval, Summary, labels_of, percentiles
from eval.record import ScoreError, Value
from eval.score_kinds import ScoreKind


def non_dominated(points: np.ndarray) -> np.ndarray:
    """Which of n points (n, d) no other point is at least as good as everywhere and better somewhere: bool (n,). All
    coordinates are better when they are higher; of equal points none dominates the other."""
    points = np.asarray(points, float)
    no_worse = (points[:, None] >= points[None]).all(-1)  # [i, j]: i is nowhere worse than j
    better = (points[:, None] > points[None]).any(-1)
    return np.logical_not((no_worse & better).any(0))


def hypervolume(points: np.ndarray, reference: np.ndarray) -> float:
    """The area that n points (n, 2) dominate above `reference` (2,): of the union of the boxes between them. Points
    that are not above the reference in both coordinates add nothing."""
    points = points[(points > reference).all(1)]
    x, y = points[np.argsort(-points[:, 0])].T  # from right to left
    # Each point adds a strip from the reference to itself, as high as it rises above all before.
    rises = np.diff(np.maximum.accumulate(y), prepend=reference[1])
    return float(((x - reference[0]) * rises).sum())


@dataclass(frozen=True)
class FrontPoint:
    """One setting of a method."""

    setting: dict[str, Value]
    label: str
    x: Interval
    y: Interval
    on_front: bool  # no other setting of the same method is better in one score and no worse in the other
    best: bool  # the same among the settings of all methods
    concepts: int
    images: int


@dataclass(frozen=True)
class Front:
    """One method's settings, and what they dominate together."""

    method: str
    points: tuple[FrontPoint, ...]
    hypervolume: Interval


def fronts(
    summaries: Sequence[Summary], x: ScoreKind, y: ScoreKind, reference: Sequence[float], level: float
) -> list[Front]:
    """The front of each method, in the order of `summaries`; settings that lack one of the scores are left out.

    A score that is better when it is lower counts from the reference downwards.
    """
    summaries = [s for s in summaries if x.name in s.scores and y.name in s.scores]
    signs = np.array([1.0 if kind.higher else -1.0 for kind in (x, y)])
    means = np.array([[s.scores[kind.name].mean for kind in (x, y)] for s in summaries]).reshape(-1, 2) * signs
    best, labels, start = non_dominated(means), labels_of(summaries), np.array(reference) * signs
    found = []
    for method in dict.fromkeys(s.method for s in summaries):
        mine = [i for i, s in enumerate(summaries) if s.method == method]
        points = []
        for i, on in zip(mine, non_dominated(means[mine]), strict=True):
            s = summaries[i]
            sides = s.scores[x.name], s.scores[y.name]
            number = len(s.concepts)
            points.append(FrontPoint(dict(s.setting), labels[i], *sides, bool(on), bool(best[i]), number, s.images))
        volume = Interval(hypervolume(means[mine], start))
        if any(point.x.low is not None for point in points):
            drawn = np.array([[summaries[i].draws[kind.name] for kind in (x, y)] for i in mine])  # (settings, 2, B)
            drawn = np.moveaxis(drawn, -1, 0) * signs
            volumes = [hypervolume(one, start) for one in drawn if np.isfinite(one).all()]
            volume = percentiles(volume.mean, np.array(volumes), level)
        found.append(Front(method, tuple(points), volume))
    return found


def asked_fronts(
    summaries: Sequence[Summary], x: ScoreKind, y: ScoreKind, reference: Sequence[float], level: float
) -> list[Front]:
    """`fronts` as a command line asks for them. Raises ScoreError: no such reference point, no such scores."""
    if len(reference) != 2:
        raise ScoreError(f"reference: found {reference}, expected two numbers, as in reference=[0,0]")
    if found := fronts(summaries, x, y, reference, level):
        return found
    known = ", ".join(sorted({name for s in summaries for name in s.scores}))
    raise ScoreError(f"x={x.name}, y={y.name}: nothing has both scores; there are {known}")
