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

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from diffusers import UNet2DConditionModel
from torch import Tensor, nn

from benchmarks.timing import Pair
from perfusion.backbones.latent_diffusion import edit_sites_of
from perfusion.backbones.layouts import layout_config, meta_pipeline
from perfusion.editing.gate import PromptGate
from perfusion.editing.layer import attach_edit
from perfusion.editing.places import EditSite
from perfusion.toyland import models

BATCH = 16  # prompts: the paper's batch
STEPS = 20
POSITIONS = {  # of a prompt, by the layouts that are measured
    "toyland": models.TEXT_POSITIONS,
    "sd15": layout_config("sd15", "text_encoder")["max_position_embeddings"],
}


def empty_unet(layout: str) -> UNet2DConditionModel:
    """The UNet of a layout, without weights."""
    if layout == "toyland":
        with torch.device("meta"):
            return models.unet()
    pipe: Any = meta_pipeline(layout)
    return pipe.unet


class Projections(nn.Module):
    """What a UNet does with its text: a call runs every projection that `sites` hold, on the same encodings."""

    def __init__(self, sites: list[EditSite]) -> None:
        super().__init__()
        self.sites = sites  # no submodules: they stay where the UNet has them

    def forward(self, encoder_hidden_states: Tensor) -> list[Tensor]:
        return [site.projection(encoder_hidden_states) for site in self.sites]


@dataclass(frozen=True)
class Sides:
    """One layout's projections with random weights, edited and plain; the two share their weights."""

    edited: Projections
    plain: Callable[[Tensor], list[Tensor]]
    gate: PromptGate
    context: Tensor  # (B, N, d)


def sides(layout: str, batch: int, device: torch.device) -> Sides:
    """The projections of `layout`, and encodings of `batch` prompts, on `device`."""
    torch.manual_seed(0)
    sites = edit_sites_of(empty_unet(layout).requires_grad_(False))
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
    edited = Projections(sites)
    attach_edit(sites, edited, gate, outputs)
    context = torch.randn(batch, POSITIONS[layout], d, device=device)
    return Sides(edited, lambda e: [layer(e) for layer in layers], gate, context)


def pairs(device: torch.device, batch: int = BATCH) -> Iterator[Pair]:
    """One pair for each layout; both sides return the list of outputs (B, N, h)."""
    return (_pair(layout, sides(layout, batch, device)) for layout in POSITIONS)


def _pair(name: str, both: Sides) -> Pair:
    context = both.context.requires_grad_()
    return Pair("projection", name, lambda: both.edited(context), lambda: both.plain(context))


def sampling_pairs(device: torch.device) -> Iterator[Pair]:
    """One pair for each layout; both sides return the last step's list of outputs (B, N, h)."""
    return (_sampling_pair(layout, sides(layout, 2, device)) for layout in POSITIONS)


def _sampling_pair(name: str, both: Sides) -> Pair:
    @torch.no_grad()
    def edited() -> list[Tensor]:
        both.gate.forget()  # a new prompt
        return [both.edited(both.context) for _ in range(STEPS)][-1]

    @torch.no_grad()
    def plain() -> list[Tensor]:
        return [both.plain(both.context) for _ in range(STEPS)][-1]

    return Pair("projection_sampling", name, edited, plain)
