"""What a training is validated by: prompts, drawn with the concept and scored."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from PIL.Image import Image
from torch import Tensor

from perfusion.backbones.base import Backbone
from perfusion.drawing import sample
from perfusion.scoring.clip import ClipScorer
from perfusion.scoring.metrics import clip_scores


@dataclass(frozen=True)
class Validation:
    """n prompts, each with a seed of its own, which is the same at every step.

    Attributes:
        prompts: with the placeholder.
        texts: (n, d), the scorer's embeddings of the prompts with the superclass in the placeholder's place.
        references: (m, d), its embeddings of the training pictures.
        scorer: what embeds the drawn pictures.
        steps, guidance: of drawing.
        batch_size: prompts in one call of the denoiser.
        seed: of the first prompt; the others follow on.
    """

    prompts: Sequence[str]
    texts: Tensor
    references: Tensor
    scorer: ClipScorer
    steps: int
    guidance: float
    batch_size: int
    seed: int

    def draw(self, backbone: Backbone, numbers: Sequence[int]) -> list[Image]:
        """Pictures of some of the prompts, in the backbone's present state."""
        return sample(
            backbone.pipe,
            [self.prompts[k] for k in numbers],
            [self.seed + k for k in numbers],
            self.steps,
            self.guidance,
            self.batch_size,
            size=backbone.config.resolution,
            exact=False,  # the batches are the same at every step
        )

    def scores(self, images: Sequence[Image]) -> dict[str, float]:
        """`clip_i`, `clip_t` and their `harmonic` mean, of pictures of the first prompts."""
        return clip_scores(self.scorer.image_embeddings(images), self.references, self.texts[: len(images)])
