"""CLIP-I and CLIP-T, over embeddings of length 1 such as those of `ClipScorer`.

The states are plain sums, so processes that saw different images agree on the score of all of them.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torchmetrics import Metric

from perfusion.scoring import harmonic_mean

TEXT_SCALE = 2.5  # of CLIPScore (Hessel et al., arXiv 2104.08718), which CustomConcept101 reports


class ClipImageScore(Metric):
    """CLIP-I: the mean cosine over all pairs of a generated and a reference image.

    The mean of <g, r> over all pairs is the inner product of the two means, so only sums are kept. Without any image of
    a kind the score is NaN.

    Args:
        dimension: d, of the embeddings.
    """

    full_state_update = False
    higher_is_better = True
    is_differentiable = False
    generated_sum: Tensor
    generated_count: Tensor
    reference_sum: Tensor
    reference_count: Tensor

    def __init__(self, dimension: int, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        for kind in ("generated", "reference"):
            self.add_state(f"{kind}_sum", torch.zeros(dimension, dtype=torch.float64), dist_reduce_fx="sum")
            self.add_state(f"{kind}_count", torch.tensor(0), dist_reduce_fx="sum")

    def update(self, generated: Tensor | None = None, reference: Tensor | None = None) -> None:
        """Embeddings (n, d) of generated and (m, d) of reference images; either may be left out of a call."""
        if generated is not None:
            self.generated_sum += generated.to(self.generated_sum).sum(0)
            self.generated_count += len(generated)
        if reference is not None:
            self.reference_sum += reference.to(self.reference_sum).sum(0)
            self.reference_count += len(reference)

    def compute(self) -> Tensor:
        """Scalar float64 in [−1, 1]."""
        return (self.generated_sum @ self.reference_sum) / (self.generated_count * self.reference_count)


class ClipTextScore(Metric):
    """CLIP-T: the mean cosine of an image and its prompt, in which the superclass stands for the placeholder
    (`perfusion.data.prompts.replace_placeholder`).

    Args:
        scaled: 2.5 · max(cos, 0) instead, averaged after the maximum.
    """

    full_state_update = False
    higher_is_better = True
    is_differentiable = False
    total: Tensor
    count: Tensor

    def __init__(self, scaled: bool = False, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.scaled = scaled
        self.add_state("total", torch.tensor(0.0, dtype=torch.float64), dist_reduce_fx="sum")
        self.add_state("count", torch.tensor(0), dist_reduce_fx="sum")

    def update(self, images: Tensor, texts: Tensor) -> None:
        """Embeddings (n, d) of images and (n, d) of their prompts."""
        assert images.shape == texts.shape
        cosines = (images.to(self.total) * texts.to(self.total)).sum(-1)
        if self.scaled:
            cosines = TEXT_SCALE * cosines.clamp_min(0)
        self.total += cosines.sum()
        self.count += len(images)

    def compute(self) -> Tensor:
        """Scalar float64: in [−1, 1], or in [0, 2.5] if scaled; NaN without any image."""
        return self.total / self.count


def clip_scores(images: Tensor, references: Tensor, texts: Tensor) -> dict[str, float]:
    """`clip_i`, `clip_t` and their `harmonic` mean, of embeddings of n pictures (n, d), of m pictures of the concept
    (m, d), and of the n prompts (n, d). Nothing but these counts: other processes need not call it."""
    clip_i = ClipImageScore(images.shape[1], sync_on_compute=False)
    clip_i.update(images, references)
    clip_t = ClipTextScore(sync_on_compute=False)
    clip_t.update(images, texts)
    i, t = clip_i.compute().item(), clip_t.compute().item()
    return {"clip_i": i, "clip_t": t, "harmonic": float(harmonic_mean(i, t))}
