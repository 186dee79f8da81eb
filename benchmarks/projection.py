"""`projection`, `projection_sampling`: all K and V projections of a UNet.

Subject: with the edit attached through the public API: the hook that computes similarity and gate once for the batch,
then every projection (keys locked, values trained). Baseline: the same linear layers, plain. Both on the same float32
encodings, with frozen random weights; the forward alone. Every projection of the layout is there, so what belongs to a
prompt is shared out over as many layers as in use.

- `projection`: one batch of prompts, as a training step calls them; the encodings require gradients as those of a
  trained word do.
- `projection_sampling`: the steps of one sampling. The subject has the same encodings of a new prompt at every step, so
  the first computes and the others find what it computed; the baseline computes at each call, as in a stock pipeline.
  Without gradients; a batch of a prompt and the empty prompt of guidance.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.timing import Sides
from perfusion.backbones.latent_diffusion import edit_sites_of
from perfusion.backbones.layouts import meta_pipeline
from perfusion.editing.gate import PromptGate
from perfusion.editing.layer import attach_edit
from perfusion.toyland import models

BATCH = 16  # prompts: the paper's batch
STEPS = 20
POSITIONS = {"toyland": models.TEXT_POSITIONS, "sd15": 77}  # of a prompt


def sides(layout: str, device: torch.device, sampling: bool = False) -> Sides:
    """Both return the list of outputs (B, N, h), when `sampling` those of the last step; they share their weights."""
    torch.manual_seed(0)
    with torch.device("meta"):
        unet: Any = models.unet() if layout == "toyland" else meta_pipeline(layout).unet  # type: ignore[attr-defined]
    sites = edit_sites_of(unet.requires_grad_(False))
    layers = [site.projection for site in sites]
    assert all(type(layer) is nn.Linear for layer in layers)
    for layer in layers:
        layer.to_empty(device=device).reset_parameters()  # type: ignore[operator]
    d = int(layers[0].in_features)  # type: ignore[arg-type]
    i, direction, s = torch.randn(3, 1, d, device=device)
    gate = PromptGate(i, direction, s, beta=0.75, tau=0.1)
    outputs = {
        site.name: nn.Parameter(torch.randn(1, layer.out_features, device=device)) if site.kind == "v" else None  # type: ignore
        for site, layer in zip(sites, layers, strict=True)
    }
    attach_edit(sites, unet, gate, outputs)
    # A call runs every projection, on the same encodings, and nothing else of the UNet.
    unet.forward = lambda encoder_hidden_states: [site.projection(encoder_hidden_states) for site in sites]
    context = torch.randn(2 if sampling else BATCH, POSITIONS[layout], d, device=device, requires_grad=not sampling)

    def edited() -> list[Tensor]:
        return unet(encoder_hidden_states=context)

    def plain() -> list[Tensor]:
        return [layer(context) for layer in layers]

    @torch.no_grad()
    def edited_steps() -> list[Tensor]:
        gate.forget()  # a new prompt
        return [edited() for _ in range(STEPS)][-1]

    @torch.no_grad()
    def plain_steps() -> list[Tensor]:
        return [plain() for _ in range(STEPS)][-1]

    return Sides(edited_steps, plain_steps) if sampling else Sides(edited, plain)
