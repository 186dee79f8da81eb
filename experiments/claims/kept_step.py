"""Which step of a training is kept: the last, or the one with the best scores."""

from __future__ import annotations

from experiments.evidence import Evidence
from experiments.experiment import BASE_SERIES, Experiment, Finding, Series, compared
from experiments.settings import FEW_BETAS, PERFUSION, by_beta

CHOSEN = PERFUSION.changed("perfusion, best step", "callbacks=select")
BEST, LAST = by_beta(CHOSEN, FEW_BETAS), by_beta(PERFUSION, FEW_BETAS)


def judge(evidence: Evidence) -> Finding:
    """At the same likeness, and at the same β."""
    return compared(evidence, BEST, LAST, "keeping the step with the best scores")


EXPERIMENT = Experiment(
    id="kept_step",
    place=13,
    claim="The step with the best harmonic mean of CLIP-I and CLIP-T has a better front than the last step.",
    source="Tewel et al. 2023 (arXiv 2305.01644), which keeps that step and does not compare",
    test="How much more {x} the front of the step that `callbacks=select` keeps has than that of the last "
    "step, at the same {y} (mean over five {ys} that both have). The claim holds if the 95 % interval lies "
    "above 0.",
    series=(Series("best step", BEST), Series("last step", LAST), BASE_SERIES),
    judge=judge,
    of_toys="The scores are those of Toyland's scorer, whose CLIP-T agrees but weakly with whether a prompt was "
    "followed (model card).",
    of_paper=False,
)
