"""Prior preservation as a loss: closed form on a denoiser that can be computed by hand."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from perfusion.backbones.base import Encoding
from perfusion.methods.base import Batch, Word, build
from tests.backbone_kinds import loaded

WORD = Word("<cat*>", "cat")


class Linear:
    """Says `scale` times the noisy latent plus the prompt's length; noise is added by plain addition."""

    scale = 0.5

    def __init__(self) -> None:
        self.asked: list[tuple[list[str], str | None]] = []

    def encode(self, prompts: Sequence[str], word: str | None) -> Encoding:
        self.asked.append(([*prompts], word))
        lengths = torch.tensor([float(len(prompt)) for prompt in prompts])
        return Encoding(lengths[:, None, None], torch.zeros(len(prompts), 1, dtype=torch.bool), {"a": {"b": lengths}})

    def add_noise(self, latents: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
        return latents + noise * timesteps[:, None, None, None]

    def target(self, latents: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
        return noise

    def predict(self, noisy: Tensor, timesteps: Tensor, encoding: Encoding) -> Tensor:
        assert torch.equal(encoding.context.flatten(), encoding.extra["a"]["b"])
        return self.scale * noisy + encoding.context[..., None]


def batch(size: int, seed: int, **changes: Any) -> Batch:
    draw = torch.Generator().manual_seed(seed)
    values: dict[str, Any] = {
        "latents": torch.randn(size, 2, 3, 3, generator=draw),
        "masks": None,
        "prompts": [f"my {WORD.placeholder}"] * size,
        "noise": torch.randn(size, 2, 3, 3, generator=draw),
        "timesteps": torch.arange(1, size + 1),
    }
    return Batch(**{**values, **changes})


def error(of: Batch, prompts: Sequence[str]) -> Tensor:
    """(B, c, h, w), sample by sample."""
    said = [
        0.5 * (x + e * float(t)) + len(prompt)
        for x, e, t, prompt in zip(of.latents, of.noise, of.timesteps, prompts, strict=True)
    ]
    return (torch.stack(said) - of.noise) ** 2


@pytest.mark.parametrize("name", ["dreambooth", "custom_diffusion"])
@pytest.mark.parametrize("weight", [1.0, 0.25])
def test_the_loss_is_the_denoising_error_plus_weight_times_that_of_the_prior(name: str, weight: float) -> None:
    backbone: Any = Linear()
    prior = batch(3, 1, prompts=["a photo of a cat", "a cat", "asleep"])
    masks = torch.rand(2, 1, 3, 3, generator=torch.Generator().manual_seed(2))
    both = batch(2, 0, prior=prior, masks=masks)
    method = build({"name": name, "prior_weight": weight, "prompt": "a {}"}, WORD)
    terms = method.loss(backbone, both)
    assert list(terms) == ["denoising", "prior"]
    own = error(both, ["a <cat*>"] * 2)
    torch.testing.assert_close(terms["denoising"], own.mean(), msg="masks do not count unless asked for")
    torch.testing.assert_close(terms["prior"], weight * error(prior, prior.prompts).mean())
    assert backbone.asked == [(["a <cat*>"] * 2, "<cat*>"), (prior.prompts, None)]

    masked = build({"name": name, "prior_weight": weight, "prompt": None, "masked_loss": True}, WORD)
    own = error(both, both.prompts)
    weighted = [(e * m).sum() / (2 * m.sum()) for e, m in zip(own, masks, strict=True)]
    terms = masked.loss(backbone, both)
    torch.testing.assert_close(terms["denoising"], torch.stack(weighted).mean())
    torch.testing.assert_close(terms["prior"], weight * error(prior, prior.prompts).mean())
    alone = masked.loss(backbone, dataclasses.replace(both, prior=None))
    assert list(alone) == ["denoising"]
    torch.testing.assert_close(alone["denoising"], terms["denoising"])


@pytest.mark.parametrize("name", ["dreambooth", "custom_diffusion", "lora"])
def test_preservation_is_the_distance_from_the_frozen_models_answers(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By a model that says 0.5 times the noisy latent while it is frozen and 0.75 times while it is not, and nothing of
    the target that noise would be."""
    backbone: Any = Linear()
    method: Any = build({"name": name, "preservation_weight": 0.25, "prompt": None}, WORD)

    @contextmanager
    def aside() -> Iterator[None]:
        backbone.scale = 0.5
        yield
        backbone.scale = 0.75

    monkeypatch.setattr(method, "aside", aside)
    backbone.scale = 0.75
    prior = batch(3, 1, prompts=["a", "b", "c"])
    for with_prior in (True, False):
        given = batch(2, 0, prior=prior if with_prior else None)
        terms = method.loss(backbone, given)
        assert list(terms) == ["denoising", *["prior"] * with_prior, "preservation"]
        noisy = given.latents + given.noise * given.timesteps[:, None, None, None]
        torch.testing.assert_close(terms["preservation"], 0.25 * (0.25 * noisy).square().mean())
        own = (0.75 * noisy + len("my <cat*>") - given.noise).square().mean()
        torch.testing.assert_close(terms["denoising"], own)
    assert (["my cat"] * 2, None) in backbone.asked


@pytest.mark.parametrize(
    "options",
    [
        {"name": "dreambooth", "train_text_encoder": True, "denoiser_rate": 0.01, "text_encoder_rate": 0.01},
        {"name": "custom_diffusion", "projection_rate": 0.01},
        {"name": "lora", "adapter_rate": 0.1},
    ],
    ids=lambda options: str(options["name"]),
)
def test_what_a_method_changed_stands_aside(options: dict[str, Any], tmp_path: Path) -> None:
    """Before a step the model has not moved, so that its distance is 0; afterwards it has, and the frozen model answers
    from beneath to the bit."""
    backbone = loaded("sd15", tmp_path, resolution=64)
    draw = torch.Generator().manual_seed(0)
    shape = (2, *backbone.latent_shape())
    noise, times = torch.randn(shape, generator=draw), torch.tensor([400, 800])
    given = Batch(torch.randn(shape, generator=draw), None, [f"a photo of a {WORD.placeholder}"] * 2, noise, times)

    def answer() -> Tensor:
        with torch.no_grad():
            return backbone.predict(noise, times, backbone.encode(["a photo of a cat"] * 2, None))

    frozen = answer()
    method: Any = build({**options, "preservation_weight": 1.0}, WORD)
    method.attach(backbone)
    optimizer = torch.optim.AdamW(method.parameter_groups())
    terms = method.loss(backbone, given)
    assert terms["preservation"] < 1e-9
    terms["denoising"].backward()
    optimizer.step()
    moved = method.loss(backbone, given)["preservation"]
    assert moved > 1e-6
    moved.backward()
    assert any(p.grad is not None and p.grad.any() for group in method.parameter_groups() for p in group["params"])
    changed = answer()
    with method.aside():
        assert torch.equal(answer(), frozen)
    assert torch.equal(answer(), changed) and not torch.equal(changed, frozen)
    method.detach()
    assert torch.equal(answer(), frozen)


def test_a_step_in_half_precision_learns_beside_preservation(tmp_path: Path) -> None:
    """Autocast remembers what it has cast, also for the frozen model's answer, which has no gradients."""
    backbone = loaded("sd15", tmp_path, resolution=64)
    draw = torch.Generator().manual_seed(0)
    latents, noise = (torch.randn(1, *backbone.latent_shape(), generator=draw) for _ in range(2))
    given = Batch(latents, None, [f"a photo of a {WORD.placeholder}"], noise, torch.tensor([500]))

    def learns(weight: float) -> list[bool]:
        method: Any = build({"name": "lora", "preservation_weight": weight}, WORD)
        method.attach(backbone)
        with torch.autocast("cpu", torch.bfloat16):
            terms = method.loss(backbone, given)
        terms["denoising"].backward()
        found = [b.grad is not None and bool(b.grad.any()) for b in method.up]
        method.detach()
        return found

    assert any(learns(0.0)) and learns(1.0) == learns(0.0)


def test_a_step_begins_with_its_own_prompts_also_where_it_comes_in_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    backbone: Any = Linear()
    prior = batch(1, 1, prompts=["a cat"])
    method = build({"name": "dreambooth", "prompt": "a {}"}, WORD)
    seen: list[list[float]] = []
    monkeypatch.setattr(method, "on_step", lambda encoding: seen.append(encoding.context.flatten().tolist()))
    length = float(len("a <cat*>"))
    method.loss(backbone, batch(2, 0, prior=prior))
    method.loss(backbone, batch(2, 0, prior=prior, step_prompts=["my <cat*>"] * 4))
    method.loss(backbone, batch(2, 0, prior=prior, step_prompts=[]))
    assert seen == [[length] * 2, [length] * 4]
