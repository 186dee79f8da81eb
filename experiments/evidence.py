"""From scores to the numbers that claims rest on, their intervals, and verdicts.

A claim compares fronts: the scores of some settings, how well prompts are followed to the right and likeness up, which
are prompt accuracy and identity in Toyland. Between two neighbouring settings of a front any mixture can be had, by
drawing some pictures with one and some with the other, so a front is the line through its points, and what it attains
is all below and to the left of that line.

All intervals come from one bootstrap over subjects and seeds (`eval.aggregate`), which draws the same for every
setting: differences are paired. Those of numbers that verdicts rest on are widened for the few subjects there are.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field, replace
from enum import StrEnum

import numpy as np
from scipy.special import stdtrit  # the quantiles of Student's t

from eval.aggregate import Bootstrap, Interval, Summary, summary
from eval.score_kinds import BY_NAME
from experiments.runner import Runner, Together, Wanted
from experiments.settings import BASE_MODEL, Setting, Training
from experiments.world import Subject, World
from perfusion.scoring import harmonic_mean
from perfusion.training.run_folder import RunFolder

_HALVINGS = 40
_LEVELS = 5


@dataclass(frozen=True)
class Line:
    """Some settings in two scores: means (k, 2), and the same in B resamples, (B, k, 2).

    Attributes:
        varied: whether there is anything to draw from; one concept with one seed says nothing of others.
    """

    means: np.ndarray
    draws: np.ndarray
    varied: bool


@dataclass
class Evidence:
    """The scores of an experiment's settings.

    Attributes:
        groups: what each picture shows: single subjects, or pairs.
        times: as of the experiment.
    """

    runner: Runner
    groups: Sequence[Together]
    times: int = 1
    bootstrap: Bootstrap = field(default_factory=Bootstrap)
    _known: dict[Setting, Summary] = field(default_factory=dict)

    @property
    def world(self) -> World:
        return self.runner.protocol

    @property
    def x(self) -> str:
        """The score of fronts that goes to the right, in words; `y`: that which goes up."""
        return BY_NAME[self.world.x].title

    @property
    def y(self) -> str:
        return BY_NAME[self.world.y].title

    def summary(self, setting: Setting, label: str | None = None) -> Summary:
        """A setting's scores over all subjects, under the name that it has in this experiment."""
        setting = self.world.setting(setting)
        if setting not in self._known:
            points = [self.runner.points[Wanted(setting, subjects, self.times)] for subjects in self.groups]
            self._known[setting] = summary(points, self.bootstrap)
        found = self._known[setting]
        return found if label is None else replace(found, method=label)

    def line(self, settings: Sequence[Setting], x: str | None = None, y: str | None = None) -> Line:
        """Settings in two scores, by default the world's; NaN where one has no such score, as diversity where every
        prompt has one picture."""
        x, y = x or self.world.x, y or self.world.y
        summaries = [self.summary(setting) for setting in settings]
        none, never = Interval(float("nan")), np.full(self.bootstrap.resamples, np.nan)
        means = np.array([[s.scores.get(name, none).mean for name in (x, y)] for s in summaries])
        draws = np.array([[s.draws.get(name, never) for name in (x, y)] for s in summaries])  # (k, 2, B)
        varied = all(s.scores.get(name, none).low is not None for s in summaries for name in (x, y))
        return Line(means, np.moveaxis(draws, -1, 0), varied)

    def number(self, make: Callable[..., float], *lines: Line) -> Interval:
        """A number that is made of fronts, with its interval: ± t_{n−1} √(n / (n−1)) standard deviations of the draws,
        for n subjects. Percentiles alone are too narrow for few: over eight they miss the truth in a tenth of all
        cases instead of a twentieth (Hesterberg, The American Statistician 69(4), 2015). They serve where there is one
        subject, whose seeds alone are drawn."""
        mean = make(*(one.means for one in lines))
        drawn = np.array([make(*rows) for rows in zip(*(one.draws for one in lines), strict=True)])
        drawn = drawn[np.isfinite(drawn)]
        if not all(one.varied for one in lines) or len(drawn) < self.bootstrap.resamples / 2:
            return Interval(mean)
        level, n = self.bootstrap.level, len(self.groups)
        if n == 1:
            low, high = np.quantile(drawn, [(1 - level) / 2, (1 + level) / 2])
            return Interval(mean, float(low), float(high))
        off = float(stdtrit(n - 1, (1 + level) / 2)) * math.sqrt(n / (n - 1)) * float(np.std(drawn))
        return Interval(mean, mean - off, mean + off)

    def mean_difference(self, a: Sequence[Setting], b: Sequence[Setting], score: str) -> Interval:
        """How much higher the settings `a` score than `b`, the mean over pairs of them."""
        lines = [self.line(settings, score, score) for settings in (a, b)]
        return self.number(lambda p, q: float(np.mean(p[:, 0] - q[:, 0])), *lines)

    def x_gained(self, a: Sequence[Setting], b: Sequence[Setting]) -> Interval:
        """`mean_difference` in the score that goes to the right; `y_gained`: in that which goes up."""
        return self.mean_difference(a, b, self.world.x)

    def y_gained(self, a: Sequence[Setting], b: Sequence[Setting]) -> Interval:
        return self.mean_difference(a, b, self.world.y)

    def lead(self, own: Sequence[Setting], others: Sequence[Setting]) -> Interval:
        """The least lead of the front of some settings over others, of whose text the world's slack is forgiven."""
        return self.number(lambda a, b: least_lead(a, b, self.world.slack), front(self, own), self.line(others))

    @property
    def subjects(self) -> list[Subject]:
        """All subjects, each once."""
        return list(dict.fromkeys(one for group in self.groups for one in group))

    def runs(self, training: Training) -> list[RunFolder]:
        """The folders of a training, one for each subject."""
        return [self.runner.run_folder(training, one) for one in self.subjects]

    def training_seconds(self, training: Training) -> list[float]:
        """How long each training took, without loading and samples."""
        return [json.loads(run.metrics.read_text())["seconds"]["training"] for run in self.runs(training)]


def front(evidence: Evidence, settings: Sequence[Setting], x: str | None = None, y: str | None = None) -> Line:
    """The front of some settings, which ends in the base model's own pictures of the superclass: Perfusion gives
    them to the bit at β = ∞, and any other method where it is left off."""
    return evidence.line((*settings, BASE_MODEL), x, y)


def same_likeness(evidence: Evidence, a: Sequence[Setting], b: Sequence[Setting]) -> Interval:
    """How much further to the right front `a` lies than `b`, the mean over likenesses that both have."""
    return evidence.number(lambda p, q: gain(p, q, levels(p, q)), front(evidence, a), front(evidence, b))


def area_gained(evidence: Evidence, a: Sequence[Setting], b: Sequence[Setting]) -> Interval:
    """How much larger the area below front `a` is than that below `b`."""
    return evidence.number(lambda p, q: area(p) - area(q), front(evidence, a), front(evidence, b))


def beyond(evidence: Evidence, own: Sequence[Setting], others: Sequence[Setting], name: str) -> list[Check]:
    """How far front `own` lies beyond a method's settings, which decides: the least of its leads over them. Beside it,
    its lead over the setting with the best harmonic mean of both scores, the ε-indicator, and areas.

    The ε-indicator does not decide: it moves a setting in both scores alike, so one that follows every prompt, as most
    methods have one, can never lie far within any front.
    """
    best = max(others, key=lambda setting: float(harmonic_mean(*evidence.line([setting]).means[0])))
    at = f"{name} ({best.name})"
    line, point, all_of_them = front(evidence, own), evidence.line([best]), evidence.line(others)
    by_clip = front(evidence, own, "clip_t", "clip_i")
    clip = Check(
        f"the margin over {at} in CLIP-T and CLIP-I",
        evidence.number(lambda a, b: margin(a, b[0]), by_clip, evidence.line([best], "clip_t", "clip_i")),
        decides=False,
    )
    return [
        Check(
            f"{evidence.y} of Perfusion's front above all settings of {name}",
            evidence.lead(own, others),
        ),
        Check(
            f"the same above {at} alone, its best trade-off",
            evidence.number(lambda a, b: lead(a, b[0], evidence.world.slack), line, point),
            decides=False,
        ),
        Check(
            f"margin in both scores over all settings of {name}",
            evidence.number(lambda a, b: min(margin(a, one) for one in b), line, all_of_them),
            decides=False,
        ),
        clip,
        Check(f"area below the front, above {name}'s", area_gained(evidence, own, others), decides=False),
    ]


def gained(
    evidence: Evidence, a: Sequence[Setting], b: Sequence[Setting], by: str, decides: bool = True
) -> list[Check]:
    """What front `a` has more than `b`: of the right-hand score at the same likeness, which decides if anything does;
    of both scores at the same β; area."""
    x, y = evidence.x, evidence.y
    return [
        Check(f"{x} gained by {by}, at the same {y}", same_likeness(evidence, a, b), decides=decides),
        Check(f"{x} gained by {by}, at the same β", evidence.x_gained(a, b), decides=False),
        Check(f"{y} gained by {by}, at the same β", evidence.y_gained(a, b), decides=False),
        Check(f"area gained by {by}", area_gained(evidence, a, b), decides=False),
    ]


# --- fronts as lines, from arrays (k, 2) ------------------------------------------------------------------------------


def non_dominated(points: np.ndarray) -> np.ndarray:
    """The points (k, 2) than which no other is better in one score and as good in the other, from left to right, each
    once."""
    points = np.unique(points, axis=0)  # from left to right, of one x from below
    highest = np.maximum.accumulate(points[::-1, 1])[::-1]  # here or further right
    return points[points[:, 1] > np.append(highest[1:], -np.inf)]


def area(points: np.ndarray) -> float:
    """What a front attains above (0, 0): the area below its line, and to the left of it."""
    x, y = non_dominated(np.maximum(points, 0)).T
    return float(x[0] * y[0] + np.sum((x[1:] - x[:-1]) * (y[1:] + y[:-1]) / 2))


def lead(points: np.ndarray, point: np.ndarray, slack: float) -> float:
    """How much higher a front is than a point, as far to the right as the point less `slack`; beyond the front's right
    end it has no height."""
    on = non_dominated(points)
    return float(np.interp(point[0] - slack, on[:, 0], on[:, 1], right=0.0) - point[1])


def least_lead(points: np.ndarray, others: np.ndarray, slack: float) -> float:
    """A front's lead over the one of some settings (k, 2) for which it is least."""
    return min(lead(points, other, slack) for other in others)


def margin(points: np.ndarray, point: np.ndarray) -> float:
    """By how much a point could be better in both scores and still be attained by a front: the negative of the additive
    ε-indicator (Zitzler et al., IEEE Trans. Evol. Comput. 7(2), 2003). Below 0: it lies beyond the front."""
    on = non_dominated(points)
    low, high = -2.0, 2.0
    for _ in range(_HALVINGS):
        middle = (low + high) / 2
        attained = np.interp(point[0] + middle, on[:, 0], on[:, 1], right=-np.inf) >= point[1] + middle
        low, high = (middle, high) if attained else (low, middle)
    return low


def levels(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Likenesses that two fronts both attain, evenly spread from the lower of their lower ends to the lower of their
    upper ends. The lower end itself is none of them: there both are the base model, which differs from itself in
    nothing."""
    ends = [(on[-1, 1], on[0, 1]) for on in (non_dominated(a), non_dominated(b))]
    return np.linspace(min(low for low, _ in ends), min(high for _, high in ends), _LEVELS + 1)[1:]


def gain(a: np.ndarray, b: np.ndarray, at: np.ndarray) -> float:
    """How much further to the right front `a` lies than `b`, the mean over some heights, at most those of their upper
    ends. Below its lower end a front attains what it has there."""
    found = [np.interp(at, on[::-1, 1], on[::-1, 0]) for on in (non_dominated(a), non_dominated(b))]
    return float(np.mean(found[0] - found[1]))


# --- verdicts ---------------------------------------------------------------------------------------------------------


class Verdict(StrEnum):
    HOLDS = "holds"
    FAILS = "fails"
    UNDECIDED = "undecided"


@dataclass(frozen=True)
class Check:
    """One number that a claim says something about.

    Attributes:
        what: the number, in words.
        threshold: what the claim sets it against.
        above: whether the claim says that it is above the threshold, or below.
        decides: whether the verdict depends on it; else it is there to be read.
    """

    what: str
    value: Interval
    threshold: float = 0.0
    above: bool = True
    decides: bool = True

    @property
    def verdict(self) -> Verdict:
        """Holds or fails where the whole interval lies on one side of the threshold."""
        low, high = self.value.low, self.value.high
        if low is None or high is None or low != low or high != high:
            return Verdict.UNDECIDED
        if low > self.threshold:
            return Verdict.HOLDS if self.above else Verdict.FAILS
        if high < self.threshold:
            return Verdict.FAILS if self.above else Verdict.HOLDS
        return Verdict.UNDECIDED


def signed(number: float, digits: int = 3) -> str:
    """A difference in words, also one that there is not."""
    return f"{number:+.{digits}f}" if number == number else "not comparable"


def combined(checks: Iterable[Check]) -> Verdict:
    """Of a claim that needs all of its checks: it fails with one of them, and holds with all.

    That all intervals lie on the right side by chance is no likelier than that one does, so their number needs no
    correction (intersection–union test).
    """
    found = [check.verdict for check in checks if check.decides]
    if Verdict.FAILS in found:
        return Verdict.FAILS
    return Verdict.HOLDS if found and all(verdict is Verdict.HOLDS for verdict in found) else Verdict.UNDECIDED
