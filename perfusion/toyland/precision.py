"""Arithmetic in bfloat16, where that is faster: the attribute reader finds the same in pictures that were drawn so."""

from __future__ import annotations

import torch


def bfloat16_pays(device: torch.device) -> bool:
    """Whether products in bfloat16 are faster than in float32 there: on CUDA, and on CPUs with such arithmetic."""
    cpu = torch.cpu.get_capabilities()
    return device.type == "cuda" or bool(cpu.get("avx512_bf16") or cpu.get("amx_bf16"))


def autocast(device: torch.device) -> torch.autocast:
    """bfloat16 for what may be less exact, where that is faster; else nothing."""
    return torch.autocast(device.type, torch.bfloat16, enabled=bfloat16_pays(device))
