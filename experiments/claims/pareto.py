"""One training of Perfusion, β swept, against what other methods reach."""

from __future__ import annotations

from dataclasses import replace

from eval.looks import title
from experiments.comparison import beyond
from experiments.evidence import Evidence
from experiments.experiment import Experiment, Finding, Series
from experiments.settings import (
    BASE_MODEL,
    CUSTOM_DIFFUSION,
    DREAMBOOTH,
    LORA,
    PERFUSION,
    TEXTUAL_INVERSION,
    by_beta,
    by_scale,
    by_steps,
)
from experiments.verdict import Check

FRONT = by_beta(PERFUSION)
OTHERS = (
    Series("textual_inversion", by_steps(TEXTUAL_INVERSION)),
    Series("dreambooth", by_steps(DREAMBOOTH)),
    Series("custom_diffusion", by_steps(CUSTOM_DIFFUSION)),
    Series("lora", by_scale(LORA)),
)
NAMED = ("textual_inversion", "dreambooth", "custom_diffusion")  # by the claim; LoRA came later


def judge(evidence: Evidence) -> Finding:
    """Perfusion's front against each method; LoRA's checks stand beside."""
    checks: list[Check] = []
    for series in OTHERS:
        found = beyond(evidence, FRONT, series.settings, title(series.label))
        checks += found if series.label in NAMED else [replace(check, decides=False) for check in found]
    least = min((c for c in checks if c.decides), key=lambda c: c.value.mean)
    return Finding(tuple(checks), f"{least.what}: {least.value.mean:+.3f}")


EXPERIMENT = Experiment(
    id="pareto",
    place=1,
    claim="One trained concept, β swept in pictures, spans a front that Textual Inversion, DreamBooth and Custom "
    "Diffusion do not reach.",
    source="the comparison with other methods: fronts over β from one training; abstract",
    test="For each of the three methods: by how much could all of its settings be better in both scores and still lie "
    "within Perfusion's front (the negative of the additive ε-indicator)? The claim holds if the 95 % interval of this "
    "margin lies above 0 for all three, and fails if it lies below 0 for one.",
    series=(Series("perfusion", FRONT), *OTHERS, Series("base", (BASE_MODEL,))),
    judge=judge,
    caveats="Perfusion's line has more points than the others have; a line through more points lies no lower. The "
    "margin is that of the one setting which lies furthest out; a method's best trade-off stands beside it.",
)
