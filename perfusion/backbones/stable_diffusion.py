"""Stable Diffusion 1.x and 2.x: one CLIP text encoder, a UNet with cross-attention, noise or velocity prediction."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import islice
from pathlib import Path
from typing import Any, ClassVar, Literal

import torch
from diffusers import (
    DDIMScheduler,
    DDPMScheduler,
    DiffusionPipeline,
    StableDiffusionPipeline,
    UNet2DConditionModel,
)
from diffusers.models.attention_processor import Attention, FusedAttnProcessor2_0
from torch import Tensor, nn
from transformers import CLIPTokenizer

from perfusion.backbones import fingerprint, loading, moments
from perfusion.backbones.base import Backbone, BackboneError, EditSite, Encoding, TokenError
from perfusion.backbones.captions import Captions, caption_stream, captions_digest
from perfusion.backbones.tokens import (
    AddedWord,
    ExtendedEmbedding,
    TokenMemory,
    add_word,
    check_word,
    last_tokens,
    token_ids,
)
from perfusion.config import BackboneConfig, CovarianceConfig
from perfusion.covariance import Factorised
from perfusion.covariance.matrix import Matrix

CONTEXT = "text"  # the one text-context space: what the text encoder gives, read by every cross-attention
BUILT_IN_SAMPLE = 256  # captions of a built-in set that tell its version from others
_KINDS: tuple[Literal["k"], Literal["v"]] = ("k", "v")


def edit_sites_of(denoiser: nn.Module, context: str = CONTEXT) -> list[EditSite]:
    """Every K and V projection of a diffusers UNet that reads the text, in module order, K before V.

    Needs no weights: a UNet on the meta device will do.

    Raises:
        BackboneError: the projections are fused, so that an edit would change nothing.
    """
    sites: list[EditSite] = []
    for name, module in fingerprint.base_module(denoiser).named_modules():
        if not (isinstance(module, Attention) and module.is_cross_attention):
            continue
        if isinstance(module.processor, FusedAttnProcessor2_0):  # `fused_projections` stays true after unfusing
            raise BackboneError(
                f"{name}: its K and V projections are fused, and an edit of them would do nothing; call "
                "unfuse_qkv_projections() first"
            )
        sites += [EditSite(f"{name}.to_{kind}", kind, context, module, f"to_{kind}") for kind in _KINDS]
    return sites


class StableDiffusionBackbone(Backbone):
    """A `StableDiffusionPipeline`, frozen."""

    family: ClassVar[str] = "stable_diffusion"
    towers: ClassVar[dict[str, str]] = {"text_encoder": "tokenizer"}  # text encoder -> its tokenizer
    pipe: StableDiffusionPipeline

    def __init__(self, pipe: StableDiffusionPipeline, config: BackboneConfig) -> None:
        self.pipe, self.config = pipe, config
        # Of the training's noise only: samples are drawn with whatever scheduler the pipeline has.
        self._schedule: Any = DDPMScheduler.from_config(pipe.scheduler.config)
        self._fingerprint: dict[str, str] | None = None
        self._rows, self._words = TokenMemory(), TokenMemory()

    @classmethod
    def defaults(cls) -> BackboneConfig:
        """The config of a pipeline that comes without one."""
        return BackboneConfig(name="stable_diffusion")

    @classmethod
    def fits(cls, pipe: DiffusionPipeline) -> bool:
        """Whether this class can wrap `pipe`."""
        return isinstance(pipe, StableDiffusionPipeline)

    @classmethod
    def source(cls, config: BackboneConfig) -> loading.Source:
        """Where the weights are. Raises BackboneError."""
        return loading.source(config, "StableDiffusionPipeline")

    @classmethod
    def load(cls, config: BackboneConfig) -> StableDiffusionBackbone:
        """Load the pipeline: safetensors only, no safety checker, DDIM, frozen, on the config's device and dtype.

        Raises:
            BackboneError: no path, not a Stable Diffusion pipeline, or what diffusers could not load and why.
        """
        device, dtype = loading.resolve_device(config.device), loading.resolve_dtype(config.dtype)
        origin = cls.source(config)
        with loading.reading(origin):
            pipe = StableDiffusionPipeline.from_pretrained(
                origin.name,
                dtype=dtype,
                use_safetensors=True,
                local_files_only=origin.local,
                safety_checker=None,
                feature_extractor=None,
                requires_safety_checker=False,
            )
            loading.check_tokenizer(pipe.tokenizer)
        pipe.scheduler = DDIMScheduler.from_config(pipe.scheduler.config)
        for part in (pipe.unet, pipe.vae, pipe.text_encoder):
            part.eval()
        return cls.around(pipe.to(device), config)

    @classmethod
    def around(cls, pipe: DiffusionPipeline, config: BackboneConfig) -> StableDiffusionBackbone:
        """Wrap a pipeline that the user loaded; nothing in it is changed but `requires_grad`.

        Raises:
            BackboneError: another kind of pipeline or one without text encoder, a resolution that its autoencoder
                cannot take, or a prediction that is neither noise nor velocity.
        """
        if not isinstance(pipe, StableDiffusionPipeline):
            raise BackboneError(
                f"found a {type(pipe).__name__}, expected a StableDiffusionPipeline; where the parts are the same, "
                "StableDiffusionPipeline(**pipe.components) makes one"
            )
        if config.resolution < 1 or config.resolution % pipe.vae_scale_factor:
            raise BackboneError(
                f"backbone.resolution: found {config.resolution}, expected a multiple of {pipe.vae_scale_factor} pixels"
            )
        if pipe.text_encoder is None:
            raise BackboneError("found a pipeline without a text encoder, expected one with all its parts")
        backbone = cls(pipe, config)
        if backbone.prediction not in ("epsilon", "v_prediction"):
            raise BackboneError(
                f"the pipeline's scheduler: found prediction_type {backbone.prediction!r}, expected 'epsilon' or "
                "'v_prediction'"
            )
        for part in (pipe.unet, pipe.vae, pipe.text_encoder):
            part.requires_grad_(False)
        return backbone

    @classmethod
    def check_words(cls, config: BackboneConfig, placeholder: str, superclass: str) -> None:
        """`check_token` before any model is loaded: reads the tokenizer only.

        Raises:
            BackboneError: the tokenizer cannot be loaded.
            TokenError: see `check_token`.
        """
        origin = cls.source(config)
        for name in cls.towers.values():
            with loading.reading(origin):
                tokenizer = CLIPTokenizer.from_pretrained(origin.name, subfolder=name, local_files_only=origin.local)
                loading.check_tokenizer(tokenizer)
            check_word(tokenizer, placeholder, superclass)

    @property
    def denoiser(self) -> nn.Module:
        return self.pipe.unet

    def edit_sites(self) -> list[EditSite]:
        return edit_sites_of(self.denoiser)

    def encode(self, prompts: Sequence[str], word: str) -> Encoding:
        tokenizer = self.pipe.tokenizer
        rows = self._rows.read(tokenizer, prompts, self._row)
        ids, mask = torch.stack([row for row, _ in rows]), torch.stack([row for _, row in rows])
        (wanted,) = self._words.read(tokenizer, [word], lambda text: token_ids(tokenizer, text))
        marks = last_tokens(ids, wanted)
        for prompt, found in zip(prompts, marks.any(1).tolist(), strict=True):
            if not found:
                raise TokenError(f"prompt {prompt!r}: expected the word {word!r} in it")
        return Encoding(self._context(ids, mask), marks.to(self.device))

    def check_token(self, placeholder: str, superclass: str) -> None:
        for name in self.towers.values():
            check_word(getattr(self.pipe, name), placeholder, superclass)

    def add_token(self, placeholder: str, superclass: str, vectors: int = 1) -> AddedWord:
        return add_word(self.pipe, self.towers, placeholder, superclass, vectors)

    def moment(self, progress: bool = True) -> Matrix:
        """See the seam. Adapters in the text encoder (LoRA) are part of what is measured; it is not cached then.

        Raises:
            CovarianceError: the matrix cannot be read, or nothing can be measured.
            ConfigError: the captions cannot be read.
        """
        settings = self.config.covariance
        moments.check_settings(settings)
        encoder = self.pipe.text_encoder
        key = {
            "text_encoder": self.fingerprint()["text_encoder"],
            "tokenizer": fingerprint.vocabulary_digest(self._stock_tokenizer()),
            "dtype": str(encoder.dtype).removeprefix("torch."),
        }
        if settings.matrix is not None:
            matrix = moments.imported(settings, key)
        else:
            key |= {"captions": self._captions_digest(), "count": settings.count, "positions": settings.positions}
            cached = None if fingerprint.has_adapters(encoder) else key
            matrix = moments.measured(settings, self.captions(), self._encode_captions, cached, progress)
        self.covariance_origin = matrix.origin
        return matrix

    def second_moment(self, progress: bool = True) -> Factorised:
        """See the seam.

        Raises:
            CovarianceError: `C` cannot be had, see `moment`, or cannot be factorised with the configured ridge.
            ConfigError: the captions cannot be read.
        """
        projection: Any = fingerprint.base_module(self.edit_sites()[0].projection)
        return moments.factorised(self.config.covariance, self.moment(progress), projection.in_features)

    def captions(self) -> Captions:
        """The captions that `C` is made of. Raises ConfigError."""
        return self.captions_of(self.config.covariance)

    @classmethod
    def captions_of(cls, settings: CovarianceConfig) -> Captions:
        """The captions that these settings name. Raises ConfigError."""
        return caption_stream(settings.captions, settings.count)

    @classmethod
    def check_covariance(cls, config: BackboneConfig) -> None:
        """Hold, before any model is loaded, that the captions can be read, or the matrix used.

        Raises:
            ConfigError: no such captions or selection of positions.
            CovarianceError: a matrix that cannot be read, or not be used with this model; see `moments.factorised`.
            BackboneError: the UNet's config cannot be read.
        """
        settings = config.covariance
        moments.check_settings(settings)
        if settings.matrix is None:
            cls.captions_of(settings)
            return
        matrix, origin = moments.imported(settings), cls.source(config)
        with loading.reading(origin):
            unet = UNet2DConditionModel.load_config(origin.name, subfolder="unet", local_files_only=origin.local)
        width = unet.get("cross_attention_dim") if isinstance(unet, dict) else None
        moments.factorised(settings, matrix, width if isinstance(width, int) else None)

    @torch.no_grad()
    def latents(self, pixels: Tensor) -> Tensor:
        vae: Any = self.pipe.vae
        posterior = vae.encode(pixels.to(vae.device, vae.dtype)).latent_dist
        return (posterior.mode() * vae.config.scaling_factor).to(self.device, self.dtype)

    def latent_shape(self) -> tuple[int, int, int]:
        side = self.config.resolution // self.pipe.vae_scale_factor
        return int(self.pipe.unet.config.in_channels), side, side

    @property
    def prediction(self) -> str:
        """`epsilon` or `v_prediction`."""
        return self._schedule.config.prediction_type

    @property
    def train_timesteps(self) -> int:
        return self._schedule.config.num_train_timesteps

    def add_noise(self, latents: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
        return self._schedule.add_noise(latents, noise, timesteps)

    def target(self, latents: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
        if self.prediction == "epsilon":
            return noise
        return self._schedule.get_velocity(latents, noise, timesteps)

    def predict(self, noisy: Tensor, timesteps: Tensor, encoding: Encoding) -> Tensor:
        context = encoding.context.to(self.dtype)
        return self.denoiser(noisy.to(self.dtype), timesteps, encoder_hidden_states=context, **encoding.extra).sample

    def fingerprint(self) -> dict[str, str]:
        """See the seam: of the base weights, whatever is attached; loads in float32 and float16 agree, bfloat16 not."""
        if self._fingerprint is None:
            projections = (
                (f"{site.name}.{name}", value)
                for site in self.edit_sites()
                for name, value in fingerprint.base_parameters(site.projection)
            )
            self._fingerprint = {
                "family": self.family,
                "text_encoder": fingerprint.digest(fingerprint.base_parameters(self.pipe.text_encoder)),
                "projections": fingerprint.digest(projections),
            }
        return dict(self._fingerprint)

    def _row(self, prompt: str) -> tuple[Tensor, Tensor]:
        """Ids (N,), padded, and mask (N,); a user's textual inversions written out as in diffusers.

        Raises:
            TokenError: the prompt is too long.
        """
        tokenizer = self.pipe.tokenizer
        limit = tokenizer.model_max_length
        ids = tokenizer(self.pipe.maybe_convert_prompt(prompt, tokenizer), verbose=False).input_ids
        if len(ids) > limit:
            raise TokenError(
                f"prompt {prompt!r}: {len(ids)} tokens with beginning and end, but the text encoder reads {limit}: it "
                "would be cut off; shorten it"
            )
        padded = tokenizer.pad({"input_ids": ids}, padding="max_length", max_length=limit, return_tensors="pt")
        return padded.input_ids, padded.attention_mask

    def _context(self, ids: Tensor, mask: Tensor) -> Tensor:
        """(B, N) ids and mask to (B, N, d), as `StableDiffusionPipeline.encode_prompt` does."""
        encoder = self.pipe.text_encoder
        uses_mask = getattr(encoder.config, "use_attention_mask", False)
        context = encoder(ids.to(self.device), attention_mask=mask.to(self.device) if uses_mask else None)[0]
        return context.to(encoder.dtype)

    def _encode_captions(self, captions: list[str]) -> Tensor:
        """(B, N, d), or (M, d) where words alone count; too long captions are cut off, as prompts are in use."""
        tokenizer = self.pipe.tokenizer
        limit = tokenizer.model_max_length
        inputs = tokenizer(captions, padding="max_length", max_length=limit, truncation=True, return_tensors="pt")
        context = self._context(inputs.input_ids, inputs.attention_mask)
        if self.config.covariance.positions == "words":
            return context[moments.word_positions(tokenizer, inputs).to(context.device)]
        return context

    def _captions_digest(self) -> str:
        """Of every caption of a file; of the first ones of a built-in set, since the others follow the same rules."""
        is_file = Path(self.config.covariance.captions).expanduser().is_file()
        captions = islice(self.captions(), None if is_file else BUILT_IN_SAMPLE)
        return captions_digest(captions)[: fingerprint.DIGITS]

    def _stock_tokenizer(self) -> CLIPTokenizer:
        table = self.pipe.text_encoder.get_input_embeddings()
        return table.stock_tokenizer if isinstance(table, ExtendedEmbedding) else self.pipe.tokenizer  # type: ignore


BACKBONE = StableDiffusionBackbone
