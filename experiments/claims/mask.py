"""The soft mask in the loss."""

from __future__ import annotations

from experiments.evidence import AT_SAME_Y, BASE_SERIES, Experiment, Series, compared
from experiments.settings import FEW_BETAS, FIVE_PICTURES, by_beta

WITH = by_beta(FIVE_PICTURES, FEW_BETAS)
WITHOUT = by_beta(FIVE_PICTURES.changed("perfusion, 5 pictures, no mask", "method.masked_loss=false"), FEW_BETAS)


EXPERIMENT = Experiment(
    id="mask",
    place=4,
    claim="The soft mask helps the pictures to follow the text.",
    source="the soft object mask in the loss",
    test="How much more {x} the front has that was trained with masks, " + AT_SAME_Y,
    series=(Series("with mask", WITH), Series("without", WITHOUT), BASE_SERIES),
    judge=compared(WITH, WITHOUT, "the mask"),
    of_toys="Trained on five pictures, four of them with a background that a mask can keep out; that of the one-shot "
    "trainings is plain. Masks are exact; those of photos are not. The other settings were chosen with masks and one "
    "picture.",
)
