"""β of the gate while training."""

from __future__ import annotations

from experiments.evidence import AT_SAME_Y, BASE_SERIES, Experiment, Series, compared
from experiments.settings import FEW_BETAS, PERFUSION, by_beta

LOWER = 0.25
BETAS = (0.25, 0.4, 0.55, *FEW_BETAS)  # of both: each front has its middle near the β that it was trained at
HIGH = by_beta(PERFUSION, BETAS)
LOW = by_beta(PERFUSION.changed(f"perfusion, trained at β {LOWER:g}", f"method.beta={LOWER}"), BETAS)


EXPERIMENT = Experiment(
    id="train_bias",
    place=5,
    claim="A higher β in training gives a better front.",
    source="the bias of the gate in training",
    test="How much more {x} the front of concepts trained at β {beta} has than that of concepts trained at "
    f"{LOWER:g}, both drawn at six β, {AT_SAME_Y}",
    series=(Series(f"trained at β {LOWER:g}", LOW), Series("trained at β {beta}", HIGH), BASE_SERIES),
    judge=compared(HIGH, LOW, f"training at β {{beta}} over {LOWER:g}"),
    pictures=2,
    caveats="The other settings were chosen together with β {beta}.",
    notes="Why this is not decided, with 40 toys: two explanations were tried. Where the test looks: concepts "
    "trained at β 0.25 have a closed gate already at the three β that are compared, where prompts are "
    "followed in any case; what differs is how much of the toy there is, which the area shows. Their own part "
    "of the front: pictures of them at β 0.25, 0.4 and 0.55 were drawn as well (identity and prompt accuracy "
    "0.920 and 0.920, 0.936 and 0.974, 0.935 and 0.992). Against that whole front the number of the claim is "
    "0.006 ± 0.005 and the area 0.029 ± 0.015: by this the claim would hold.",
)
