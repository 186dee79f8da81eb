"""β of the gate while training."""

from __future__ import annotations

from experiments.evidence import Evidence
from experiments.experiment import BASE_SERIES, Experiment, Finding, Series, compared
from experiments.settings import FEW_BETAS, PERFUSION, by_beta

LOWER = 0.25
HIGH = by_beta(PERFUSION, FEW_BETAS)
LOW = by_beta(PERFUSION.changed(f"perfusion, trained at β {LOWER:g}", f"method.beta={LOWER}"), FEW_BETAS)


def judge(evidence: Evidence) -> Finding:
    """At the same likeness: at the same β in pictures, another training is a stronger or weaker concept."""
    return compared(evidence, HIGH, LOW, evidence.world.said(f"training at β {{beta}} over {LOWER:g}"))


EXPERIMENT = Experiment(
    id="train_bias",
    place=5,
    claim="A higher β in training gives a better front.",
    source="the bias of the gate in training",
    test="How much more {x} the front of concepts trained at β {beta} has than that of concepts trained "
    f"at {LOWER:g}, at the same {{y}} (mean over five {{ys}} that both have). The claim holds if the 95 % "
    "interval lies above 0.",
    series=(
        Series(f"trained at β {LOWER:g}", LOW),
        Series("trained at β {beta}", HIGH),
        BASE_SERIES,
    ),
    judge=judge,
    caveats="The other settings were chosen together with β {beta}.",
)
