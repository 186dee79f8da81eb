"""What the gate rules: the concept's outputs alone, as in the paper, or what is taken out of the encodings as well."""

from __future__ import annotations

from experiments.evidence import AT_SAME_Y, BASE_SERIES, Check, Evidence, Experiment, Finding, Series, gained, signed
from experiments.settings import BETAS, PERFUSION, dial

GATED = PERFUSION.changed("perfusion, gated removal", "method.removal=gated")
FULL_FRONT, GATED_FRONT = dial(PERFUSION), dial(GATED)
HIGH = [k for k, beta in enumerate(BETAS) if beta > 1]  # where the gate of the concept's own word closes


def judge(evidence: Evidence) -> Finding:
    """At the same likeness; and how much of the prompt is left where the gate closes."""
    checks = gained(evidence, GATED_FRONT, FULL_FRONT, "gated removal over full")
    gated, full = ([front[k] for k in HIGH] for front in (GATED_FRONT, FULL_FRONT))
    closed = evidence.x_gained(gated, full)
    checks.append(Check(f"{evidence.x} gained at β above 1", closed, decides=False))
    return Finding(checks, f"{evidence.x} {signed(checks[0].value.mean)} at the same {evidence.y}")


EXPERIMENT = Experiment(
    id="removal",
    place=12,
    claim="A gate that also rules what is taken out of the encodings gives a better front.",
    source="a question about the paper's Eq. 3, which removes r i* from every encoding whether the gate is open or not",
    test="How much more {x} the front of h = W (e − g r i*) + g o* has than that of h = W (e − r i*) + g o*, "
    + AT_SAME_Y,
    series=(Series("removal gated", GATED_FRONT), Series("removal full, as in the paper", FULL_FRONT), BASE_SERIES),
    judge=judge,
    caveats="Rates and steps were chosen with the paper's removal.",
    of_paper=False,
)
