"""Two concepts that were trained apart, in one picture."""

from __future__ import annotations

from experiments.claims.pareto import best_of
from experiments.curves import area, height_at, margin
from experiments.evidence import Evidence
from experiments.experiment import Experiment, Finding, Series
from experiments.settings import BASE_MODEL, CUSTOM_DIFFUSION, FEW_BETAS, PERFUSION, by_beta, by_steps
from experiments.verdict import Check

BOTH = by_beta(PERFUSION, FEW_BETAS)
MERGED = by_steps(CUSTOM_DIFFUSION)


def judge(evidence: Evidence) -> Finding:
    """Perfusion's front over Custom Diffusion's best setting."""
    best = best_of(evidence, MERGED)
    front, point = evidence.line(BOTH), evidence.line([best])
    beyond = evidence.number(lambda a, b: margin(a, b[0]), front, point)
    larger = evidence.number(lambda a, b: area(a) - area(b), front, evidence.line(MERGED))
    checks = [Check(f"margin of Perfusion's front over Custom Diffusion ({best.name})", beyond)]
    higher = evidence.number(lambda a, b: height_at(a, b[0, 0]) - b[0, 1], front, point)
    if higher.mean == higher.mean:
        checks.append(Check("identity above Custom Diffusion's at its prompt accuracy", higher, decides=False))
    checks.append(Check("area below the front, above Custom Diffusion's", larger, decides=False))
    return Finding(tuple(checks), f"margin {beyond.mean:+.3f} over Custom Diffusion")


EXPERIMENT = Experiment(
    id="multi_concept",
    place=8,
    claim="Concepts that were trained apart combine in one picture, better than with Custom Diffusion.",
    source="combining concepts that were learned apart",
    test="Pictures of two toys. By how much could Custom Diffusion's setting with the best harmonic mean of identity "
    "(mean of both toys) and prompt accuracy be better in both and still lie within Perfusion's front? The claim holds "
    "if the 95 % interval of this margin lies above 0.",
    series=(Series("perfusion", BOTH), Series("custom_diffusion", MERGED), Series("base", (BASE_MODEL,))),
    judge=judge,
    pairs=True,
    caveats="The paper compares with Custom Diffusion trained on both concepts together. Here its concepts are trained "
    "apart, as Perfusion's are, and merged by its closed form. There are half as many pairs as toys.",
)
