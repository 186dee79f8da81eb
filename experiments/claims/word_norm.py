"""A word that learns its direction alone, of the norm that its superclass has."""

from __future__ import annotations

from experiments.evidence import AT_SAME_Y, BASE_SERIES, Experiment, Series, each_compared
from experiments.settings import PERFUSION, TEXTUAL_INVERSION, dial

KEPT = "method.direction_only=true"
OURS, OURS_KEPT = dial(PERFUSION), dial(PERFUSION.changed("perfusion, norm kept", KEPT))
THEIRS, THEIRS_KEPT = dial(TEXTUAL_INVERSION), dial(TEXTUAL_INVERSION.changed("textual_inversion, norm kept", KEPT))


EXPERIMENT = Experiment(
    id="word_norm",
    place=15,
    claim="A word that keeps its superclass's norm and learns its direction alone has a better front.",
    source="Directional Textual Inversion (arXiv 2512.13672), which also has a prior on the direction",
    test="How much more {x} the front with `method.direction_only=true` has than that with the norm free, " + AT_SAME_Y,
    series=(
        Series("Perfusion, norm kept", OURS_KEPT),
        Series("Perfusion, norm free", OURS),
        Series("Textual Inversion, norm kept", THEIRS_KEPT),
        Series("Textual Inversion, norm free", THEIRS),
        BASE_SERIES,
    ),
    judge=each_compared(("Perfusion", OURS_KEPT, OURS), ("Textual Inversion", THEIRS_KEPT, THEIRS)),
    caveats="Rates and steps were chosen with the norm free.",
    of_paper=False,
)
