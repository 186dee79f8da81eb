"""One training picture against five."""

from __future__ import annotations

from experiments.evidence import BASE_SERIES, Check, Evidence, Experiment, Finding, Series, signed
from experiments.settings import FEW_BETAS, FIVE_PICTURES, ONE_PICTURE, by_beta

ONE = by_beta(ONE_PICTURE, FEW_BETAS)
FIVE = by_beta(FIVE_PICTURES, FEW_BETAS)


def judge(evidence: Evidence) -> Finding:
    """What one picture loses."""
    x, y, slight = evidence.x, evidence.y, evidence.world.slight
    loss = evidence.same_likeness(FIVE, ONE)
    checks = (
        Check(f"{x} lost with one picture, at the same {y}", loss, slight, above=False),
        Check("the same at the same β", evidence.x_gained(FIVE, ONE), slight, False, False),
        Check(f"{y} lost with one picture, at the same β", evidence.y_gained(FIVE, ONE), decides=False),
        Check("area lost", evidence.area_gained(FIVE, ONE), decides=False),
    )
    return Finding(checks, f"{x} {signed(-loss.mean)} with one picture, at the same {y}")


EXPERIMENT = Experiment(
    id="one_shot",
    place=3,
    claim="One picture overfits only slightly against several.",
    source="one-shot personalization",
    test="How much {x} the front from one picture lacks against that from {several}, at the same {y}. The "
    "claim holds if the 95 % interval lies below {slight}, and fails if it lies above.",
    series=(Series("1 picture", ONE), Series("{several_pictures}", FIVE), BASE_SERIES),
    judge=judge,
    of_toys="Both are trained for as many steps, which were chosen for one picture. The first of the five pictures is "
    "the one of the one-shot training, on a plain background; the others are set in other places.",
)
