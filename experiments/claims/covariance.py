"""What the choice of the second moment C changes."""

from __future__ import annotations

from experiments.evidence import AT_SAME_Y, BASE_SERIES, Evidence, Experiment, Finding, Series, gained, signed
from experiments.settings import FEW_BETAS, PERFUSION, by_beta

CHOICES = {
    "words alone": "backbone.covariance.positions=words",
    "ridge 1e-4": "backbone.covariance.ridge=0.0001",
    "ridge 1": "backbone.covariance.ridge=1.0",
}
OWN = by_beta(PERFUSION, FEW_BETAS)
OTHERS = tuple(
    Series(label, by_beta(PERFUSION.changed(f"perfusion, C: {label}", word), FEW_BETAS))
    for label, word in CHOICES.items()
)


def judge(evidence: Evidence) -> Finding:
    """The default against each other choice; that of positions decides."""
    checks = []
    for series in OTHERS:
        by = f"the default over {series.label}"
        checks += gained(evidence, OWN, series.settings, by, decides=series is OTHERS[0])
    return Finding(checks, f"{evidence.x} {signed(checks[0].value.mean)} over words alone, at the same {evidence.y}")


EXPERIMENT = Experiment(
    id="covariance",
    place=10,
    claim="C over all positions that the cross-attention reads gives a better front than over a caption's words alone.",
    source="a choice of this project, docs/covariance.md",
    test="How much more {x} the front with the default C (all positions, ridge 0.01) has than that with C over the "
    f"words alone, {AT_SAME_Y} Other ridges stand beside it.",
    series=(Series("default", OWN), *OTHERS, BASE_SERIES),
    judge=judge,
    caveats="The other settings were chosen with the default C.",
    of_paper=False,
)
