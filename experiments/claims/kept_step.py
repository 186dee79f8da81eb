"""Which step of a training is kept: the last, or the one with the best scores."""

from __future__ import annotations

from experiments.evidence import AT_SAME_Y, BASE_SERIES, Experiment, Series, compared
from experiments.settings import FEW_BETAS, PERFUSION, by_beta

CHOSEN = PERFUSION.changed("perfusion, best step", "callbacks=select")
BEST, LAST = by_beta(CHOSEN, FEW_BETAS), by_beta(PERFUSION, FEW_BETAS)


EXPERIMENT = Experiment(
    id="kept_step",
    place=13,
    claim="The step with the best harmonic mean of CLIP-I and CLIP-T has a better front than the last step.",
    source="Tewel et al. 2023 (arXiv 2305.01644), which keeps that step and does not compare",
    test="How much more {x} the front of the step that `callbacks=select` keeps has than that of the last step, "
    + AT_SAME_Y,
    series=(Series("best step", BEST), Series("last step", LAST), BASE_SERIES),
    judge=compared(BEST, LAST, "keeping the step with the best scores"),
    of_toys="The scores are those of Toyland's scorer, whose CLIP-T agrees but weakly with whether a prompt was "
    "followed (model card).",
    of_paper=False,
)
