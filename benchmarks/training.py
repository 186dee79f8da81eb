"""A training step of the method perfusion against the least that any such step has to do: its time and its memory, on
Toyland and on Stable Diffusion 1.5 with random weights at 512 x 512 pixels.

Subject, the whole step on a given batch (B = 16, the default): tokenizing and encoding the prompts with the concept's
word in them; the moving average of i* and C⁻¹i*; noising the latents; the UNet with the edit attached; the masked loss;
the backward pass to the word's embedding and to the o*_V; AdamW; clearing the gradients.

Baseline, the lower bound: forward of the frozen text encoder, from token ids, and of the frozen, unedited UNet, on
latents that are noisy already; then gradients with respect to activations, from a given gradient of the UNet's output
down to the token embeddings, where a trained word lies. No tokenizer, noise, loss, edit or optimizer; no gradient of
any weight.

In neither: drawing the batch, the autoencoder (its latents are computed once for a whole training), Lightning's loop.
A model `..._bf16` is under autocast to bfloat16, as `trainer.precision=bf16-mixed` does. With `checkpointing` the
subject has `backbone.gradient_checkpointing=true`, the baseline diffusers' own.

What needs CUDA was written and tried on a CPU with a small model; it has not yet run on a GPU.
"""

from __future__ import annotations

import gc
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks

from benchmarks import timing
from benchmarks.pipelines import BACKBONES, WORD, attached, pipeline
from benchmarks.timing import Sides
from perfusion.backbones import Backbone, around, default_config
from perfusion.data.prompts import fill, templates
from perfusion.methods.base import Batch

BATCH = 16  # pictures: the default
STEPS = 400  # the paper's
PEAK_STEPS = 3  # the first one makes what the optimizer keeps
HALF = "_bf16"


@dataclass(frozen=True)
class Step:
    """One side's training step, always on the same batch."""

    forward: Callable[[], Tensor]
    backward: Callable[[Tensor], Tensor]  # of what the forward gives
    weights: Sequence[Tensor]
    device: torch.device
    half: bool

    def __call__(self) -> Tensor:
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.half):
            return self.backward(self.forward())


def subject(model: str, device: torch.device, checkpointing: bool = False, size: int = BATCH) -> Step:
    """The whole step, on a pipeline of its own; it returns the loss."""
    known = model.removesuffix(HALF)
    pipe: Any = pipeline(known, device)
    backbone, method = attached(known, pipe, training=True, checkpointing=checkpointing)
    content = batch(backbone, size)
    optimizer = torch.optim.AdamW(method.parameter_groups())

    def backward(loss: Tensor) -> Tensor:
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        return loss.detach()

    weights = [*pipe.unet.parameters(), *pipe.text_encoder.parameters(), *method.parameters()]
    forward = lambda: torch.stack(list(method.loss(backbone, content).values())).sum()  # noqa: E731
    return Step(forward, backward, weights, device, model.endswith(HALF))


def baseline(model: str, device: torch.device, checkpointing: bool = False, size: int = BATCH) -> Step:
    """The lower bound, likewise, with the superclass in the place of the word; it returns the gradient at the token
    embeddings (B, N, d)."""
    known = model.removesuffix(HALF)
    pipe: Any = pipeline(known, device)
    if checkpointing:
        pipe.unet.enable_gradient_checkpointing()
    plain = around(pipe, default_config(BACKBONES[known]))
    content = batch(plain, size)
    prompts = [prompt.replace(WORD.placeholder, WORD.superclass) for prompt in content.prompts]
    ids = pipe.tokenizer(prompts, padding="max_length", return_tensors="pt").input_ids.to(device)
    noisy = plain.add_noise(content.latents, content.noise, content.timesteps)
    cotangent = torch.randn_like(content.latents) / content.latents.numel()
    embedded: list[Tensor] = []
    pipe.text_encoder.get_input_embeddings().register_forward_hook(
        lambda module, args, output: embedded.append(output.requires_grad_())
    )

    def forward() -> Tensor:
        embedded.clear()
        encoded = pipe.text_encoder(ids)[0]
        return pipe.unet(noisy, content.timesteps, encoder_hidden_states=encoded).sample

    weights = [*pipe.unet.parameters(), *pipe.text_encoder.parameters()]
    return Step(
        forward,
        lambda predicted: torch.autograd.grad(predicted, embedded, cotangent)[0],
        weights,
        device,
        model.endswith(HALF),
    )


def batch(backbone: Backbone, size: int) -> Batch:
    """Random latents, masks, noise and timesteps, with the backbone's training prompts around the word."""
    torch.manual_seed(0)
    known = templates(backbone.config.prompts)
    prompts = [fill(known[k % len(known)], WORD.placeholder) for k in range(size)]
    latents = torch.randn(size, *backbone.latent_shape(), device=backbone.device)
    masks = torch.rand_like(latents[:, :1])
    timesteps = torch.randint(backbone.train_timesteps, (size,), device=backbone.device)
    return Batch(latents, masks / masks.amax((1, 2, 3), keepdim=True), prompts, torch.randn_like(latents), timesteps)


# --- what is measured of both ---------------------------------------------------------------------------------------


def steps(model: str, device: torch.device) -> Sides:
    """A step, to be timed."""
    return Sides(subject(model, device), baseline(model, device))


def amounts(measure: Callable[[Step], float], model: str, device: torch.device, checkpointing: bool = False) -> Sides:
    """What `measure` says of a step of either side, whose pipeline is gone when it is the other one's turn."""

    def measured(make: Callable[..., Step]) -> float:
        gc.collect()  # pipelines hold one another
        # What Stable Diffusion keeps is counted for one picture: it is B times as much for B of them.
        return measure(make(model, device, checkpointing, 1 if measure is kept and model == "sd15" else BATCH))

    return Sides(lambda: measured(subject), lambda: measured(baseline))


def kept(step: Step) -> float:
    """Bytes that a step keeps for its backward pass: what a larger batch is paid for with.

    They are the same on every device, so they are counted and not timed.
    """
    return kept_bytes(step.forward, step.weights)


def peak(step: Step) -> float:
    """The most bytes that were allocated on a CUDA device during a few steps, with all that lay there before."""
    timing.finish(step.device)
    torch.cuda.reset_peak_memory_stats(step.device)
    for _ in range(PEAK_STEPS):
        step()
    timing.finish(step.device)
    return torch.cuda.max_memory_allocated(step.device)


def seconds(step: Step) -> float:
    """Of STEPS steps, after the first few."""
    timing.seconds_each(step, timing.WARM_UPS, step.device, timing.CLOCKS["wall"])
    return STEPS * timing.seconds_each(step, STEPS, step.device, timing.CLOCKS["wall"])


def kept_bytes(run: Callable[[], Tensor], weights: Sequence[Tensor]) -> int:
    """Bytes of the distinct storages that autograd saves in `run`, those of `weights` not counted."""
    known = {weight.untyped_storage()._cdata for weight in weights}
    found: dict[int, int] = {}

    def note(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage._cdata not in known:
            found[storage._cdata] = storage.nbytes()
        return tensor  # kept by the graph, so no other storage can come to lie in its place

    with saved_tensors_hooks(note, lambda tensor: tensor):
        result = run()
    assert result.requires_grad
    return sum(found.values())
