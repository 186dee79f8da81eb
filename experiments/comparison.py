"""Two fronts, compared as several claims do."""

from __future__ import annotations

from collections.abc import Sequence

from eval.aggregate import Interval
from experiments.curves import area, gain, height_at, levels, margin
from experiments.evidence import Evidence, Line, X, Y
from experiments.settings import BASE_MODEL, Setting
from experiments.verdict import Check


def front(evidence: Evidence, settings: Sequence[Setting], x: str = X, y: str = Y) -> Line:
    """The front of some settings, which ends in the base model's own pictures of the superclass: Perfusion gives
    them to the bit at β = ∞, and any other method where it is left off."""
    return evidence.line((*settings, BASE_MODEL), x, y)


def same_identity(evidence: Evidence, a: Sequence[Setting], b: Sequence[Setting]) -> Interval:
    """How much more prompt accuracy front `a` has than `b`, the mean over identities that both have."""
    return evidence.number(lambda p, q: gain(p, q, levels(p, q)), front(evidence, a), front(evidence, b))


def area_gained(evidence: Evidence, a: Sequence[Setting], b: Sequence[Setting]) -> Interval:
    """How much larger the area below front `a` is than that below `b`."""
    return evidence.number(lambda p, q: area(p) - area(q), front(evidence, a), front(evidence, b))


def beyond(evidence: Evidence, own: Sequence[Setting], others: Sequence[Setting], name: str) -> list[Check]:
    """How far front `own` lies beyond a method's settings, which decides: the least of its margins over them. Beside
    it, what it has over the setting with the best harmonic mean of identity and prompt accuracy, and areas."""
    best = best_of(evidence, others)
    at = f"{name} ({best.name})"
    line, point = front(evidence, own), evidence.line([best])
    by_clip = front(evidence, own, "clip_t", "clip_i")
    checks = [
        Check(
            f"margin of Perfusion's front over all settings of {name}",
            evidence.number(lambda a, b: min(margin(a, one) for one in b), line, evidence.line(others)),
        ),
        Check(
            f"the margin over {at} alone, its best trade-off",
            evidence.number(lambda a, b: margin(a, b[0]), line, point),
            decides=False,
        ),
    ]
    higher = evidence.number(lambda a, b: height_at(a, b[0, 0]) - b[0, 1], line, point)
    if higher.mean == higher.mean:
        checks.append(Check(f"identity above {at} at its prompt accuracy", higher, decides=False))
    clip = evidence.number(lambda a, b: margin(a, b[0]), by_clip, evidence.line([best], "clip_t", "clip_i"))
    checks.append(Check(f"the margin over {at} in CLIP-T and CLIP-I", clip, decides=False))
    checks.append(Check(f"area below the front, above {name}'s", area_gained(evidence, own, others), decides=False))
    return checks


def best_of(evidence: Evidence, settings: Sequence[Setting]) -> Setting:
    """The setting with the best harmonic mean of identity and prompt accuracy."""

    def harmonic(setting: Setting) -> float:
        x, y = evidence.line([setting]).means[0]
        return 2 * x * y / (x + y) if x + y else 0.0

    return max(settings, key=harmonic)


def gained(
    evidence: Evidence, a: Sequence[Setting], b: Sequence[Setting], by: str, decides: bool = True
) -> list[Check]:
    """What front `a` has more than `b`: prompt accuracy at the same identity, which decides if anything does; prompt
    accuracy and identity at the same β; area."""
    return [
        Check(f"prompt accuracy gained by {by}, at the same identity", same_identity(evidence, a, b), decides=decides),
        Check(
            f"prompt accuracy gained by {by}, at the same β", evidence.mean_difference(a, b, "prompt"), decides=False
        ),
        Check(f"identity gained by {by}, at the same β", evidence.mean_difference(a, b, "identity"), decides=False),
        Check(f"area gained by {by}", area_gained(evidence, a, b), decides=False),
    ]
