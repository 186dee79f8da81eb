"""Two concepts that were trained apart, in one picture."""

from __future__ import annotations

from dataclasses import replace

from experiments.evidence import BASE_SERIES, Evidence, Experiment, Finding, Series, beyond
from experiments.settings import CUSTOM_DIFFUSION, JOINT_CUSTOM_DIFFUSION, PERFUSION, dial

BOTH, MERGED, TOGETHER = dial(PERFUSION), dial(CUSTOM_DIFFUSION), dial(JOINT_CUSTOM_DIFFUSION)


def judge(evidence: Evidence) -> Finding:
    """Perfusion's front over all settings of Custom Diffusion."""
    checks = beyond(evidence, BOTH, MERGED, "Custom Diffusion")
    together = beyond(evidence, BOTH, TOGETHER, "Custom Diffusion, trained together")
    checks += [replace(check, decides=False) for check in together]
    return Finding(checks, f"{evidence.y} {checks[0].value.mean:+.3f} above all settings of Custom Diffusion")


EXPERIMENT = Experiment(
    id="multi_concept",
    place=8,
    claim="Concepts that were trained apart combine in one picture, better than with Custom Diffusion.",
    source="combining concepts that were learned apart",
    test="Pictures of two {thing}s. How much more {y} (mean of both {thing}s) has Perfusion's front than Custom "
    "Diffusion at the latter's {x} (less {slack}), at the setting for which this lead is least? The claim holds "
    "if the 95 % interval of that lies above 0.",
    series=(
        Series("perfusion", BOTH),
        Series("custom_diffusion", MERGED),
        Series("Custom Diffusion, trained together", TOGETHER),
        BASE_SERIES,
    ),
    judge=judge,
    pairs=True,
    caveats="The claim is judged by concepts that were trained apart, which Custom Diffusion merges by its closed "
    "form; trained on both together, as the paper has it, it stands beside. There are half as many pairs as {thing}s.",
    notes="Why the lead is not decided, with 20 pairs: two explanations were tried on these pictures. Lost toys: at "
    "β 0.85 Perfusion shows both superclasses in 83 % of the pictures, Custom Diffusion in all. Without that: "
    "where both methods show both, Perfusion has more identity by 0.036 ± 0.060, which is no more decided, so "
    "the number of pairs is what limits it as well.",
)
