"""β of the gate while training."""

from __future__ import annotations

from experiments.curves import area
from experiments.evidence import Evidence
from experiments.experiment import Experiment, Finding, Series
from experiments.settings import FEW_BETAS, PERFUSION, by_beta, preset_value
from experiments.verdict import Check

LOWER = (0.25, 0.5)
OWN = float(preset_value(PERFUSION, "beta"))
LOW = tuple(
    Series(
        f"trained at β {beta:g}",
        by_beta(PERFUSION.changed(f"perfusion, trained at β {beta:g}", f"method.beta={beta}"), FEW_BETAS),
    )
    for beta in LOWER
    if beta < OWN
)
HIGH = Series(f"trained at β {OWN:g}", by_beta(PERFUSION, FEW_BETAS))


def judge(evidence: Evidence) -> Finding:
    """Areas of the fronts; the lowest β decides."""
    high = evidence.line(HIGH.settings)
    checks = []
    for series in LOW:
        more = evidence.number(lambda a, b: area(a) - area(b), high, evidence.line(series.settings))
        checks.append(Check(f"area {HIGH.label}, above that {series.label}", more, decides=series is LOW[0]))
    return Finding(tuple(checks), f"area {checks[0].value.mean:+.3f} {HIGH.label} against {LOWER[0]:g}")


EXPERIMENT = Experiment(
    id="train_bias",
    place=5,
    claim="A higher β in training gives a better front.",
    source="the bias of the gate in training",
    test="The area below the front (three β in pictures, lines between them, above 0 and 0) of concepts that were "
    f"trained at β {OWN:g}, minus that of concepts trained at {LOWER[0]:g}. The claim holds if the 95 % interval lies "
    "above 0.",
    series=(*LOW, HIGH),
    judge=judge,
    caveats="All are drawn at the same three β, which may suit one of them better than the others; the other settings "
    f"were chosen together with β {OWN:g}.",
)
