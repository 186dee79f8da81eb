"""`python -m benchmarks.layouts`: what a training step of one picture keeps on models that are too large to try, by
reckoning on the meta device.

Counted are the weights of the denoiser and the autoencoder in bfloat16, and the bytes of the distinct storages that
autograd saves in one call of the denoiser at the model's own resolution, without and with gradient checkpointing. The
text encoder is a column of its own: with `backbone.device=cpu` for it, or after its prompts are encoded, it need not
lie on the GPU. Not counted is what lies there for a moment, as on the performance page.
"""

from __future__ import annotations

import dataclasses
from functools import partial
from typing import Any

import torch

from benchmarks.training import kept_bytes
from perfusion.backbones import around
from perfusion.backbones.base import Encoding
from perfusion.backbones.layouts import meta_pipeline

LAYOUTS = {"sd15": 77, "sdxl": 77, "kolors": 256, "pixart": 300, "sana": 300}  # positions of the context


def reckoned(layout: str) -> tuple[int, list[int]]:
    """The model's resolution, and bytes for one picture in bfloat16: denoiser and autoencoder, text encoders, what a
    step keeps without and with checkpointing."""
    pipe: Any = meta_pipeline(layout).to(torch.bfloat16)
    backbone: Any = around(pipe)
    parts = ((backbone.denoiser, pipe.vae), backbone.text_encoders().values())
    found = [sum(weight.nbytes for part in some for weight in part.parameters()) for some in parts]
    for checkpointing in (False, True):
        config = dataclasses.replace(backbone.config, gradient_checkpointing=checkpointing, dtype="bfloat16")
        trained: Any = around(pipe, config)
        trained.denoiser.requires_grad_(False).train(checkpointing)
        found.append(kept_bytes(partial(step, trained, LAYOUTS[layout]), [*trained.denoiser.parameters()]))
    return backbone.config.resolution, found


def step(backbone: Any, positions: int) -> torch.Tensor:
    """The sum of one prediction, which gradients reach the encodings through."""
    empty = {"dtype": backbone.dtype, "device": "meta"}
    config = backbone.denoiser.config
    width = config.get("caption_channels") or config.get("encoder_hid_dim") or config.cross_attention_dim
    context = torch.empty(1, positions, width, requires_grad=True, **empty)
    extra: dict[str, Any] = {"encoder_attention_mask": torch.empty(1, positions, **empty)} if backbone.masked else {}
    if pooled := config.get("projection_class_embeddings_input_dim"):
        times = 6 * config.addition_time_embed_dim
        told = {"text_embeds": torch.empty(1, pooled - times, **empty), "time_ids": torch.empty(1, 6, **empty)}
        extra["added_cond_kwargs"] = told
    noisy, steps = torch.empty(1, *backbone.latent_shape(), **empty), torch.ones(1, device="meta", dtype=torch.int64)
    return backbone.predict(noisy, steps, Encoding(context, torch.ones(1, positions), extra)).sum()


def main() -> None:
    """Print the table."""
    print("| model | resolution | denoiser and autoencoder | text encoders | kept by a step | with checkpointing |")
    print("|---|---:|---:|---:|---:|---:|")
    for layout in LAYOUTS:
        side, sizes = reckoned(layout)
        print(f"| {layout} | {side} | {' | '.join(f'{size / 1e9:.1f} GB' for size in sizes)} |", flush=True)


if __name__ == "__main__":
    main()
