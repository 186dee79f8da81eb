"""Stable Diffusion 1.x and 2.x: one CLIP text encoder (OpenAI's, 768 wide; or OpenCLIP's, 1024 wide)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

from diffusers import (
    StableDiffusionControlNetImg2ImgPipeline,
    StableDiffusionControlNetInpaintPipeline,
    StableDiffusionControlNetPipeline,
    StableDiffusionImg2ImgPipeline,
    StableDiffusionInpaintPipeline,
    StableDiffusionPipeline,
)
from torch import Tensor

from perfusion.backbones.latent_diffusion import LatentDiffusionBackbone
from perfusion.config import BackboneConfig


class StableDiffusionBackbone(LatentDiffusionBackbone):
    """A `StableDiffusionPipeline`, frozen."""

    Pipeline: ClassVar[Any] = StableDiffusionPipeline
    kin: ClassVar[tuple[Any, ...]] = (
        StableDiffusionImg2ImgPipeline,
        StableDiffusionInpaintPipeline,
        StableDiffusionControlNetPipeline,
        StableDiffusionControlNetImg2ImgPipeline,
        StableDiffusionControlNetInpaintPipeline,
    )
    family: ClassVar[str] = "stable_diffusion"
    towers: ClassVar[Mapping[str, str]] = {"text_encoder": "tokenizer"}
    parts: ClassVar[Mapping[str, Any]] = {
        "safety_checker": None,
        "feature_extractor": None,
        "requires_safety_checker": False,
    }
    pipe: StableDiffusionPipeline

    @classmethod
    def defaults(cls) -> BackboneConfig:
        return BackboneConfig(name="stable_diffusion")

    def _read(self, ids: Sequence[Tensor], masks: Sequence[Tensor]) -> tuple[Tensor, dict[str, Any]]:
        """As `StableDiffusionPipeline.encode_prompt`: the text encoder's last states."""
        encoder = self.pipe.text_encoder
        uses_mask = getattr(encoder.config, "use_attention_mask", False)
        mask = masks[0].to(self.device) if uses_mask else None
        context = encoder(ids[0].to(self.device), attention_mask=mask)[0]
        return context.to(encoder.dtype), {}


BACKBONE = StableDiffusionBackbone
