"""PixArt-alpha and PixArt-Sigma: a T5 text encoder and a diffusion transformer that reads it by cross-attention.

The transformer projects the encodings (`caption_projection`) before any block reads them, so i*, r and C live behind
that; K and V have a bias, which is added to what the edit makes of W e. What pads a prompt is masked, in the text
encoder and in the cross-attention: it has no part in C, and an edit leaves it as it is. The pipelines make small
letters of all text, so a concept's word has to be in small letters.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import torch
from diffusers import PixArtAlphaPipeline, PixArtSigmaPipeline
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from perfusion.backbones.latent_diffusion import LatentDiffusionBackbone
from perfusion.config import BackboneConfig
from perfusion.editing.reading import Reading

_ALPHA = 120  # tokens that PixArt-alpha reads of a prompt
_SIGMA = 300
_SIZED = 128  # latent side of those that are told a picture's size


class PixArtBackbone(LatentDiffusionBackbone):
    """A `PixArtSigmaPipeline` or a `PixArtAlphaPipeline`, frozen."""

    Pipeline: ClassVar[Any] = PixArtSigmaPipeline
    kin: ClassVar[tuple[Any, ...]] = (PixArtAlphaPipeline,)
    others: ClassVar[tuple[Any, ...]] = kin
    part: ClassVar[str] = "transformer"
    family: ClassVar[str] = "pixart"
    towers: ClassVar[Mapping[str, str]] = {"text_encoder": "tokenizer"}
    reading: ClassVar[Reading] = Reading(masked=True)
    masked: ClassVar[bool] = True
    small_letters: ClassVar[bool] = True
    parts: ClassVar[Mapping[str, Any]] = {}

    @classmethod
    def defaults(cls) -> BackboneConfig:
        return BackboneConfig(name="pixart", resolution=1024, steps=20, guidance=4.5)

    def text(self, prompt: str, tokenizer: PreTrainedTokenizerBase) -> str:
        return prompt.lower().strip()

    def length(self, tokenizer: PreTrainedTokenizerBase) -> int:
        return _ALPHA if isinstance(self.pipe, PixArtAlphaPipeline) else _SIGMA

    def inputs_of(self, context: Tensor) -> Tensor:
        projection = self.pipe.transformer.caption_projection
        return context if projection is None else projection(context)

    def _read(self, ids: Sequence[Tensor], masks: Sequence[Tensor]) -> tuple[Tensor, dict[str, Any]]:
        """As `PixArtSigmaPipeline.encode_prompt`: the text encoder's last states, and their mask."""
        encoder, mask = self.pipe.text_encoder, masks[0].to(self.device)
        context = encoder(ids[0].to(self.device), attention_mask=mask)[0].to(encoder.dtype)
        conditions: dict[str, Tensor | None] = {"resolution": None, "aspect_ratio": None}
        if isinstance(self.pipe, PixArtAlphaPipeline) and self.pipe.transformer.config.sample_size == _SIZED:
            ones = torch.ones(len(context), 1, dtype=self.dtype, device=self.device)
            conditions = {"resolution": self.config.resolution * ones.expand(-1, 2), "aspect_ratio": ones}
        return context, {"encoder_attention_mask": mask, "added_cond_kwargs": conditions}


BACKBONE = PixArtBackbone
