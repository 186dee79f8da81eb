"""What holds a baseline at its superclass: pictures of it, the frozen model's own answers, or nothing."""

from __future__ import annotations

from experiments.evidence import AT_SAME_Y, BASE_SERIES, Experiment, Series, each_compared
from experiments.settings import DREAMBOOTH, LORA, dial

ANSWERS = "method.preservation_weight=1"
PICTURES = dial(DREAMBOOTH)
DREAMBOOTH_ANSWERS = dial(DREAMBOOTH.changed("dreambooth, preserved answers", "method.prior_images=0", ANSWERS))
NOTHING, LORA_ANSWERS = dial(LORA), dial(LORA.changed("lora, preserved answers", ANSWERS))


EXPERIMENT = Experiment(
    id="preservation",
    place=14,
    claim="The frozen model's own answers preserve the superclass better than pictures of it (DreamBooth), or than "
    "nothing (LoRA).",
    source="a question about the baselines: programs that train LoRAs preserve outputs, the papers pictures",
    test="How much more {x} the front with `method.preservation_weight=1` has than that of the preset, " + AT_SAME_Y,
    series=(
        Series("DreamBooth, answers", DREAMBOOTH_ANSWERS),
        Series("DreamBooth, pictures", PICTURES),
        Series("LoRA, answers", LORA_ANSWERS),
        Series("LoRA, nothing", NOTHING),
        BASE_SERIES,
    ),
    judge=each_compared(("DreamBooth", DREAMBOOTH_ANSWERS, PICTURES), ("LoRA", LORA_ANSWERS, NOTHING)),
    caveats="Rates and steps were chosen with the presets; the weight 1 was not tuned.",
    of_paper=False,
)
