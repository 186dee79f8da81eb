"""What an experiment is: a claim, what is drawn for it, and how the numbers judge it.

An experiment is one file in `experiments/claims` with an `EXPERIMENT`; nothing else has to be changed for a new one.
"""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from experiments.evidence import Check, Evidence, Verdict, X, Y, combined, gained, signed
from experiments.protocol import Alternatives, Protocol
from experiments.runner import Together, Wanted
from experiments.settings import BASE_MODEL, Setting, Training


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
    """What front `a` has more than `b`, where the claim is that it has more prompt accuracy at the same identity."""
    checks = gained(evidence, a, b, by)
    return Finding(checks, f"prompt accuracy {signed(checks[0].value.mean)} at the same identity")


@dataclass(frozen=True)
class Experiment:
    """One claim, what is drawn for it, and how it is judged.

    Attributes:
        of_paper: whether it is a claim of the paper, which `make paper` tries; others are tried where `only=` names
            them.
        place: in the list of experiments.
        source: where the paper says it.
        test: what has to be true for the claim to hold, in words.
        caveats: what the experiment cannot show.
        judge: gives the numbers; the verdict follows from them.
        pairs: whether two toys are in each picture.
        times: how many times as many pictures of each prompt it draws as others do.
        x, y: scores of the figure, to the right and up.
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
    pairs: bool = False
    times: int = 1
    x: str = X
    y: str = Y
    trainings: tuple[Training, ...] = ()
    notes: str = ""
    of_paper: bool = True

    @property
    def trained(self) -> list[Training]:
        """All that it trains."""
        drawn = [s.training for one in self.series for s in one.settings if s.training is not None]
        return list(dict.fromkeys((*drawn, *self.trainings)))

    def groups(self, protocol: Protocol) -> tuple[Together, ...]:
        """The toys that its pictures show together."""
        return protocol.pairs if self.pairs else tuple((toy,) for toy in protocol.toys)

    def prompts(self, protocol: Protocol) -> tuple[Alternatives, ...]:
        """What is drawn of each of them."""
        return protocol.pair_prompts if self.pairs else protocol.prompts

    def wanted(self, protocol: Protocol) -> list[Wanted]:
        """All that has to be drawn."""
        groups = self.groups(protocol)
        return [Wanted(s, toys, self.times) for one in self.series for s in one.settings for toys in groups]


def experiments() -> list[Experiment]:
    """All experiments, in the order of the page."""
    from experiments import claims

    modules: Sequence[str] = [module.name for module in pkgutil.iter_modules(claims.__path__)]
    found = [importlib.import_module(f"experiments.claims.{name}").EXPERIMENT for name in modules]
    return sorted(found, key=lambda experiment: experiment.place)
