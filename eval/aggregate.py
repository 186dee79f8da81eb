"""From pictures to a number with its interval: per prompt, then per concept, then over concepts.

A prompt's score is the mean over its pictures, a concept's the mean over its prompts, a method's the mean over its
concepts: so a prompt counts the same however many pictures it has. Intervals are percentiles of a bootstrap
(Efron, 1979) that follows the same levels: concepts are drawn with replacement, for each of them its trainings, for
each of these its seeds; a seed is drawn for all prompts at once, for they share its noise.

The draws depend on the names of the concepts and on how many trainings and seeds each has, on nothing else. So two
methods that were shown the same concepts and seeds are drawn alike, and can be compared draw by draw.
"""

from __future__ import annotations

import hashlib
import warnings
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from eval.record import Picture, Point, ScoreError, setting_key, setting_labels
from perfusion.scoring import harmonic_mean

LEVEL = 0.95
RESAMPLES = 1000


@dataclass(frozen=True)
class Interval:
    """A score; `low` and `high` are None where nothing was there to draw from (one concept with one seed)."""

    mean: float
    low: float | None = None
    high: float | None = None

    def spelled(self, between: str = " ± ") -> str:
        """The mean and half the width of the interval: `0.700 ± 0.050`."""
        if self.mean != self.mean:
            return "–"
        half = "" if self.low is None or self.high is None else f"{between}{(self.high - self.low) / 2:.3f}"
        return f"{self.mean:.3f}{half}"


@dataclass(frozen=True)
class Bootstrap:
    """How intervals are made."""

    resamples: int = RESAMPLES
    seed: int = 0
    level: float = LEVEL

    def __post_init__(self) -> None:
        if self.resamples < 1 or not 0 < self.level < 1:
            raise ScoreError(f"found {self}, expected at least 1 resample and a level between 0 and 1")


@dataclass(frozen=True)
class Summary:
    """One method at one setting, over all its concepts."""

    method: str
    setting: Mapping[str, Any]
    concepts: tuple[str, ...]
    images: int
    scores: Mapping[str, Interval]
    draws: Mapping[str, np.ndarray]  # the scores in every resample, (B,); NaN where a draw had no value


def percentiles(mean: float, drawn: np.ndarray, level: float) -> Interval:
    """A number with the interval that its draws (B,) give; NaN ones do not count, and without any there is none."""
    drawn = drawn[np.isfinite(drawn)]
    if not len(drawn):
        return Interval(mean)
    low, high = np.quantile(drawn, [(1 - level) / 2, (1 + level) / 2])
    return Interval(mean, float(low), float(high))


def summarize(points: Sequence[Point], bootstrap: Bootstrap) -> list[Summary]:
    """One summary for each method and setting, in the order of the points."""
    groups: dict[tuple[str, str], list[Point]] = defaultdict(list)
    for point in points:
        groups[point.method, setting_key(point.setting)].append(point)
    return [summary(group, bootstrap) for group in groups.values()]


def summary(points: Sequence[Point], bootstrap: Bootstrap) -> Summary:
    """The mean over points of one method and setting, one for each concept, with its interval."""
    concepts = tuple(point.concept for point in points)
    assert len({point.method for point in points}) == 1 and len({*concepts}) == len(concepts)
    exact = [concept_scores(point) for point in points]
    drawn = [concept_draws(point, bootstrap) for point in points]
    names = list(dict.fromkeys(name for scores in exact for name in scores))
    order = sorted(range(len(points)), key=lambda i: concepts[i])
    chosen, inner = _outer([concepts[i] for i in order], bootstrap)
    scores, draws = {}, {}
    varied = len(points) > 1 or len({*_unit_of(points[0])}) > 1
    for name in names:
        empty = np.full(bootstrap.resamples, np.nan)
        table = np.stack([drawn[i].get(name, empty) for i in order])  # (C, B)
        draws[name] = _mean(table[chosen, inner], axis=1)
        mean = float(np.mean([s[name] for s in exact if name in s]))
        scores[name] = percentiles(mean, draws[name], bootstrap.level) if varied else Interval(mean)
    images = sum(len(point.pictures) for point in points)
    return Summary(points[0].method, points[0].setting, concepts, images, scores, draws)


def labels_of(summaries: Sequence[Summary]) -> list[str]:
    """What to call each summary's setting among those of its method."""
    methods: dict[str, list[Mapping[str, Any]]] = defaultdict(list)
    for one in summaries:
        methods[one.method].append(one.setting)
    labels = {method: iter(setting_labels(settings)) for method, settings in methods.items()}
    return [next(labels[one.method]) for one in summaries]


def concept_scores(point: Point) -> dict[str, float]:
    """The scores of one concept: the means over its prompts of the means over their pictures."""
    return {name: float(value[0]) for name, value in _weighted(point, np.ones((1, len(point.pictures)))).items()}


def concept_draws(point: Point, bootstrap: Bootstrap) -> dict[str, np.ndarray]:
    """The scores of one concept in each resample of trainings and seeds: (resamples,) for each kind."""
    rng, draws = _rng(bootstrap, "seeds", point.concept), bootstrap.resamples
    units = _unit_of(point)
    seeds = Counter(training for training, _ in {*units})
    counts = {training: np.zeros((draws, number)) for training, number in seeds.items()}
    for _ in seeds:  # as many trainings as there are, drawn one after the other
        chosen = rng.integers(len(seeds), size=draws)
        for training, number in sorted(seeds.items()):
            seen = rng.multinomial(number, np.full(number, 1 / number), size=draws)
            counts[training] += seen * (chosen == training)[:, None]
    return _weighted(point, np.stack([counts[training][:, unit] for training, unit in units], axis=1))


def prompt_scores(point: Point) -> list[dict[str, Any]]:
    """For each prompt of a point: `prompt`, the number of `images`, and `scores`, their means."""
    members = _by_prompt(point.pictures)
    alone = np.array([[picture.prompt == prompt for picture in point.pictures] for prompt in members], float)
    found = {name: values for name, values in _weighted(point, alone).items() if name != "harmonic"}
    rows = []
    for k, (prompt, those) in enumerate(members.items()):
        scores = {name: float(values[k]) for name, values in found.items() if np.isfinite(values[k])}
        rows.append({"prompt": prompt, "images": len(those), "scores": scores})
    return rows


def as_json(scores: Mapping[str, Interval]) -> dict[str, dict[str, float | None]]:
    """Intervals as they stand in files."""
    return {
        name: {key: None if value is None else round(value, 6) for key, value in asdict(interval).items()}
        for name, interval in scores.items()
    }


def _weighted(point: Point, weights: np.ndarray) -> dict[str, np.ndarray]:
    """The concept's scores with each picture counted `weights` (B, n) times: (B,) for each kind.

    Prompts whose pictures all have weight 0 do not count. Pairs of a picture with itself, which a resample makes, are
    no pairs: they would pass for a lack of diversity.
    """
    prompts = [np.array(members) for members in _by_prompt(point.pictures).values()]
    names = dict.fromkeys(name for picture in point.pictures for name in picture.scores)
    result = {}
    for name in names:
        values = np.array([picture.scores.get(name, np.nan) for picture in point.pictures])
        there = np.isfinite(values)
        filled = np.where(there, values, 0.0)
        parts = [
            _ratio(weights[:, members] @ filled[members], weights[:, members] @ there[members].astype(float))
            for members in prompts
        ]
        result[name] = _mean(np.stack(parts, axis=1), axis=1)
    if "clip_i" in result and "clip_t" in result:
        result["harmonic"] = harmonic_mean(result["clip_i"], result["clip_t"])
    if point.pairs:
        result["diversity"] = _diversity(point, prompts, weights)
    return result


def _diversity(point: Point, prompts: Sequence[np.ndarray], weights: np.ndarray) -> np.ndarray:
    prompt_of = {int(i): k for k, members in enumerate(prompts) for i in members}
    sums = np.zeros((len(prompts), 2, len(weights)))
    for i, j, distance in point.pairs:
        together = weights[:, i] * weights[:, j]
        sums[prompt_of[i]] += np.stack([together * distance, together])
    return _mean(np.stack([_ratio(total, count) for total, count in sums], axis=1), axis=1)


def _unit_of(point: Point) -> list[tuple[int, int]]:
    """Which training and which of its seeds each picture belongs to, as numbers.

    Pictures without a seed are told apart by their place among those of their prompt.
    """
    trainings = sorted({picture.training or "" for picture in point.pictures})
    place: dict[tuple[str, str], int] = defaultdict(int)
    named: list[tuple[str, tuple[bool, int]]] = []
    for picture in point.pictures:
        training = picture.training or ""
        place[training, picture.prompt] += 1
        known = picture.seed is not None
        named.append((training, (known, picture.seed if known else place[training, picture.prompt])))  # type: ignore[arg-type]
    seeds = {t: sorted({seed for training, seed in named if training == t}) for t in trainings}
    return [(trainings.index(training), seeds[training].index(seed)) for training, seed in named]


def _outer(concepts: Sequence[str], bootstrap: Bootstrap) -> tuple[np.ndarray, np.ndarray]:
    """For each resample the concepts that are drawn, (B, C), and which resample of their seeds goes with each.

    A single concept is always drawn, in the order of its own resamples.
    """
    draws, count = bootstrap.resamples, len(concepts)
    if count == 1:
        return np.zeros((draws, 1), int), np.arange(draws)[:, None]
    rng = _rng(bootstrap, "concepts", *concepts)
    return rng.integers(count, size=(draws, count)), rng.integers(draws, size=(draws, count))


def _rng(bootstrap: Bootstrap, *names: str) -> np.random.Generator:
    text = "\0".join([str(bootstrap.seed), *names])
    return np.random.default_rng(int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big"))


def _by_prompt(pictures: Sequence[Picture]) -> dict[str, list[int]]:
    found: dict[str, list[int]] = defaultdict(list)
    for i, picture in enumerate(pictures):
        found[picture.prompt].append(i)
    return found


def _ratio(total: np.ndarray, count: np.ndarray) -> np.ndarray:
    return np.divide(total, count, out=np.full(np.shape(total), np.nan), where=count > 0)


def _mean(values: np.ndarray, axis: int) -> np.ndarray:
    """The mean of what is there; NaN where nothing is."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)  # "mean of empty slice"
        return np.nanmean(values, axis=axis)
