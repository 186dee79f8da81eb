"""Two fronts of the same β, as several claims compare them."""

from __future__ import annotations

from collections.abc import Sequence

from experiments.curves import area, gain, levels
from experiments.evidence import Evidence
from experiments.settings import Setting
from experiments.verdict import Check


def gained(
    evidence: Evidence, a: Sequence[Setting], b: Sequence[Setting], by: str, decides: bool = True
) -> list[Check]:
    """What front `a` has more than `b`: prompt accuracy at the same identity, which decides if anything does; prompt
    accuracy and identity at the same β; area."""
    one, other = evidence.line(a), evidence.line(b)
    at = levels(one.means, other.means)
    same = evidence.number(lambda p, q: gain(p, q, at), one, other)
    more = evidence.number(lambda p, q: area(p) - area(q), one, other)
    return [
        Check(f"prompt accuracy gained by {by}, at the same identity", same, decides=decides),
        Check(
            f"prompt accuracy gained by {by}, at the same β", evidence.mean_difference(a, b, "prompt"), decides=False
        ),
        Check(f"identity gained by {by}, at the same β", evidence.mean_difference(a, b, "identity"), decides=False),
        Check(f"area gained by {by}", more, decides=False),
    ]
