"""One training picture against five."""

from __future__ import annotations

from experiments.evidence import Check, Evidence, area_gained, same_identity, signed
from experiments.experiment import BASE_SERIES, Experiment, Finding, Series
from experiments.settings import FEW_BETAS, FIVE_PICTURES, PERFUSION, by_beta

SLIGHTLY = 0.05  # of prompt accuracy: less than one asked-for thing in a picture of every ten
ONE = by_beta(PERFUSION, FEW_BETAS)
FIVE = by_beta(FIVE_PICTURES, FEW_BETAS)


def judge(evidence: Evidence) -> Finding:
    """What one picture loses."""
    loss = same_identity(evidence, FIVE, ONE)
    checks = (
        Check("prompt accuracy lost with one picture, at the same identity", loss, SLIGHTLY, above=False),
        Check("the same at the same β", evidence.mean_difference(FIVE, ONE, "prompt"), SLIGHTLY, False, False),
        Check(
            "identity lost with one picture, at the same β",
            evidence.mean_difference(FIVE, ONE, "identity"),
            decides=False,
        ),
        Check("area lost", area_gained(evidence, FIVE, ONE), decides=False),
    )
    return Finding(checks, f"prompt accuracy {signed(-loss.mean)} with one picture, at the same identity")


EXPERIMENT = Experiment(
    id="one_shot",
    place=3,
    claim="One picture overfits only slightly against several.",
    source="one-shot personalization",
    test=f"How much prompt accuracy the front from one picture lacks against that from five, at the same identity. The "
    f"claim holds if the 95 % interval lies below {SLIGHTLY}, and fails if it lies above.",
    series=(Series("1 picture", ONE), Series("5 pictures", FIVE), BASE_SERIES),
    judge=judge,
    caveats="Both are trained for as many steps, which were chosen for one picture. The first of the five pictures is "
    "the one of the one-shot training, on a plain background; the others are set in other places.",
)
