"""The backbone seam: what every method may ask of a frozen text-to-image model, and nothing else.

A backbone wraps a stock diffusers pipeline. It gives the projections that can be edited (`edit_sites`), the text
encodings that the cross-attention sees (`encode`), their second moment (`second_moment`), a new word (`add_token`),
and the denoising that training needs (`latents`, `add_noise`, `predict`, `target`).

Some denoisers project what the text encoder gives before any K and V reads it. Everything that an edit is made of (i*,
r, C) lives in the space behind that, which `inputs_of` leads to.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from diffusers import DiffusionPipeline
from torch import Tensor, nn

from perfusion.config import BackboneConfig
from perfusion.covariance.configured import described
from perfusion.covariance.matrix import Matrix
from perfusion.editing import TokenError as TokenError  # for those who catch it: a part of this seam
from perfusion.editing.places import EditSite
from perfusion.editing.words import AddedWord


class BackboneError(ValueError):
    """A backbone that cannot be loaded or does not fit what is asked of it."""


@dataclass(frozen=True)
class Encoding:
    """Prompts as the denoiser sees them.

    Attributes:
        context: (B, N, d'), all positions, padding included: what the denoiser is given.
        concept: (B, N) bool, the last token of every occurrence of the word asked for.
        extra: further keywords of the denoiser, such as `added_cond_kwargs`.
        projected: (B, N, d), without gradients: what the denoiser makes of the context before K and V read it; None
            where they read the context itself.
    """

    context: Tensor
    concept: Tensor
    extra: Mapping[str, Any] = field(default_factory=dict)
    projected: Tensor | None = None

    @property
    def inputs(self) -> Tensor:
        """(B, N, d): what K and V read."""
        return self.context if self.projected is None else self.projected

    def mean_at_word(self) -> Tensor:
        """(d,), float32, without gradients: the mean over all tokens where the word ends."""
        inputs, marked = self.inputs.detach().float(), self.concept[..., None].to(self.inputs.device)
        return (inputs * marked).sum((0, 1)) / marked.sum()


class Backbone(ABC):
    """A frozen text-to-image model behind a stock diffusers pipeline."""

    family: ClassVar[str]
    flows: ClassVar[bool] = False  # whether it is trained by flow matching, whose steps have no signal-to-noise weights
    config: BackboneConfig
    pipe: DiffusionPipeline
    covariance_origin: Mapping[str, object] | None = None  # of the C that was asked for last, see `Matrix.origin`

    @classmethod
    @abstractmethod
    def defaults(cls) -> BackboneConfig:
        """The config of a pipeline that comes without one."""

    @classmethod
    @abstractmethod
    def fits(cls, pipe: DiffusionPipeline) -> bool:
        """Whether this class can wrap `pipe`."""

    @classmethod
    @abstractmethod
    def check_words(cls, config: BackboneConfig, placeholder: str, superclass: str) -> None:
        """`check_token` before any model is loaded: only tokenizers are read.

        Raises:
            BackboneError: no tokenizer where `config` says.
            TokenError: see `check_token`.
        """

    @classmethod
    @abstractmethod
    def check_covariance(cls, config: BackboneConfig) -> None:
        """Hold that `config.covariance` can be used, before any model is loaded.

        Raises:
            ConfigError: no such captions or selection of positions.
            CovarianceError: a matrix that cannot be read, or not be used with this model.
            BackboneError: no model where `config` says.
        """

    @classmethod
    def check_controlnet(cls, config: BackboneConfig, net: Mapping[str, Any]) -> None:
        """Hold that a ControlNet of the diffusers config `net` is made for such a model, before either is loaded.

        Raises:
            BackboneError: it is not, or this kind of model takes none; or there is no model where `config` says.
        """
        raise BackboneError(f"controlnet: {config.name} takes none")

    @classmethod
    @abstractmethod
    def load(cls, config: BackboneConfig) -> Backbone:
        """Load the pipeline named by `config`, frozen and in eval mode, on the device and in the dtype it names."""

    @classmethod
    @abstractmethod
    def around(cls, pipe: DiffusionPipeline, config: BackboneConfig) -> Backbone:
        """Wrap a pipeline that the user loaded; nothing in it is changed."""

    @property
    @abstractmethod
    def denoiser(self) -> nn.Module:
        """The network that denoises; its `forward` takes `encoder_hidden_states` (B, N, d)."""

    @property
    def device(self) -> torch.device:
        """Where the denoiser's parameters are."""
        return next(self.denoiser.parameters()).device

    @property
    def dtype(self) -> torch.dtype:
        """Type of the denoiser's parameters."""
        return next(self.denoiser.parameters()).dtype

    @abstractmethod
    def edit_sites(self) -> list[EditSite]:
        """Every cross-attention K and V projection, in the denoiser's module order, K before V."""

    def inputs_of(self, context: Tensor) -> Tensor:
        """What K and V read (B, N, d) of the context (B, N, d') that the denoiser is given: it itself, unless the
        denoiser projects it first."""
        return context

    @abstractmethod
    def text_encoders(self) -> dict[str, nn.Module]:
        """Name -> text encoder, in the order in which their outputs stand side by side in the denoiser's context."""

    @abstractmethod
    def encode(self, prompts: Sequence[str], word: str | None, *, padded: bool = True) -> Encoding:
        """Encode prompts; gradients reach the embeddings of added tokens.

        Without `padded` the context ends with the longest prompt. Causal text encoders give the same up to there, but
        for rounding, in a fraction of the time.

        `word` is the placeholder or a superclass of one or several tokens; the last token of each occurrence is marked,
        because a causal text encoder has read the whole word only there. None marks nothing.

        Raises:
            TokenError: a prompt does not hold `word`, or it is cut off at the encoder's length.
        """

    def mean_encoding(self, prompts: Sequence[str], word: str) -> Tensor:
        """(d,), float32: the mean encoding of `word` over the prompts, all of which have it; raises as `encode`."""
        with torch.no_grad():
            return self.encode(prompts, word, padded=False).mean_at_word()

    @abstractmethod
    def tokens(self, prompt: str) -> dict[int, str]:
        """Position in the context -> the first text encoder's token there, of a prompt without what pads it."""

    @abstractmethod
    def check_token(self, placeholder: str, superclass: str) -> None:
        """Raise TokenError if the placeholder is already a word of the vocabulary or either is empty."""

    @abstractmethod
    def check_prompts(self, prompts: Sequence[str]) -> None:
        """Raise TokenError if an added word of a prompt would be cut off at the encoder's length.

        The tokenizers' own calls raise the same while words are added; here it is known before anything is drawn.
        """

    @abstractmethod
    def add_token(self, placeholder: str, superclass: str, vectors: int | None = 1) -> AddedWord:
        """Add `placeholder` to the vocabulary, its embedding the mean of the superclass's token embeddings at first.

        With `vectors=None` it gets a vector for each token of `superclass` instead, that token's own: at first a prompt
        with the placeholder has the encoding of the same prompt with the superclass, to the bit.
        """

    @abstractmethod
    def moment(self, progress: bool = True) -> Matrix:
        """`C`: the configured matrix, or that of the configured captions, from the cache when it holds it.

        Adapters in a text encoder (LoRA) are part of what is measured; it is not cached then.

        Raises:
            CovarianceError: the matrix cannot be read, or nothing can be measured.
            ConfigError: the captions cannot be read.
        """

    @abstractmethod
    def second_moment(self, progress: bool = True) -> Tensor:
        """`C + ridge`, as its lower Cholesky factor (d, d) in float64 on the CPU.

        Raises:
            CovarianceError: `C` cannot be had, see `moment`, or cannot be factorised with the configured ridge.
            ConfigError: the captions cannot be read.
        """

    @property
    def covariance(self) -> str:
        """What a concept file says of the `C` that was used: `captions:count:ridge`, see `described`."""
        return described(self.config.covariance, self.covariance_origin)

    @abstractmethod
    def latents(self, pixels: Tensor) -> Tensor:
        """(B, 3, R, R) in [-1, 1] to scaled latents (B, c, h, w): the posterior's mode, the same for the same image."""

    @abstractmethod
    def latent_shape(self) -> tuple[int, int, int]:
        """(c, h, w) of one image at the configured resolution."""

    @property
    @abstractmethod
    def train_timesteps(self) -> int:
        """Number of diffusion steps of the training schedule."""

    @abstractmethod
    def add_noise(self, latents: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
        """Latents (B, c, h, w) at diffusion steps `timesteps` (B,)."""

    @abstractmethod
    def target(self, latents: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
        """What the denoiser is trained to say: noise, or velocity, or flow."""

    @abstractmethod
    def snr(self, timesteps: Tensor) -> Tensor:
        """Signal-to-noise ratio ᾱ / (1 - ᾱ) at diffusion steps `timesteps` (B,): (B,). Raises NotImplementedError for a
        model that `flows`."""

    @property
    @abstractmethod
    def predicts_velocity(self) -> bool:
        """Whether the denoiser is trained to say the velocity; else it says the noise."""

    @abstractmethod
    def predict(self, noisy: Tensor, timesteps: Tensor, encoding: Encoding) -> Tensor:
        """The denoiser's output (B, c, h, w).

        With `config.gradient_checkpointing` it costs less memory until the backward pass is done, and the denoiser is
        as it was when this returns.
        """

    @classmethod
    def kind(cls) -> dict[str, str]:
        """What concept files call the weights that they need: the parts of `fingerprint` that are no digests."""
        return {"family": cls.family}

    @abstractmethod
    def fingerprint(self, dtype: torch.dtype | None = None) -> dict[str, str]:
        """`kind`, and sha256 prefixes of the text encoders' and the projections' base weights, whatever is attached to
        them: whether a concept fits this backbone.

        Loads in float32 and float16 have the same ones, those in bfloat16 others. With a `dtype`, they are those of the
        weights rounded to it: what the same weights would have, had they been loaded in it.
        """
