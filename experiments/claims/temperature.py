"""τ of the gate in pictures."""

from __future__ import annotations

from experiments.evidence import AT_SAME_Y, BASE_SERIES, Experiment, Series, compared
from experiments.settings import FEW_BETAS, PERFUSION, by_beta, preset_value

TRAINED = float(preset_value(PERFUSION, "tau"))
HIGHER = float(preset_value(PERFUSION, "sample_tau"))
# At the same β a higher τ shuts the gate further, which moves along a front: fronts are compared, not points of one β.
AT_TRAINED, AT_HIGHER = by_beta(PERFUSION, FEW_BETAS, tau=TRAINED), by_beta(PERFUSION, FEW_BETAS)


EXPERIMENT = Experiment(
    id="temperature",
    place=6,
    claim="A τ in pictures above that of the training gives a better front; 0.15 works.",
    source="the gate at inference",
    test=f"How much more {{x}} the front at τ {HIGHER:g} has than that at the training's {TRAINED:g}, " + AT_SAME_Y,
    series=(Series(f"τ {TRAINED:g}", AT_TRAINED), Series(f"τ {HIGHER:g}", AT_HIGHER), BASE_SERIES),
    judge=compared(AT_HIGHER, AT_TRAINED, f"τ {HIGHER:g} over {TRAINED:g}"),
    caveats="The three β of each τ lie at other places of its front, which is taken as a straight line between them.",
)
