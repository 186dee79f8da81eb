"""CLIP-I and CLIP-T against the same written out in float64, and their sums over several processes."""

import math
from functools import partial

import numpy as np
import pytest
import torch

from perfusion.scoring import harmonic_mean
from perfusion.scoring.metrics import ClipImageScore, ClipTextScore, clip_scores

D = 12


def unit(count: int, seed: int) -> torch.Tensor:
    return torch.nn.functional.normalize(torch.randn(count, D, generator=torch.Generator().manual_seed(seed)), dim=-1)


def test_clip_i_is_the_mean_over_all_pairs():
    generated, reference = unit(7, 0), unit(3, 1)
    metric = ClipImageScore(D)
    metric.update(generated[:5], reference[:1])
    metric.update(generated[5:])
    metric.update(reference=reference[1:])
    pairs = [float(np.dot(g, r)) for g in generated.double().numpy() for r in reference.double().numpy()]
    assert metric.compute().item() == pytest.approx(math.fsum(pairs) / len(pairs), abs=1e-14)
    metric.reset()
    metric.update(reference, reference[:1])
    expected = (reference.double() @ reference[0].double()).mean().item()
    assert metric.compute().item() == pytest.approx(expected, abs=1e-14)


@pytest.mark.parametrize("scaled", [False, True])
def test_clip_t_is_the_mean_over_images_each_with_its_prompt(scaled):
    images, texts = unit(6, 2), unit(6, 3)
    metric = ClipTextScore(scaled)
    metric.update(images[:1], texts[:1])
    metric.update(images[1:], texts[1:])
    cosines = [float(np.dot(i, t)) for i, t in zip(images.double().numpy(), texts.double().numpy(), strict=True)]
    assert min(cosines) < 0 < max(cosines), "the maximum must be seen to act on each image, not on the mean"
    expected = [2.5 * max(c, 0) for c in cosines] if scaled else cosines
    assert metric.compute().item() == pytest.approx(math.fsum(expected) / 6, abs=1e-14)


def test_scores_without_images_are_nan():
    metric = ClipImageScore(D)
    metric.update(unit(2, 0))
    assert math.isnan(metric.compute())
    text = ClipTextScore()
    text.update(unit(0, 0), unit(0, 0))
    assert math.isnan(text.compute())


def test_processes_that_saw_different_images_agree():
    """torchmetrics' own synchronization, with another process's states in the place of a network."""
    generated, reference, texts = unit(5, 0), unit(4, 1), unit(5, 2)
    here, there = slice(0, 2), slice(2, None)
    for make, others in [
        (partial(ClipImageScore, D), (reference, reference)),
        (ClipTextScore, (texts[here], texts[there])),
        (partial(ClipTextScore, scaled=True), (texts[here], texts[there])),
    ]:
        first, second = (generated[here], others[0]), (generated[there], others[1])
        other, whole = make(), make()
        other.update(*second)
        whole.update(*first)
        alone = whole.compute().item()
        whole.update(*second)
        states = iter(other.metric_state.values())
        gather = lambda state, group, states=states: [state, next(states)]  # noqa: E731
        mine = make(distributed_available_fn=lambda: True, dist_sync_fn=gather)
        mine.update(*first)
        assert mine.compute().item() == pytest.approx(whole.compute().item(), abs=1e-14)
        assert mine.compute().item() != pytest.approx(alone)


def test_harmonic_mean():
    assert harmonic_mean(0.5, 0.25) == pytest.approx(2 / (1 / 0.5 + 1 / 0.25))
    assert harmonic_mean(0.3, 0.3) == pytest.approx(0.3)
    assert harmonic_mean(0.9, 0.0) == harmonic_mean(-0.1, 0.9) == harmonic_mean(-0.2, -0.1) == 0.0
    several = harmonic_mean(np.array([0.5, -0.1, np.nan]), np.array([0.25, 0.9, 0.5]))
    assert several == pytest.approx([1 / 3, 0, np.nan], nan_ok=True)


def test_scores_of_known_embeddings():
    images = torch.tensor([[1.0, 0.0], [0.0, 1.0]])
    references, texts = torch.tensor([[0.6, 0.8]]), torch.tensor([[1.0, 0.0], [0.8, 0.6]])
    assert clip_scores(images, references, texts) == pytest.approx(
        {"clip_i": 0.7, "clip_t": 0.8, "harmonic": 2 * 0.7 * 0.8 / 1.5}
    )
