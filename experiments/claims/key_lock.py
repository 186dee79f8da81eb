"""Locked keys against trained ones."""

from __future__ import annotations

from experiments.evidence import AT_SAME_Y, BASE_SERIES, Experiment, Series, compared
from experiments.settings import FEW_BETAS, PERFUSION, TRAINED_KEYS, by_beta

LOCAL = by_beta(PERFUSION, FEW_BETAS)
GLOBAL = by_beta(PERFUSION, FEW_BETAS, key_lock="global")
NONE = by_beta(TRAINED_KEYS, FEW_BETAS)
SERIES = (Series("local", LOCAL), Series("global", GLOBAL), Series("none (trained keys)", NONE), BASE_SERIES)


EXPERIMENT = Experiment(
    id="key_lock",
    place=2,
    claim="Locking the keys moves the front toward the text, against trained keys.",
    source="the ablation with trained keys (trained-K)",
    test="How much more {x} the front with locked keys has than that with trained keys, " + AT_SAME_Y,
    series=SERIES,
    judge=compared(LOCAL, NONE, "locking"),
    caveats="The other settings were chosen with locked keys.",
)
