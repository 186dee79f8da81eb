"""One training of Perfusion, β swept, against what other methods reach."""

from __future__ import annotations

from eval.looks import title
from experiments.curves import area, height_at, margin
from experiments.evidence import Evidence
from experiments.experiment import Experiment, Finding, Series
from experiments.settings import (
    BASE_MODEL,
    CUSTOM_DIFFUSION,
    DREAMBOOTH,
    LORA,
    PERFUSION,
    TEXTUAL_INVERSION,
    Setting,
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
    """Each method's best setting against Perfusion's front."""
    front, by_clip = evidence.line(FRONT), evidence.line(FRONT, "clip_t", "clip_i")
    checks = []
    for series in OTHERS:
        best = best_of(evidence, series.settings)
        point = evidence.line([best])
        name = f"{title(series.label)} ({best.name})"
        decides = series.label in NAMED
        beyond = evidence.number(lambda a, b: margin(a, b[0]), front, point)
        checks.append(Check(f"margin of Perfusion's front over {name}", beyond, decides=decides))
        higher = evidence.number(lambda a, b: height_at(a, b[0, 0]) - b[0, 1], front, point)
        if higher.mean == higher.mean:
            checks.append(Check(f"identity above {name} at its prompt accuracy", higher, decides=False))
        clip = evidence.number(lambda a, b: margin(a, b[0]), by_clip, evidence.line([best], "clip_t", "clip_i"))
        checks.append(Check(f"the margin over {name} in CLIP-T and CLIP-I", clip, decides=False))
        all_of = evidence.line(series.settings)
        larger = evidence.number(lambda a, b: area(a) - area(b), front, all_of)
        checks.append(Check(f"area below the front, above {title(series.label)}'s", larger, decides=False))
    least = min((c for c in checks if c.decides), key=lambda c: c.value.mean)
    return Finding(tuple(checks), f"{least.what}: {least.value.mean:+.3f}")


def best_of(evidence: Evidence, settings: tuple[Setting, ...]) -> Setting:
    """The setting with the best harmonic mean of identity and prompt accuracy."""

    def harmonic(setting: Setting) -> float:
        x, y = evidence.line([setting]).means[0]
        return 2 * x * y / (x + y) if x + y else 0.0

    return max(settings, key=harmonic)


EXPERIMENT = Experiment(
    id="pareto",
    place=1,
    claim="One trained concept, β swept in pictures, spans a front that Textual Inversion, DreamBooth and Custom "
    "Diffusion do not reach.",
    source="the comparison with other methods: fronts over β from one training; abstract",
    test="For each of the three methods: take its setting with the best harmonic mean of identity and prompt accuracy. "
    "By how much could it be better in both and still lie within Perfusion's front (the negative of the additive "
    "ε-indicator)? The claim holds if the 95 % interval of this margin lies above 0 for all three, and fails if it "
    "lies below 0 for one.",
    series=(Series("perfusion", FRONT), *OTHERS, Series("base", (BASE_MODEL,))),
    judge=judge,
    caveats="A method's best setting is chosen by the same pictures that it is judged by, which favours the other "
    "methods. Perfusion's line has more points than theirs; a line through more points lies no lower.",
)
