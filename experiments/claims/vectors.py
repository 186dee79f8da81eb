"""How many vectors the concept's word has."""

from __future__ import annotations

from experiments.evidence import AT_SAME_Y, BASE_SERIES, Experiment, Series, each_compared
from experiments.settings import FEW_BETAS, PERFUSION, by_beta

ONE = by_beta(PERFUSION, FEW_BETAS)
TWO = by_beta(PERFUSION.changed("perfusion, 2 vectors", "method.vectors=2"), FEW_BETAS)
THREE = by_beta(PERFUSION.changed("perfusion, 3 vectors", "method.vectors=3"), FEW_BETAS)


EXPERIMENT = Experiment(
    id="vectors",
    place=16,
    claim="A word of several vectors has a better front than one of a single vector.",
    source="a question: where the word is longer, the edit's values are read at more positions of the prompt",
    test="How much more {x} words of two and of three vectors have than a word of one, on the same budget, "
    + AT_SAME_Y,
    series=(Series("1 vector", ONE), Series("2 vectors", TWO), Series("3 vectors", THREE), BASE_SERIES),
    judge=each_compared(("2 vectors", TWO, ONE), ("3 vectors", THREE, ONE)),
    caveats="Rates and steps were chosen with one vector. On the disk a further vector takes as many numbers, in half "
    "precision, as the text encoder is wide: 1.5 kB for Stable Diffusion 1.5.",
    of_paper=False,
)
