"""Scores as experiments ask for them: a setting's scores, a front, and numbers made of fronts with intervals.

All intervals come from one bootstrap over toys and seeds (`eval.aggregate`), which draws the same toys and seeds for
every setting: differences are paired. Those of numbers that verdicts rest on are widened for the few toys there are.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
from scipy.special import stdtrit  # the quantiles of Student's t

from eval.aggregate import Bootstrap, Interval, Summary, summary
from eval.record import Point
from experiments.runner import Runner, Together, Wanted
from experiments.settings import Setting, Training
from perfusion.training.run_folder import RunFolder

X, Y = "prompt", "identity"


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
        groups: what each picture shows: single toys, or pairs.
    """

    runner: Runner
    groups: Sequence[Together]
    bootstrap: Bootstrap = field(default_factory=Bootstrap)
    _known: dict[Setting, Summary] = field(default_factory=dict)

    def points(self, setting: Setting) -> list[Point]:
        return [self.runner.points[Wanted(setting, toys)] for toys in self.groups]

    def summary(self, setting: Setting, label: str | None = None) -> Summary:
        """A setting's scores over all toys, under the name that it has in this experiment."""
        if setting not in self._known:
            self._known[setting] = summary(self.points(setting), self.bootstrap)
        found = self._known[setting]
        return found if label is None else replace(found, method=label)

    def line(self, settings: Sequence[Setting], x: str = X, y: str = Y) -> Line:
        """Settings in two scores; NaN where one has no such score, as diversity where every prompt has one picture."""
        summaries = [self.summary(setting) for setting in settings]
        none, never = Interval(float("nan")), np.full(self.bootstrap.resamples, np.nan)
        means = np.array([[s.scores.get(name, none).mean for name in (x, y)] for s in summaries])
        draws = np.array([[s.draws.get(name, never) for name in (x, y)] for s in summaries])  # (k, 2, B)
        varied = all(s.scores.get(name, none).low is not None for s in summaries for name in (x, y))
        return Line(means, np.moveaxis(draws, -1, 0), varied)

    def number(self, make: Callable[..., float], *lines: Line) -> Interval:
        """A number that is made of fronts, with its interval: ± t_{n−1} √(n / (n−1)) standard deviations of the draws,
        for n toys. Percentiles alone are too narrow for few toys: over eight they miss the truth in a tenth of all
        cases instead of a twentieth (Hesterberg, The American Statistician 69(4), 2015). They serve where there is one
        toy, whose seeds alone are drawn."""
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

    def runs(self, training: Training) -> list[RunFolder]:
        """The folders of a training, one for each toy."""
        toys = dict.fromkeys(toy for group in self.groups for toy in group)
        return [self.runner.run_folder(training, toy) for toy in toys]

    def training_seconds(self, training: Training) -> list[float]:
        """How long each training took, without loading and samples."""
        found: list[Mapping[str, Any]] = [json.loads(run.metrics.read_text()) for run in self.runs(training)]
        return [float(metrics["seconds"]["training"]) for metrics in found]


def folder_bytes(folder: Path) -> int:
    """The size of all files in a folder; 0 if there is none."""
    return sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())
