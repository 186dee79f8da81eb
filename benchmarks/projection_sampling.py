"""`projection_sampling`: the projections of `projection` over the steps of one sampling.

Subject: with the edit attached, `STEPS` calls one after the other with the same encodings of a new prompt, so the first
computes and the others find what it computed. Baseline: the plain linear layers, which compute at each call, as in a
stock pipeline. Without gradients; a batch of a prompt and the empty prompt of guidance.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from benchmarks.projection import LAYOUTS, Sides, sides
from benchmarks.timing import Pair

BATCH = 2
STEPS = 20


def pairs(device: torch.device) -> Iterator[Pair]:
    """One pair for each layout; both sides return the last step's list of outputs (B, N, h)."""
    for layout in LAYOUTS:
        yield _pair(layout.name, sides(layout, BATCH, device))


def _pair(name: str, both: Sides) -> Pair:
    @torch.no_grad()
    def edited() -> list[Tensor]:
        both.gate.forget()  # a new prompt
        return [both.edited(both.context) for _ in range(STEPS)][-1]

    @torch.no_grad()
    def plain() -> list[Tensor]:
        return [both.plain(both.context) for _ in range(STEPS)][-1]

    return Pair("projection_sampling", name, edited, plain)
