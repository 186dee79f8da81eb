"""What holds a baseline at its superclass: pictures of it, the frozen model's own answers, or nothing."""

from __future__ import annotations

from experiments.evidence import AT_SAME_Y, BASE_SERIES, Check, Evidence, Experiment, Finding, Series, signed
from experiments.settings import DREAMBOOTH, LORA, dial

DREAMBOOTH_BY_ANSWERS = DREAMBOOTH.changed(
    "dreambooth, preserved answers", "method.prior_images=0", "method.preservation_weight=1"
)
LORA_BY_ANSWERS = LORA.changed("lora, preserved answers", "method.preservation_weight=1")
PAIRS = (
    ("DreamBooth, preserved answers over pictures", dial(DREAMBOOTH_BY_ANSWERS), dial(DREAMBOOTH)),
    ("LoRA, preserved answers over nothing", dial(LORA_BY_ANSWERS), dial(LORA)),
)


def judge(evidence: Evidence) -> Finding:
    """Each method with the answers against itself as its preset has it."""
    checks = [
        Check(f"{evidence.x} gained at the same {evidence.y}, {name}", evidence.same_likeness(answers, usual))
        for name, answers, usual in PAIRS
    ]
    both = " and ".join(signed(check.value.mean) for check in checks)
    return Finding(checks, f"{evidence.x} {both} at the same {evidence.y}, of DreamBooth and of LoRA")


EXPERIMENT = Experiment(
    id="preservation",
    place=14,
    claim="The frozen model's own answers preserve the superclass better than pictures of it (DreamBooth), or than "
    "nothing (LoRA).",
    source="a question about the baselines: programs for training LoRAs preserve outputs, the papers pictures",
    test="How much more {x} the front with `method.preservation_weight=1` has than that of the preset, " + AT_SAME_Y,
    series=(
        Series("DreamBooth, answers", PAIRS[0][1]),
        Series("DreamBooth, pictures", PAIRS[0][2]),
        Series("LoRA, answers", PAIRS[1][1]),
        Series("LoRA, nothing", PAIRS[1][2]),
        BASE_SERIES,
    ),
    judge=judge,
    caveats="Rates and steps were chosen with the presets; the weight 1 was not tuned.",
    of_paper=False,
)
