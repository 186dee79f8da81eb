"""From scores to verdicts: what an experiment is, and the numbers that its claim rests on.

An experiment is one file in `experiments/claims` with an `EXPERIMENT`; nothing else has to be changed for a new one.

A claim compares fronts: the scores of some settings, how well prompts are followed to the right and likeness up, which
are prompt accuracy and identity in Toyland. Between two neighbouring settings of a front any mixture can be had, by
drawing some pictures with one and some with the other, so a front is the line through its points, and what it attains
is all below and to the left of that line.

All intervals come from one bootstrap over subjects and seeds (`eval.aggregate`), which draws the same for every
setting: differences are paired. Those of numbers that verdicts rest on are widened for the few subjects there are.
"""

from __future__ import annotations

import importlib
import json
import math
import pkgutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from enum import StrEnum

import numpy as np

from eval import front
from eval.aggregate import Bootstrap, Interval, Summary, percentiles, summary
from eval.score_kinds import BY_NAME
from experiments.runner import Runner, Together, Wanted
from experiments.settings import BASE_MODEL, Setting, Training
from experiments.world import Subject, World
from perfusion.scoring import harmonic_mean
from perfusion.training.run_folder import RunFolder

_HALVINGS = 40
_LEVELS = 5
# How the test of a claim ends that `compared` judges.
AT_SAME_Y = (
    "at the same {y} (mean over five {ys} that both have). The claim holds if the 95 % interval lies above 0; there is "
    "no difference if it lies on both sides of 0 and within {slack}, {slack_means}."
)

Settings = Sequence[Setting]


class Verdict(StrEnum):
    HOLDS = "holds"
    FAILS = "fails"
    ALIKE = "no difference"
    UNDECIDED = "undecided"


@dataclass(frozen=True)
class Check:
    """One number that a claim says something about."""

    what: str  # the number, in words
    value: Interval
    threshold: float = 0.0  # what the claim sets it against
    above: bool = True  # whether the claim says that it is above the threshold, or below
    decides: bool = True  # whether the verdict depends on it; else it is there to be read
    alike: float = 0.0  # how far from the threshold makes no difference

    @property
    def verdict(self) -> Verdict:
        """Holds or fails where the whole interval lies on one side of the threshold; no difference where it lies on
        both, and so near that none of it counts."""
        low, high = self.value.low, self.value.high
        if low is not None and low > self.threshold:
            return Verdict.HOLDS if self.above else Verdict.FAILS
        if high is not None and high < self.threshold:
            return Verdict.FAILS if self.above else Verdict.HOLDS
        if low is not None and high is not None and max(self.threshold - low, high - self.threshold) < self.alike:
            return Verdict.ALIKE
        return Verdict.UNDECIDED


@dataclass(frozen=True)
class Table:
    """Numbers that are no scores."""

    title: str
    head: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]


@dataclass(frozen=True)
class Finding:
    """What an experiment has found; `key` is the number that a hurried reader wants, in words."""

    checks: Sequence[Check]
    key: str
    tables: tuple[Table, ...] = ()

    @property
    def verdict(self) -> Verdict:
        """The claim fails with one of the checks that decide, and holds with all. That all intervals lie on the right
        side by chance is no likelier than that one does, so their number needs no correction (intersection–union
        test). Where all are decided and some make no difference, it makes none."""
        found = {check.verdict for check in self.checks if check.decides}
        if not found:
            return Verdict.UNDECIDED
        return next(one for one in (Verdict.FAILS, Verdict.UNDECIDED, Verdict.ALIKE, Verdict.HOLDS) if one in found)


@dataclass(frozen=True)
class Series:
    """Settings that are one line of a figure."""

    label: str
    settings: tuple[Setting, ...]


BASE_SERIES = Series("base", (BASE_MODEL,))


@dataclass(frozen=True)
class Experiment:
    """One claim, what is drawn for it, and how it is judged. Its texts, and labels of series, may have what
    `World.said` puts in."""

    id: str
    place: int  # in the list of experiments
    claim: str
    source: str  # where the paper says it
    test: str  # what has to be true for the claim to hold, in words
    series: tuple[Series, ...]
    judge: Callable[[Evidence], Finding]  # gives the numbers; the verdict follows from them
    caveats: str = ""  # what the experiment cannot show
    of_toys: str = ""  # nor in Toyland
    pairs: bool = False  # whether two subjects are in each picture
    pictures: int = 1  # of each prompt, at least; others have one for each seed of the world
    y: str | None = None  # score of the figure that goes up; None: that of the world
    trainings: tuple[Training, ...] = ()  # what has to be trained, drawn or not
    notes: str = ""  # what people found out about a surprising verdict; not computed
    of_paper: bool = True  # whether `make paper` tries it; others are tried where `only=` names them

    @property
    def settings(self) -> list[Setting]:
        """All that is drawn."""
        return [setting for one in self.series for setting in one.settings]

    def trained(self, world: World) -> list[Training]:
        """All that it trains, as it is done in a world."""
        drawn = [setting.training for setting in self.settings if setting.training is not None]
        return list(dict.fromkeys(map(world.training, (*drawn, *self.trainings))))

    def groups(self, world: World) -> tuple[Together, ...]:
        """The subjects that its pictures show together."""
        return world.pairs if self.pairs else tuple((one,) for one in world.subjects)

    def wanted(self, world: World) -> list[Wanted]:
        """All that has to be drawn."""
        groups = self.groups(world)
        times = self.times(world)
        return [Wanted(world.setting(s), group, times) for s in self.settings for group in groups]

    def times(self, world: World) -> int:
        """How many times as many pictures of each prompt it draws as the world has seeds."""
        return math.ceil(self.pictures / len(world.seeds))

    def axes(self, world: World) -> tuple[str, str]:
        """The scores of the figure, to the right and up."""
        return world.x, self.y or world.y

    def lacks(self, world: World) -> str | None:
        """What a world has not that it needs, in words."""
        return world.lacks([*self.settings, *map(Setting, self.trainings)])


def experiments() -> list[Experiment]:
    """All experiments, in the order of the page."""
    from experiments import claims

    names = [module.name for module in pkgutil.iter_modules(claims.__path__)]
    found = [importlib.import_module(f"experiments.claims.{name}").EXPERIMENT for name in names]
    return sorted(found, key=lambda experiment: experiment.place)


# --- the scores of an experiment --------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Line:
    """Some settings in two scores."""

    means: np.ndarray  # (k, 2)
    draws: np.ndarray  # the same in B resamples, (B, k, 2)
    varied: bool  # whether there is anything to draw from: one concept with one seed says nothing of others


@dataclass
class Evidence:
    """The scores of an experiment's settings: of pictures that show these groups, single subjects or pairs."""

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

    def summary(self, setting: Setting, label: str | None = None) -> Summary:
        """A setting's scores over all subjects, under the name that it has in this experiment."""
        setting = self.world.setting(setting)
        if setting not in self._known:
            points = [self.runner.points[Wanted(setting, subjects, self.times)] for subjects in self.groups]
            self._known[setting] = summary(points, self.bootstrap)
        found = self._known[setting]
        return found if label is None else replace(found, method=label)

    def line(self, settings: Settings, x: str | None = None, y: str | None = None) -> Line:
        """Settings in two scores, by default the world's; NaN where one has no such score, as diversity where every
        prompt has one picture."""
        names = x or self.world.x, y or self.world.y
        none, never = Interval(float("nan")), np.full(self.bootstrap.resamples, np.nan)
        summaries = [self.summary(setting) for setting in settings]
        scores = [[s.scores.get(name, none) for name in names] for s in summaries]
        draws = np.array([[s.draws.get(name, never) for name in names] for s in summaries])  # (k, 2, B)
        varied = all(score.low is not None for row in scores for score in row)
        return Line(np.array([[score.mean for score in row] for row in scores]), np.moveaxis(draws, -1, 0), varied)

    def front(self, settings: Settings, x: str | None = None, y: str | None = None) -> Line:
        """`line`, which ends in the base model's own pictures of the superclass: Perfusion gives them to the bit at
        β = ∞, and any other method where it is left off."""
        return self.line((*settings, BASE_MODEL), x, y)

    def number(self, make: Callable[..., float], *lines: Line) -> Interval:
        """A number that is made of fronts, with its interval: ± t_{n−1} √(n / (n−1)) standard deviations of the draws,
        for n subjects. Percentiles alone are too narrow for few: over eight they miss the truth in a tenth of all
        cases instead of a twentieth (Hesterberg, The American Statistician 69(4), 2015). They serve where there is one
        subject, whose seeds alone are drawn."""
        mean = make(*(one.means for one in lines))
        drawn = np.array([make(*rows) for rows in zip(*(one.draws for one in lines), strict=True)])
        drawn = drawn[np.isfinite(drawn)]
        level, n = self.bootstrap.level, len(self.groups)
        if not all(one.varied for one in lines) or len(drawn) < self.bootstrap.resamples / 2:
            return Interval(mean)
        if n == 1:
            return percentiles(mean, drawn, level)
        from scipy.special import stdtrit  # the quantiles of Student's t; takes long to import

        off = float(stdtrit(n - 1, (1 + level) / 2)) * math.sqrt(n / (n - 1)) * float(np.std(drawn))
        return Interval(mean, mean - off, mean + off)

    def mean_difference(self, a: Settings, b: Settings, score: str) -> Interval:
        """How much higher the settings `a` score than `b`, the mean over pairs of them."""
        lines = [self.line(settings, score, score) for settings in (a, b)]
        return self.number(lambda p, q: float(np.mean(p[:, 0] - q[:, 0])), *lines)

    def x_gained(self, a: Settings, b: Settings) -> Interval:
        """`mean_difference` in the score that goes to the right; `y_gained`: in that which goes up."""
        return self.mean_difference(a, b, self.world.x)

    def y_gained(self, a: Settings, b: Settings) -> Interval:
        return self.mean_difference(a, b, self.world.y)

    def same_likeness(self, a: Settings, b: Settings) -> Interval:
        """How much further to the right front `a` lies than `b`, the mean over likenesses that both have."""
        return self.number(lambda p, q: gain(p, q, levels(p, q)), self.front(a), self.front(b))

    def area_gained(self, a: Settings, b: Settings) -> Interval:
        """How much larger the area below front `a` is than that below `b`."""
        return self.number(lambda p, q: area(p) - area(q), self.front(a), self.front(b))

    def lead(self, own: Settings, others: Settings) -> Interval:
        """The least lead of the front of some settings over others, of whose text the world's slack is forgiven."""
        slack = self.world.slack
        return self.number(lambda a, b: min(lead(a, one, slack) for one in b), self.front(own), self.line(others))

    def margin(self, own: Settings, others: Settings, *scores: str) -> Interval:
        """The least margin of the front of some settings over others, in two scores."""
        lines = self.front(own, *scores), self.line(others, *scores)
        return self.number(lambda a, b: min(margin(a, one) for one in b), *lines)


def compared(a: Settings, b: Settings, by: str) -> Callable[[Evidence], Finding]:
    """How a claim is judged that front `a` follows prompts better than `b` at the same likeness, `by` what."""

    def judge(evidence: Evidence) -> Finding:
        checks = gained(evidence, a, b, evidence.world.said(by))
        return Finding(checks, f"{evidence.x} {signed(checks[0].value.mean)} at the same {evidence.y}")

    return judge


def each_compared(*pairs: tuple[str, Settings, Settings]) -> Callable[[Evidence], Finding]:
    """How a claim is judged that of each pair the first front follows prompts better than the second at the same
    likeness; a pair begins with the name of its method."""

    def judge(evidence: Evidence) -> Finding:
        x, y = evidence.x, evidence.y
        alike = evidence.world.slack
        checks = [
            Check(f"{x} gained at the same {y}, {name}", evidence.same_likeness(a, b), alike=alike)
            for name, a, b in pairs
        ]
        numbers = " and ".join(
            f"{signed(check.value.mean)} ({pair[0]})" for check, pair in zip(checks, pairs, strict=True)
        )
        return Finding(checks, f"{x} {numbers} at the same {y}")

    return judge


def gained(evidence: Evidence, a: Settings, b: Settings, by: str, decides: bool = True) -> list[Check]:
    """What front `a` has more than `b`: of the right-hand score at the same likeness, which decides if anything does;
    of both scores at the same β; area."""
    x, y, alike = evidence.x, evidence.y, evidence.world.slack
    return [
        Check(f"{x} gained by {by}, at the same {y}", evidence.same_likeness(a, b), decides=decides, alike=alike),
        Check(f"{x} gained by {by}, at the same β", evidence.x_gained(a, b), decides=False, alike=alike),
        Check(f"{y} gained by {by}, at the same β", evidence.y_gained(a, b), decides=False),
        Check(f"area gained by {by}", evidence.area_gained(a, b), decides=False),
    ]


def beyond(evidence: Evidence, own: Settings, others: Settings, name: str) -> list[Check]:
    """How far front `own` lies beyond a method's settings, which decides: the least of its leads over them. Beside it,
    its lead over the setting with the best harmonic mean of both scores, the ε-indicator, and areas.

    The ε-indicator does not decide: it moves a setting in both scores alike, so one that follows every prompt, as most
    methods have one, can never lie far within any front.
    """
    best = max(others, key=lambda setting: float(harmonic_mean(*evidence.line([setting]).means[0])))
    at, every = f"{name} ({best.name})", f"all settings of {name}"
    beside = {
        f"the same above {at} alone, its best trade-off": evidence.lead(own, [best]),
        f"margin in both scores over {every}": evidence.margin(own, others),
        f"the margin over {at} in CLIP-T and CLIP-I": evidence.margin(own, [best], "clip_t", "clip_i"),
        f"area below the front, above {name}'s": evidence.area_gained(own, others),
    }
    decisive = Check(f"{evidence.y} of Perfusion's front above {every}", evidence.lead(own, others))
    return [decisive, *(Check(what, value, decides=False) for what, value in beside.items())]


def signed(number: float, digits: int = 3) -> str:
    """A difference in words, also one that there is not."""
    return f"{number:+.{digits}f}" if number == number else "not comparable"


# --- fronts as lines, from arrays (k, 2) ------------------------------------------------------------------------------


def non_dominated(points: np.ndarray) -> np.ndarray:
    """Those of some points (k, 2) than which no other is better, from left to right, each once."""
    return np.unique(points[front.non_dominated(points)], axis=0)


def area(points: np.ndarray) -> float:
    """What a front attains above (0, 0): the area below its line, and to the left of it."""
    x, y = non_dominated(np.maximum(points, 0)).T
    return float(x[0] * y[0] + np.sum((x[1:] - x[:-1]) * (y[1:] + y[:-1]) / 2))


def lead(points: np.ndarray, point: np.ndarray, slack: float) -> float:
    """How much higher a front is than a point, as far to the right as the point less `slack`; beyond the front's right
    end it has no height."""
    on = non_dominated(points)
    return float(np.interp(point[0] - slack, on[:, 0], on[:, 1], right=0.0) - point[1])


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
    """Heights that two fronts both attain, evenly spread from the lower of their lower ends, without it, to the lower
    of their upper ends: at the lower end both are the base model, which differs from itself in nothing."""
    ends = [(on[-1, 1], on[0, 1]) for on in (non_dominated(a), non_dominated(b))]
    return np.linspace(min(low for low, _ in ends), min(high for _, high in ends), _LEVELS + 1)[1:]


def gain(a: np.ndarray, b: np.ndarray, at: np.ndarray) -> float:
    """How much further to the right front `a` lies than `b`, the mean over some heights, at most those of their upper
    ends. Below its lower end a front attains what it has there."""
    found = [np.interp(at, on[::-1, 1], on[::-1, 0]) for on in (non_dominated(a), non_dominated(b))]
    return float(np.mean(found[0] - found[1]))
