"""From numbers to a verdict: a claim holds, fails or stays undecided by where an interval lies, and by nothing else."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from enum import StrEnum

from eval.aggregate import Interval


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
