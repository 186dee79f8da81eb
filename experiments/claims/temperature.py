"""τ of the gate in pictures."""

from __future__ import annotations

from experiments.evidence import Evidence
from experiments.experiment import BASE_SERIES, Experiment, Finding, Series, compared
from experiments.settings import FEW_BETAS, PERFUSION, by_beta, preset_value

TRAINED = float(preset_value(PERFUSION, "tau"))
HIGHER = float(preset_value(PERFUSION, "sample_tau"))
AT_TRAINED, AT_HIGHER = by_beta(PERFUSION, FEW_BETAS, tau=TRAINED), by_beta(PERFUSION, FEW_BETAS)


def judge(evidence: Evidence) -> Finding:
    """At the same likeness: at the same β, a higher τ shuts the gate further, which moves along a front."""
    return compared(evidence, AT_HIGHER, AT_TRAINED, f"τ {HIGHER:g} over {TRAINED:g}")


EXPERIMENT = Experiment(
    id="temperature",
    place=6,
    claim="A τ in pictures above that of the training gives a better front; 0.15 works.",
    source="the gate at inference",
    test=f"How much more {{x}} the front at τ {HIGHER:g} has than that at the training's {TRAINED:g}, at the "
    "same {y} (mean over five {ys} that both have). The claim holds if the 95 % interval lies above 0.",
    series=(
        Series(f"τ {TRAINED:g}", AT_TRAINED),
        Series(f"τ {HIGHER:g}", AT_HIGHER),
        BASE_SERIES,
    ),
    judge=judge,
    caveats="The three β of each τ lie at other places of its front, which is taken as a straight line between them.",
)
