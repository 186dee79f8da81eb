"""`train_step`: a training step of the method perfusion against the least that any such step has to do, on Toyland and,
where there is CUDA, on Stable Diffusion 1.5 with random weights at 512 x 512 pixels, in float32.

Subject, the whole step on a given batch (B = 16, the default): tokenizing and encoding the prompts with the concept's
word in them; the moving average of i* and C⁻¹i*; noising the latents; the UNet with the edit attached; the masked loss;
the backward pass to the word's embedding and to the o*_V; AdamW; clearing the gradients.

Baseline, the lower bound: forward of the frozen text encoder, from token ids, and of the frozen, unedited UNet, on
latents that are noisy already; then gradients with respect to activations, from a given gradient of the UNet's output
down to the token embeddings, where a trained word lies. No tokenizer, noise, loss, edit or optimizer; no gradient of
any weight.

In neither: drawing the batch, the autoencoder (its latents are computed once for a whole training), Lightning's loop.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.utils.hooks import RemovableHandle

from benchmarks.pipelines import BACKBONES, WORD, concept, pipeline
from benchmarks.timing import Pair
from perfusion.backbones import Backbone, around, default_config
from perfusion.data.prompts import fill, templates
from perfusion.methods.base import Batch, Method

BATCH = 16  # pictures: the default
ROUNDS = {"toyland": None, "sd15": 9}


def pairs(device: torch.device) -> Iterator[Pair]:
    """A pair for each model: the subject returns the loss, the baseline the gradient at the token embeddings (B, N, d).

    Stable Diffusion is left out, and that said, on a device without CUDA, where one step takes minutes.
    """
    for model in ROUNDS:
        if model == "sd15" and device.type != "cuda":
            print(f"train_step of {model} needs CUDA: left out")
            continue
        with subject(model, device) as step:
            yield Pair("train_step", model, step, baseline(model, device), ROUNDS[model])


@contextmanager
def subject(
    model: str, device: torch.device, checkpointing: bool = False, size: int = BATCH
) -> Iterator[Callable[[], Tensor]]:
    """The whole step, on a pipeline of its own and a batch of `size`."""
    with concept(model, pipeline(model, device), training=True, checkpointing=checkpointing) as (backbone, method):
        torch.manual_seed(0)
        yield whole_step(backbone, method, batch(backbone, size, WORD.placeholder))


def baseline(model: str, device: torch.device, checkpointing: bool = False, size: int = BATCH) -> Callable[[], Tensor]:
    """The lower bound, likewise; `checkpointing` is diffusers' own."""
    pipe: Any = pipeline(model, device)
    if checkpointing:
        pipe.unet.enable_gradient_checkpointing()
    plain = around(pipe, default_config(BACKBONES[model]))
    torch.manual_seed(0)
    return lower_bound(plain, batch(plain, size, WORD.placeholder))


def batch(backbone: Backbone, size: int, word: str) -> Batch:
    """Random latents, masks, noise and timesteps, with the backbone's training prompts around `word`."""
    known = templates(backbone.config.prompts)
    prompts = [fill(known[k % len(known)], word) for k in range(size)]
    latents = torch.randn(size, *backbone.latent_shape(), device=backbone.device)
    masks = torch.rand_like(latents[:, :1])
    timesteps = torch.randint(backbone.train_timesteps, (size,), device=backbone.device)
    return Batch(latents, masks / masks.amax((1, 2, 3), keepdim=True), prompts, torch.randn_like(latents), timesteps)


def whole_step(backbone: Backbone, method: Method, content: Batch) -> Callable[[], Tensor]:
    """The steps of a training, each on the same batch."""
    optimizer = torch.optim.AdamW(method.parameter_groups())

    def step() -> Tensor:
        loss = torch.stack(list(method.loss(backbone, content).values())).sum()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        return loss.detach()

    return step


def lower_bound(backbone: Backbone, content: Batch) -> Callable[[], Tensor]:
    """Frozen forward and activation gradients, with the superclass in the place of the word."""
    cotangent = torch.randn_like(content.latents) / content.latents.numel()
    run, _, found = forward(backbone, content)

    def step() -> Tensor:
        predicted = run()
        return torch.autograd.grad(predicted, found, cotangent)[0]

    return step


def forward(backbone: Backbone, content: Batch) -> tuple[Callable[[], Tensor], RemovableHandle, list[Tensor]]:
    """The bound's forward, the hook that it works with, and the token embeddings of its last run, (B, N, d)."""
    pipe: Any = backbone.pipe
    prompts = [prompt.replace(WORD.placeholder, WORD.superclass) for prompt in content.prompts]
    ids = pipe.tokenizer(prompts, padding="max_length", return_tensors="pt").input_ids.to(backbone.device)
    noisy = backbone.add_noise(content.latents, content.noise, content.timesteps)
    found: list[Tensor] = []
    hook = pipe.text_encoder.get_input_embeddings().register_forward_hook(
        lambda module, args, output: found.append(output.requires_grad_())
    )

    def run() -> Tensor:
        found.clear()
        encoded = pipe.text_encoder(ids)[0]
        return backbone.denoiser(noisy, content.timesteps, encoder_hidden_states=encoded).sample

    return run, hook, found
