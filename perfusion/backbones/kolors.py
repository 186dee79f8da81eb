"""Kolors: SDXL's UNet, which reads a ChatGLM text encoder through a projection of its own.

The UNet projects the encodings (`encoder_hid_proj`) before any K and V reads them, so i*, r and C live behind that.
Padding comes first, ChatGLM leaves it out, and the UNet looks at all positions. As with SDXL, the UNet also takes one
vector for the whole prompt, here the encoding of its last token: that of the prompt with the superclass in the
concept's place, see `perfusion.backbones.sdxl`.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

from torch import Tensor
from transformers import PreTrainedTokenizerBase

from perfusion.backbones.latent_diffusion import LatentDiffusionBackbone
from perfusion.backbones.sdxl import conditions
from perfusion.config import BackboneConfig
from perfusion.editing.reading import Reading

with warnings.catch_warnings():
    warnings.simplefilter("ignore", FutureWarning)  # its ChatGLM is scripted, which torch no longer likes
    from diffusers import KolorsImg2ImgPipeline, KolorsPipeline

_LENGTH = 256  # tokens that Kolors reads of a prompt


def _states(output: Any) -> list[Tensor]:
    """ChatGLM's tensors are (N, B, d)."""
    return [output.hidden_states[-2].transpose(0, 1)]


def _with_last(output: Any, other: Any) -> Any:
    output["hidden_states"] = (*output.hidden_states[:-1], other.hidden_states[-1])
    return output


class KolorsBackbone(LatentDiffusionBackbone):
    """A `KolorsPipeline`, frozen."""

    Pipeline: ClassVar[Any] = KolorsPipeline
    kin: ClassVar[tuple[Any, ...]] = (KolorsImg2ImgPipeline,)
    family: ClassVar[str] = "kolors"
    towers: ClassVar[Mapping[str, str]] = {"text_encoder": "tokenizer"}
    reading: ClassVar[Reading] = Reading(masked=True, states=_states, pooling="text_encoder", pooled=_with_last)
    trims: ClassVar[bool] = False
    parts: ClassVar[Mapping[str, Any]] = {"image_encoder": None, "feature_extractor": None}

    @classmethod
    def defaults(cls) -> BackboneConfig:
        return BackboneConfig(name="kolors", resolution=1024, guidance=5.0)

    def text(self, prompt: str, tokenizer: PreTrainedTokenizerBase) -> str:
        return prompt

    def length(self, tokenizer: PreTrainedTokenizerBase) -> int:
        return _LENGTH

    def inputs_of(self, context: Tensor) -> Tensor:
        return self.pipe.unet.encoder_hid_proj(context)

    def _read(self, ids: Sequence[Tensor], masks: Sequence[Tensor]) -> tuple[Tensor, dict[str, Any]]:
        """As `KolorsPipeline.encode_prompt`: the last states but one, and of the last states the last."""
        mask = masks[0].to(self.device)
        output = self.pipe.text_encoder(
            input_ids=ids[0].to(self.device),
            attention_mask=mask,
            position_ids=(mask.cumsum(1) - 1).clamp_min(0),
            output_hidden_states=True,
        )
        context = output.hidden_states[-2].permute(1, 0, 2).clone()
        return context, conditions(output.hidden_states[-1][-1], self.config.resolution, self.dtype, self.device)


BACKBONE = KolorsBackbone
