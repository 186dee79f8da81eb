"""`projection`: all K and V projections of a UNet on one batch of prompts, as a training step calls them.

Subject: with the edit attached through the public API: the hook that computes similarity and gate once for the batch,
then every projection (keys locked, values trained). Baseline: the same linear layers, plain. Both in grad mode on the
same float32 encodings, which require gradients as those of a trained word do, with frozen random weights; the forward
alone. Every projection of the layout is there, so what belongs to a prompt is shared out over as many layers as in use.
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


@dataclass(frozen=True)
class Layout:
    """A UNet without weights, and how many text positions it reads."""

    name: str
    denoiser: Callable[[], UNet2DConditionModel]
    positions: int


def _toyland_unet() -> UNet2DConditionModel:
    with torch.device("meta"):
        return models.unet()


def _sd15_unet() -> UNet2DConditionModel:
    pipe: Any = meta_pipeline("sd15")
    return pipe.unet


LAYOUTS = (
    Layout("toyland", _toyland_unet, models.TEXT_POSITIONS),
    Layout("sd15", _sd15_unet, layout_config("sd15", "text_encoder")["max_position_embeddings"]),
)


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


def sides(layout: Layout, batch: int, device: torch.device) -> Sides:
    """The projections of `layout`, and encodings of `batch` prompts, on `device`."""
    torch.manual_seed(0)
    unet = layout.denoiser().requires_grad_(False)
    sites = edit_sites_of(unet)
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
    context = torch.randn(batch, layout.positions, d, device=device)
    return Sides(edited, lambda e: [layer(e) for layer in layers], gate, context)


def pairs(device: torch.device, batch: int = BATCH) -> Iterator[Pair]:
    """One pair for each layout; both sides return the list of outputs (B, N, h)."""
    for layout in LAYOUTS:
        yield _pair(layout.name, sides(layout, batch, device))


def _pair(name: str, both: Sides) -> Pair:
    context = both.context.requires_grad_()
    return Pair("projection", name, lambda: both.edited(context), lambda: both.plain(context))
