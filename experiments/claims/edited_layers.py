"""How much of a subject passes through K and V of the text alone: one method, twice, on fewer and on more layers; and
how much passes through words."""

from __future__ import annotations

from experiments.evidence import BASE_SERIES, Check, Evidence, Experiment, Finding, Series
from experiments.settings import DESCRIBED, LORA, PERFUSION, dial

ALL = dial(LORA)
TEXT = dial(LORA.changed("lora, K and V of the text", "method.targets=[attn2.to_k,attn2.to_v]"))
OWN = dial(PERFUSION)


def judge(evidence: Evidence) -> Finding:
    """LoRA on all of the attention over LoRA on what Perfusion edits; and Perfusion over the latter."""
    y, beyond = evidence.y, evidence.lead(ALL, TEXT)
    own, told = evidence.lead(OWN, TEXT), evidence.lead(OWN, [DESCRIBED])
    lines = evidence.line(ALL), evidence.line(TEXT)
    most = evidence.number(lambda a, b: float(a[:, 1].max() - b[:, 1].max()), *lines)
    checks = (
        Check(f"{y} of LoRA on all attention above all settings of LoRA on K and V of the text", beyond),
        Check(f"highest {y} of the former above the highest of the latter", most, decides=False),
        Check(f"{y} of Perfusion's front above all settings of LoRA on K and V of the text", own, decides=False),
        Check(f"{y} of Perfusion's front above the base model that is told all looks", told, decides=False),
    )
    return Finding(checks, f"{y} {beyond.mean:+.3f} with all of the attention")


EXPERIMENT = Experiment(
    id="edited_layers",
    place=11,
    claim="On {title}, methods that change nothing but K and V of the text reach less {y} than those that change more.",
    source="a question about this project's results",
    test="LoRA with one preset, on all projections of all attentions and on K and V of the cross-attentions alone. How "
    "much more {y} has the former's front at the {x} of the latter (less {slack}), at the setting "
    "for which this lead is least? The claim holds if the 95 % interval lies above 0.",
    series=(
        Series("lora, all attention", ALL),
        Series("lora, K and V of the text", TEXT),
        Series("perfusion", OWN),
        Series(DESCRIBED.label, (DESCRIBED,)),
        BASE_SERIES,
    ),
    judge=judge,
    caveats="The rate was chosen with all layers.",
    of_paper=False,
)
