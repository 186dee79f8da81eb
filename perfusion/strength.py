"""The β at which a concept looks like itself and still does what prompts say: pictures at each β of a grid, scored."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from perfusion.config import ConfigError
from perfusion.data.prompts import fill, validation_prompts

# Torch and its friends take seconds to import: the command's `--help` and a mistyped key do without them.
if TYPE_CHECKING:
    from perfusion.backbones.base import Backbone
    from perfusion.concept import Attached
    from perfusion.scoring.clip import ClipScorer

GRID = (0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8)
STEPS = 25  # fewer than for a good picture are enough to choose by


@dataclass(frozen=True)
class Strength:
    """The scores at one β."""

    beta: float
    clip_i: float
    clip_t: float
    harmonic: float


def measure(
    attached: Attached,
    references: Any,
    grid: Sequence[float] = GRID,
    scorer: str | None = None,
    pretrained: str | None = None,
    steps: int = STEPS,
    seed: int = 0,
) -> list[Strength]:
    """Score the concept at every β of `grid`, in its order; its own β is put back afterwards.

    The noise of a prompt is the same at every β, so that scores differ by the strength alone.

    Args:
        attached: a concept with a gate, in its pipeline.
        references: see `reference_pictures`.
        scorer, pretrained: see `ClipScorer`; None: Toyland's own, on Toyland.

    Raises:
        ConfigError: an empty grid, a method without a gate, no references.
        ScorerError, ConceptImageError: no scorer for this backbone; the scorer or the references cannot be read.
    """
    import torch

    from perfusion.drawing import stream
    from perfusion.scoring.metrics import clip_scores

    if not grid:
        raise ConfigError("grid: found no β, expected at least one, as in grid=[0.3,0.5,0.7]")
    config, concept = attached.backbone.config, attached.concept
    own = attached.beta
    clip = scorer_for(attached.backbone, scorer, pretrained)
    wanted = clip.image_embeddings(reference_pictures(attached, references))
    templates = validation_prompts(config.prompts)
    texts = clip.text_embeddings([fill(template, concept.superclass) for template in templates])
    prompts = [fill(template, concept.placeholder) for template in templates]
    betas = torch.tensor(grid, dtype=torch.float32).repeat_interleave(len(prompts))

    def set_strength(batch: slice) -> None:
        attached.beta = betas[batch]

    try:
        images = list(
            stream(
                attached.backbone.pipe,
                prompts * len(grid),
                [*range(seed, seed + len(prompts))] * len(grid),
                steps,
                config.guidance,
                progress=True,
                size=config.resolution,
                exact=False,
                prepare=set_strength,
            )
        )
    finally:
        attached.beta = own
    embedded = clip.image_embeddings(images).split(len(prompts))
    return [
        Strength(float(beta), **clip_scores(part, wanted, texts)) for beta, part in zip(grid, embedded, strict=True)
    ]


def best(found: Sequence[Strength]) -> Strength:
    """The one with the highest harmonic mean; of equal ones the first."""
    return max(found, key=lambda strength: strength.harmonic)


def choose(attached: Attached, references: Any, scorer: str | None, pretrained: str | None) -> float:
    """The β that `beta=auto` takes, printed with the scores of the whole grid; raises as `measure` does."""
    found = measure(attached, references, scorer=scorer, pretrained=pretrained)
    print(table(found))
    return best(found).beta


def table(found: Sequence[Strength]) -> str:
    """The scores as aligned text, the best line marked."""
    lines = ["    β   CLIP-I   CLIP-T   harmonic mean"]
    for strength in found:
        mark = "   <- best" if strength is best(found) else ""
        lines.append(
            f"{strength.beta:5.2f}  {strength.clip_i:7.4f}  {strength.clip_t:7.4f}  {strength.harmonic:14.4f}{mark}"
        )
    return "\n".join(lines)


def reference_pictures(attached: Attached, references: Any) -> list[Any]:
    """Pictures of the concept: `references` is a folder, a glob, files, or None for what it was trained on.

    Raises:
        ConfigError: None, and no run folder's config lies beside the concept's file.
        ConceptImageError: the pictures cannot be read.
    """
    from perfusion.data.images import find_images, load_examples
    from perfusion.training.module import examples_of
    from perfusion.training.run_folder import RunFolder, read_config

    resolution = attached.backbone.config.resolution
    if references is not None:
        return load_examples(find_images(references, key="references"), resolution).pictures()
    run = RunFolder(Path(attached.concept.source).parent).config
    if not run.is_file():
        raise ConfigError(f"references: not given, and {run} is not there to name them; give references=<pictures>")
    return examples_of(read_config(run).concept, resolution).pictures()


def scorer_for(backbone: Backbone, scorer: str | None, pretrained: str | None) -> ClipScorer:
    """What scores pictures of a backbone, see `ClipScorer`; None: Toyland's own, on Toyland. Raises ScorerError."""
    from perfusion.scoring.clip import named_scorer

    foreign = None if backbone.family == "toyland" else f"this is {backbone.family}"
    return named_scorer(scorer, pretrained, backbone.device, foreign)
