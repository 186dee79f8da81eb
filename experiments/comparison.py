"""Two fronts, compared as several claims do."""

from __future__ import annotations

from collections.abc import Sequence

from eval.aggregate import Interval, harmonic_mean
from experiments.curves import area, gain, lead, levels, margin
from experiments.evidence import Evidence, Line, X, Y
from experiments.settings import BASE_MODEL, Setting
from experiments.verdict import Check

SLACK = 0.02  # of prompt accuracy: one asked-for thing of fifty, within which two settings follow the text alike


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
    """How far front `own` lies beyond a method's settings, which decides: the least of its leads over them. Beside it,
    its lead over the setting with the best harmonic mean of identity and prompt accuracy, the ε-indicator, and areas.

    The ε-indicator does not decide: it moves a setting in both scores alike, so one that follows every prompt, as most
    methods have one, can never lie far within any front.
    """
    best = best_of(evidence, others)
    at = f"{name} ({best.name})"
    line, point, all_of_them = front(evidence, own), evidence.line([best]), evidence.line(others)
    by_clip = front(evidence, own, "clip_t", "clip_i")
    return [
        Check(
            f"identity of Perfusion's front above all settings of {name}",
            evidence.number(lambda a, b: min(lead(a, one, SLACK) for one in b), line, all_of_them),
        ),
        Check(
            f"the same above {at} alone, its best trade-off",
            evidence.number(lambda a, b: lead(a, b[0], SLACK), line, point),
            decides=False,
        ),
        Check(
            f"margin in both scores over all settings of {name}",
            evidence.number(lambda a, b: min(margin(a, one) for one in b), line, all_of_them),
            decides=False,
        ),
        Check(
            f"the margin over {at} in CLIP-T and CLIP-I",
            evidence.number(lambda a, b: margin(a, b[0]), by_clip, evidence.line([best], "clip_t", "clip_i")),
            decides=False,
        ),
        Check(f"area below the front, above {name}'s", area_gained(evidence, own, others), decides=False),
    ]


def best_of(evidence: Evidence, settings: Sequence[Setting]) -> Setting:
    """The setting with the best harmonic mean of identity and prompt accuracy."""
    return max(settings, key=lambda setting: float(harmonic_mean(*evidence.line([setting]).means[0])))


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
