"""The soft mask in the loss."""

from __future__ import annotations

from experiments.curves import area, gain, levels
from experiments.evidence import Evidence
from experiments.experiment import Experiment, Finding, Series
from experiments.settings import FEW_BETAS, FIVE_PICTURES, by_beta
from experiments.verdict import Check, signed

WITH = by_beta(FIVE_PICTURES, FEW_BETAS)
WITHOUT = by_beta(FIVE_PICTURES.changed("perfusion, 5 pictures, no mask", "method.masked_loss=false"), FEW_BETAS)


def judge(evidence: Evidence) -> Finding:
    """What the mask gains."""
    masked, plain = evidence.line(WITH), evidence.line(WITHOUT)
    at = levels(masked.means, plain.means)
    same = evidence.number(lambda a, b: gain(a, b, at), masked, plain)
    checks = (
        Check("prompt accuracy gained by the mask, at the same identity", same),
        Check("the same at the same β", evidence.mean_difference(WITH, WITHOUT, "prompt"), decides=False),
        Check(
            "identity gained by the mask, at the same β",
            evidence.mean_difference(WITH, WITHOUT, "identity"),
            decides=False,
        ),
        Check("area gained", evidence.number(lambda a, b: area(a) - area(b), masked, plain), decides=False),
    )
    return Finding(checks, f"prompt accuracy {signed(same.mean)} at the same identity")


EXPERIMENT = Experiment(
    id="mask",
    place=4,
    claim="The soft mask helps the pictures to follow the text.",
    source="the soft object mask in the loss",
    test="How much more prompt accuracy the front has that was trained with masks, at the same identity (mean over "
    "five identities that both have). The claim holds if the 95 % interval lies above 0.",
    series=(Series("with mask", WITH), Series("without", WITHOUT)),
    judge=judge,
    caveats="Trained on five pictures, four of them with a background that a mask can keep out; that of the one-shot "
    "trainings is plain. Masks are exact; those of photos are not.",
)
