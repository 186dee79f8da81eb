"""Stable Diffusion XL: two CLIP text encoders side by side (768 + 1280 wide), and more that the UNet is told.

**The pooled text.** Besides the context that K and V read, SDXL's UNet takes one vector for the whole prompt: the
second text encoder's pooled output, added to the embedding of the diffusion step. It passes by the keys and values, so
neither the lock nor the gate would hold what a concept's word puts into it: the loss would find that way around the
lock, the picture as a whole would carry the concept, and β could no longer weaken it. So **the pooled text is that of
the prompt with the superclass in the concept's place**, and a concept acts through K and V alone. It is also what the
encoder can do well: its published config finds the end of the text as the largest id, which an added word's would be.

The second text encoder does so, as long as there are added words in it (`perfusion.editing.words`), in training and in
stock calls of the pipeline. Only `pooled_prompt_embeds` that were made elsewhere stay as they are.

**Sizes.** The UNet is also told a picture's original size, the corner it was cropped at and its size. Training says
`(R, R), (0, 0), (R, R)` with R = `backbone.resolution`, as diffusers' DreamBooth script for SDXL did by default, and as
the stock call does at that resolution: the concept's pictures are square and whole when they come here.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import torch
from diffusers import (
    StableDiffusionXLControlNetImg2ImgPipeline,
    StableDiffusionXLControlNetInpaintPipeline,
    StableDiffusionXLControlNetPipeline,
    StableDiffusionXLImg2ImgPipeline,
    StableDiffusionXLInpaintPipeline,
    StableDiffusionXLPipeline,
)
from torch import Tensor

from perfusion.backbones.latent_diffusion import LatentDiffusionBackbone
from perfusion.config import BackboneConfig
from perfusion.editing.reading import Reading


class StableDiffusionXLBackbone(LatentDiffusionBackbone):
    """A `StableDiffusionXLPipeline` with both of its text encoders, frozen."""

    Pipeline: ClassVar[Any] = StableDiffusionXLPipeline
    kin: ClassVar[tuple[Any, ...]] = (
        StableDiffusionXLImg2ImgPipeline,
        StableDiffusionXLInpaintPipeline,
        StableDiffusionXLControlNetPipeline,
        StableDiffusionXLControlNetImg2ImgPipeline,
        StableDiffusionXLControlNetInpaintPipeline,
    )
    family: ClassVar[str] = "sdxl"
    towers: ClassVar[Mapping[str, str]] = {"text_encoder": "tokenizer", "text_encoder_2": "tokenizer_2"}
    reading: ClassVar[Reading] = Reading(pooling="text_encoder_2")
    # A watermark, if the package for it happens to be there, would make pictures differ between machines.
    parts: ClassVar[Mapping[str, Any]] = {"image_encoder": None, "feature_extractor": None, "add_watermarker": False}
    pipe: StableDiffusionXLPipeline

    @classmethod
    def defaults(cls) -> BackboneConfig:
        return BackboneConfig(name="sdxl", resolution=1024)

    def _read(self, ids: Sequence[Tensor], masks: Sequence[Tensor]) -> tuple[Tensor, dict[str, Any]]:
        """As `StableDiffusionXLPipeline.encode_prompt`: the last states but one of both encoders, side by side."""
        outputs = [
            encoder(tokens.to(self.device), output_hidden_states=True)
            for encoder, tokens in zip(self.text_encoders().values(), ids, strict=True)
        ]
        context = torch.cat([output.hidden_states[-2] for output in outputs], -1)
        told = conditions(outputs[-1][0], self.config.resolution, self.dtype, self.device)
        return context.to(self.pipe.text_encoder_2.dtype), told


def conditions(pooled: Tensor, side: int, dtype: torch.dtype, device: torch.device) -> dict[str, Any]:
    """What the UNet is told besides the context: the pooled text (B, d_pooled), and sizes (B, 6), see above."""
    sizes = torch.tensor([side, side, 0, 0, side, side], dtype=dtype, device=device)
    told = {"text_embeds": pooled.detach().to(dtype), "time_ids": sizes.expand(len(pooled), -1)}
    return {"added_cond_kwargs": told}


BACKBONE = StableDiffusionXLBackbone
