"""What an experiment is: a claim, what is drawn for it, and how the numbers judge it.

An experiment is one file in `experiments/claims` with an `EXPERIMENT`; nothing else has to be changed for a new one.
"""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from experiments.evidence import Check, Evidence, Verdict, combined, gained, signed
from experiments.runner import Together, Wanted
from experiments.settings import BASE_MODEL, Setting, Training
from experiments.world import World


@dataclass(frozen=True)
class Series:
    """Settings that are one line of a figure."""

    label: str
    settings: tuple[Setting, ...]


BASE_SERIES = Series("base", (BASE_MODEL,))


@dataclass(frozen=True)
class Table:
    """Numbers that are no scores."""

    title: str
    head: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]


@dataclass(frozen=True)
class Finding:
    """What an experiment has found.

    Attributes:
        key: the number that a hurried reader wants, in words.
        tables: to be shown beside the scores.
    """

    checks: Sequence[Check]
    key: str
    tables: tuple[Table, ...] = ()

    @property
    def verdict(self) -> Verdict:
        return combined(self.checks)


def compared(evidence: Evidence, a: Sequence[Setting], b: Sequence[Setting], by: str) -> Finding:
    """What front `a` has more than `b`, where the claim is that it follows prompts better at the same likeness."""
    checks = gained(evidence, a, b, by)
    return Finding(checks, f"{evidence.x} {signed(checks[0].value.mean)} at the same {evidence.y}")


@dataclass(frozen=True)
class Experiment:
    """One claim, what is drawn for it, and how it is judged. Its texts, and labels of series, may have what
    `World.said` puts in.

    Attributes:
        of_paper: whether it is a claim of the paper, which `make paper` tries; others are tried where `only=` names
            them.
        place: in the list of experiments.
        source: where the paper says it.
        test: what has to be true for the claim to hold, in words.
        caveats: what the experiment cannot show; of_toys: nor what it cannot show in Toyland.
        judge: gives the numbers; the verdict follows from them.
        pairs: whether two subjects are in each picture.
        times: how many times as many pictures of each prompt it draws as others do.
        x, y: scores of the figure, to the right and up; None: those of the world.
        trainings: what has to be trained, drawn or not.
        notes: what people found out about a surprising verdict. Not computed.
    """

    id: str
    place: int
    claim: str
    source: str
    test: str
    series: tuple[Series, ...]
    judge: Callable[[Evidence], Finding]
    caveats: str = ""
    of_toys: str = ""
    pairs: bool = False
    times: int = 1
    x: str | None = None
    y: str | None = None
    trainings: tuple[Training, ...] = ()
    notes: str = ""
    of_paper: bool = True

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
        return [Wanted(world.setting(s), group, self.times) for s in self.settings for group in groups]

    def axes(self, world: World) -> tuple[str, str]:
        """The scores of the figure, to the right and up."""
        return self.x or world.x, self.y or world.y

    def lacks(self, world: World) -> str | None:
        """What a world has not that it needs, in words."""
        return world.lacks([*self.settings, *map(Setting, self.trainings)])


def experiments() -> list[Experiment]:
    """All experiments, in the order of the page."""
    from experiments import claims

    modules: Sequence[str] = [module.name for module in pkgutil.iter_modules(claims.__path__)]
    found = [importlib.import_module(f"experiments.claims.{name}").EXPERIMENT for name in modules]
    return sorted(found, key=lambda experiment: experiment.place)
