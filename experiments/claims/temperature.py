"""τ of the gate in pictures."""

from __future__ import annotations

from experiments.curves import area
from experiments.evidence import Evidence
from experiments.experiment import Experiment, Finding, Series
from experiments.settings import FEW_BETAS, PERFUSION, by_beta, preset_value
from experiments.verdict import Check

TRAINED = float(preset_value(PERFUSION, "tau"))
HIGHER = float(preset_value(PERFUSION, "sample_tau"))
AT_TRAINED, AT_HIGHER = by_beta(PERFUSION, FEW_BETAS, tau=TRAINED), by_beta(PERFUSION, FEW_BETAS)


def judge(evidence: Evidence) -> Finding:
    """Areas of the fronts."""
    higher, trained = evidence.line(AT_HIGHER), evidence.line(AT_TRAINED)
    more = evidence.number(lambda a, b: area(a) - area(b), higher, trained)
    checks = (
        Check(f"area at τ {HIGHER:g}, above that at the training's {TRAINED:g}", more),
        Check(
            "prompt accuracy gained, at the same β",
            evidence.mean_difference(AT_HIGHER, AT_TRAINED, "prompt"),
            decides=False,
        ),
        Check(
            "identity gained, at the same β", evidence.mean_difference(AT_HIGHER, AT_TRAINED, "identity"), decides=False
        ),
    )
    return Finding(checks, f"area {more.mean:+.3f} at τ {HIGHER:g} against {TRAINED:g}")


EXPERIMENT = Experiment(
    id="temperature",
    place=6,
    claim="A τ in pictures above that of the training gives a better front; 0.15 works.",
    source="the gate at inference",
    test=f"The area below the front (three β, lines between them, above 0 and 0) at τ {HIGHER:g}, minus that at the "
    f"training's {TRAINED:g}. The claim holds if the 95 % interval lies above 0.",
    series=(Series(f"τ {TRAINED:g}", AT_TRAINED), Series(f"τ {HIGHER:g}", AT_HIGHER)),
    judge=judge,
)
