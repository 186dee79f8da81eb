"""Sana: a Gemma 2 text encoder, a linear diffusion transformer that reads it by cross-attention, and flow matching.

The transformer projects and norms the encodings (`caption_projection`, `caption_norm`) before any block reads them, so
i*, r and C live behind that; K and V have a bias, which is added to what the edit makes of W e; and a norm of K, where
a model has one, comes after the edit. Padding is masked, as in PixArt.

**The instruction.** The pipeline puts a long instruction before every prompt, which Gemma reads as well, and the
transformer does not: of the encodings it takes the first and the last 299. So does `encode`, and words are looked for
in these alone: the instruction has cats and dogs of its own.

**Flow.** Noise level σ mixes (1 − σ) latents + σ noise, the transformer predicts noise − latents, and is told 1000 σ.
Training draws its steps evenly and shifts σ as the model's own schedule does.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import torch
from diffusers import SanaPipeline
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from perfusion.backbones.latent_diffusion import LatentDiffusionBackbone
from perfusion.config import BackboneConfig
from perfusion.editing.reading import Reading

_LENGTH = 300  # tokens that the transformer reads of a prompt
_PARAMETERS = inspect.signature(SanaPipeline.__call__).parameters
INSTRUCTION = "\n".join(_PARAMETERS["complex_human_instruction"].default)


class SanaBackbone(LatentDiffusionBackbone):
    """A `SanaPipeline`, frozen."""

    Pipeline: ClassVar[Any] = SanaPipeline
    part: ClassVar[str] = "transformer"
    family: ClassVar[str] = "sana"
    flows: ClassVar[bool] = True
    towers: ClassVar[Mapping[str, str]] = {"text_encoder": "tokenizer"}
    reading: ClassVar[Reading] = Reading(masked=True, padding_side="right")
    masked: ClassVar[bool] = True
    trims: ClassVar[bool] = False  # positions are counted from the end
    small_letters: ClassVar[bool] = True
    predictions: ClassVar[tuple[str, ...]] = ("flow_prediction",)
    parts: ClassVar[Mapping[str, Any]] = {}

    @classmethod
    def defaults(cls) -> BackboneConfig:
        return BackboneConfig(name="sana", resolution=1024, steps=20, guidance=4.5)

    @classmethod
    def set_scheduler(cls, pipe: Any) -> None:
        """The pipeline's own: DDIM knows no flow."""

    def schedule(self) -> Any:
        return self.pipe.scheduler

    @property
    def prediction(self) -> str:
        config = self.pipe.scheduler.config
        return "flow_prediction" if "FlowMatch" in type(self.pipe.scheduler).__name__ else config.prediction_type

    def text(self, prompt: str, tokenizer: PreTrainedTokenizerBase) -> str:
        return INSTRUCTION + prompt.lower().strip()

    def length(self, tokenizer: PreTrainedTokenizerBase) -> int:
        return _instruction_tokens(tokenizer) + _LENGTH - 2

    def positions(self, row: Tensor) -> Tensor:
        return torch.cat([row[:, :1], row[:, 1 - _LENGTH :]], 1)

    def inputs_of(self, context: Tensor) -> Tensor:
        transformer = self.pipe.transformer
        return transformer.caption_norm(transformer.caption_projection(context))

    def _read(self, ids: Sequence[Tensor], masks: Sequence[Tensor]) -> tuple[Tensor, dict[str, Any]]:
        """As `SanaPipeline.encode_prompt`: the text encoder's last states, and their mask."""
        encoder, mask = self.pipe.text_encoder, masks[0].to(self.device)
        context = encoder(ids[0].to(self.device), attention_mask=mask)[0].to(encoder.dtype)
        return self.positions(context), {"encoder_attention_mask": self.positions(mask)}

    @property
    def train_timesteps(self) -> int:
        return self.pipe.scheduler.config.num_train_timesteps

    def _sigmas(self, timesteps: Tensor) -> Tensor:
        """σ (B,) of diffusion steps, from 1 / T to 1, shifted."""
        config = self.pipe.scheduler.config
        shift = config.get("flow_shift", config.get("shift", 1.0))
        even = (timesteps.float() + 1) / self.train_timesteps
        return shift * even / (1 + (shift - 1) * even)

    def times(self, timesteps: Tensor) -> Tensor:
        return self._sigmas(timesteps) * self.train_timesteps * self.pipe.transformer.config.timestep_scale

    def add_noise(self, latents: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
        sigmas = self._sigmas(timesteps).to(latents).view(-1, 1, 1, 1)
        return (1 - sigmas) * latents + sigmas * noise

    def target(self, latents: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
        return noise - latents

    def snr(self, timesteps: Tensor) -> Tensor:
        raise NotImplementedError("flow matching has no such weights")

    @property
    def predicts_velocity(self) -> bool:
        return False


@functools.lru_cache(maxsize=16)
def _instruction_tokens(tokenizer: PreTrainedTokenizerBase) -> int:
    return len(tokenizer.encode(INSTRUCTION))


BACKBONE = SanaBackbone
