"""The likeness that methods reach while they still follow the text."""

from __future__ import annotations

import numpy as np

from eval.looks import title
from experiments.evidence import BASE_SERIES, Check, Evidence, Experiment, Finding, Series
from experiments.settings import BASE_MODEL, METHODS, dial

OWN, *OTHERS = (Series(training.label, dial(training)) for training in METHODS)


def judge(evidence: Evidence) -> Finding:
    """Perfusion's best setting against that of each other method."""
    base, own = evidence.line([BASE_MODEL]), evidence.front(OWN.settings)

    def ahead(own: np.ndarray, others: np.ndarray, base: np.ndarray) -> float:
        least = base[0, 0] - evidence.world.slight
        return highest(own, least) - highest(others, least)

    checks = []
    for series in OTHERS:
        name, others = title(series.label), evidence.front(series.settings)
        checks.append(Check(f"{evidence.y} above {name}'s", evidence.number(ahead, own, others, base)))
    nearest = min(checks, key=lambda check: check.value.mean)
    return Finding(checks, f"{nearest.what}: {nearest.value.mean:+.3f}, the least of {len(checks)}")


def highest(points: np.ndarray, least: float) -> float:
    """The highest of the points (k, 2), the base model's among them, that lie at `least` or to the right of it."""
    return float(max(y for x, y in points if x >= least))


EXPERIMENT = Experiment(
    id="likeness",
    place=17,
    claim="Of all methods that follow the text nearly as well as the base model does, Perfusion has the most {y}.",
    source="this project's goal",
    test="Of the settings whose {x} is at most {slight} below the base model's: how much more {y} has the best of "
    "Perfusion, from one training, than the best of each other method, LoRA included? The claim holds if all intervals "
    "lie above 0.",
    series=(OWN, *OTHERS, BASE_SERIES),
    judge=judge,
    caveats="Settings are compared as they were drawn, without the lines between them.",
    of_paper=False,
)
