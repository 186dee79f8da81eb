"""`train_step`: a training step of the method perfusion on Toyland against the least that any such step has to do.

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
from typing import Any

import torch
from torch import Tensor
from torch.utils.hooks import RemovableHandle

from benchmarks.pipelines import WORD, concept, pipeline
from benchmarks.timing import Pair
from perfusion.backbones import Backbone, around, default_config
from perfusion.data.prompts import fill, templates
from perfusion.methods.base import Batch, Method


def pairs(device: torch.device) -> Iterator[Pair]:
    """One pair: the subject returns the loss, the baseline the gradient at the token embeddings (B, N, d)."""
    torch.manual_seed(0)
    plain = around(pipeline("toyland", device), default_config("toyland"))
    with concept("toyland", pipeline("toyland", device), training=True) as (backbone, method):
        content = batch(backbone, method.options.batch_size, WORD.placeholder)
        yield Pair("train_step", "toyland", whole_step(backbone, method, content), lower_bound(plain, content))


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
