"""β of the gate while training."""

from __future__ import annotations

from experiments.evidence import AT_SAME_Y, BASE_SERIES, Experiment, Series, compared
from experiments.settings import FEW_BETAS, PERFUSION, by_beta

LOWER = 0.25
HIGH = by_beta(PERFUSION, FEW_BETAS)
LOW = by_beta(PERFUSION.changed(f"perfusion, trained at β {LOWER:g}", f"method.beta={LOWER}"), FEW_BETAS)


EXPERIMENT = Experiment(
    id="train_bias",
    place=5,
    claim="A higher β in training gives a better front.",
    source="the bias of the gate in training",
    test="How much more {x} the front of concepts trained at β {beta} has than that of concepts trained at "
    f"{LOWER:g}, {AT_SAME_Y}",
    series=(Series(f"trained at β {LOWER:g}", LOW), Series("trained at β {beta}", HIGH), BASE_SERIES),
    judge=compared(HIGH, LOW, f"training at β {{beta}} over {LOWER:g}"),
    caveats="The other settings were chosen together with β {beta}.",
)
