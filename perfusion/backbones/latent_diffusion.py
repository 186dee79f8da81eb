"""What all backbones have in common: text encoders side by side, a denoiser of latents whose cross-attention reads
them, an autoencoder, and what the denoiser predicts.

A family says which pipeline it wraps, what its text encoders are, and how its denoiser is given what they read.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from itertools import islice
from pathlib import Path
from typing import Any, ClassVar, Literal, Self

import torch
from diffusers import DDIMScheduler, DDPMScheduler, DiffusionPipeline
from diffusers.models.attention_processor import Attention, FusedAttnProcessor2_0
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase

from perfusion.backbones import fingerprint, loading
from perfusion.backbones.base import Backbone, BackboneError, Encoding
from perfusion.backbones.gradient_checkpointing import gradient_checkpointing
from perfusion.config import BackboneConfig, CovarianceConfig
from perfusion.covariance import configured
from perfusion.covariance.captions import Captions, caption_stream, captions_digest
from perfusion.covariance.matrix import Matrix
from perfusion.editing import TokenError
from perfusion.editing.places import EditSite, base_module
from perfusion.editing.reading import Reading
from perfusion.editing.tokens import TokenMemory, check_word, last_tokens, token_ids
from perfusion.editing.words import AddedWord, Words, add_word, check_pipeline

_SAMPLE = 64  # captions that tell a second moment from its inverse
BUILT_IN_SAMPLE = 256  # captions of a built-in set that tell its version from others
_KINDS: tuple[Literal["k"], Literal["v"]] = ("k", "v")


def edit_sites_of(denoiser: nn.Module) -> list[EditSite]:
    """Every K and V projection of a diffusers UNet that reads the text, in module order, K before V.

    Needs no weights: a UNet on the meta device will do.

    Raises:
        BackboneError: the projections are fused, so that an edit would change nothing.
    """
    sites: list[EditSite] = []
    for name, module in base_module(denoiser).named_modules():
        if not (isinstance(module, Attention) and module.is_cross_attention):
            continue
        if isinstance(module.processor, FusedAttnProcessor2_0):  # `fused_projections` stays true after unfusing
            raise BackboneError(
                f"{name}: its K and V projections are fused, and an edit of them would do nothing; call "
                "unfuse_qkv_projections() first"
            )
        sites += [EditSite(f"{name}.to_{kind}", module, f"to_{kind}", kind) for kind in _KINDS]
    return sites


class LatentDiffusionBackbone(Backbone):
    """A pipeline of class `Pipeline`, frozen.

    A family gives the class variables, `defaults` and `_read`; and whatever else it does in its own way.
    """

    Pipeline: ClassVar[Any]  # class of diffusers
    kin: ClassVar[tuple[Any, ...]] = ()  # further classes, of pipelines with the same parts, that draw otherwise
    others: ClassVar[tuple[Any, ...]] = ()  # of `kin`, those that weights may be of as well
    part: ClassVar[str] = "unet"  # the denoiser's name in the pipeline
    family: ClassVar[str]
    towers: ClassVar[Mapping[str, str]]  # text encoder -> its tokenizer, in the order of the denoiser's context
    reading: ClassVar[Reading] = Reading()  # by the text encoders
    masked: ClassVar[bool] = False  # the denoiser leaves out what pads a prompt
    trims: ClassVar[bool] = True  # what pads a prompt comes last, and may be left out where it does not count
    small_letters: ClassVar[bool] = False  # the pipeline makes them of all text, the tokenizer does not
    predictions: ClassVar[tuple[str, ...]] = ("epsilon", "v_prediction")  # that can be trained
    parts: ClassVar[Mapping[str, Any]]  # arguments of the pipeline's class that loading fixes
    pipe: Any

    def __init__(self, pipe: DiffusionPipeline, config: BackboneConfig) -> None:
        self.pipe, self.config = pipe, config
        self._schedule = self.schedule()
        self._fingerprints: dict[torch.dtype | None, dict[str, str]] = {}
        self._rows = {encoder: TokenMemory() for encoder in self.towers}
        self._words = {encoder: TokenMemory() for encoder in self.towers}

    def schedule(self) -> Any:
        """Of the training's noise only: samples are drawn with whatever scheduler the pipeline has."""
        return DDPMScheduler.from_config(self.pipe.scheduler.config)

    @abstractmethod
    def _read(self, ids: Sequence[Tensor], masks: Sequence[Tensor]) -> tuple[Tensor, dict[str, Any]]:
        """Ids and masks (B, N) for each text encoder to the context (B, N, d), as the stock pipeline makes it, and what
        else the denoiser takes of the prompts."""

    @classmethod
    def fits(cls, pipe: DiffusionPipeline) -> bool:
        return isinstance(pipe, (cls.Pipeline, *cls.kin))

    @classmethod
    def source(cls, config: BackboneConfig) -> loading.Source:
        """Where the weights are. Raises BackboneError."""
        return loading.source(config, *(kind.__name__ for kind in (cls.Pipeline, *cls.others)))

    @classmethod
    def load(cls, config: BackboneConfig) -> Self:
        """Load the pipeline: safetensors only, DDIM, frozen, on the config's device and dtype.

        Raises:
            BackboneError: no path, another kind of pipeline, or what diffusers could not load and why.
        """
        device, dtype = loading.resolve_device(config.device), loading.resolve_dtype(config.dtype)
        origin = cls.source(config)
        kind = next((kind for kind in cls.others if kind.__name__ == loading.kind_of(origin)), cls.Pipeline)
        pipe: Any = loading.read_pipeline(kind, origin, dtype, [*cls.towers.values()], **cls.parts)
        cls.set_scheduler(pipe)
        backbone = cls.around(pipe.to(device), config)
        for part in backbone._frozen():
            part.requires_grad_(False).eval()
        return backbone

    @classmethod
    def set_scheduler(cls, pipe: Any) -> None:
        """Give a pipeline that was loaded the scheduler that samples are drawn with: DDIM, as in the paper."""
        # Latents have no bounds to be clipped to, and the schedule ends with the first step's noise; schedulers of
        # other kinds do not always say so, and DDIM's own defaults are those of pixels.
        latent = {"clip_sample": False, "set_alpha_to_one": False}
        pipe.scheduler = DDIMScheduler.from_config({**latent, **pipe.scheduler.config})

    @classmethod
    def around(cls, pipe: DiffusionPipeline, config: BackboneConfig) -> Self:
        """Wrap a pipeline that the user loaded; nothing in it is changed.

        Raises:
            BackboneError: another kind of pipeline or one without a text encoder, a resolution that its autoencoder
                cannot take, or a prediction that is neither noise nor velocity.
        """
        name = cls.Pipeline.__name__
        if not isinstance(pipe, (cls.Pipeline, *cls.kin)):
            raise BackboneError(
                f"found a {type(pipe).__name__}, expected a {name}; where the parts are the same, "
                f"{name}(**pipe.components) makes one"
            )
        stock: Any = pipe
        if config.resolution < 1 or config.resolution % stock.vae_scale_factor:
            raise BackboneError(
                f"backbone.resolution: found {config.resolution}, expected a multiple of {stock.vae_scale_factor} "
                "pixels"
            )
        if absent := [encoder for encoder in cls.towers if getattr(pipe, encoder) is None]:
            raise BackboneError(f"found a pipeline without a {absent[0]}, expected one with all its parts")
        channels, latents = getattr(stock, cls.part).config.in_channels, stock.vae.config.latent_channels
        if channels != latents:
            raise BackboneError(
                f"found a denoiser of {channels} channels, expected the {latents} of the latents: a model for "
                "inpainting takes a picture and its mask besides, which a training has not"
            )
        if (steps := stock.scheduler.config.num_train_timesteps) < 1:
            raise BackboneError(f"the pipeline's scheduler: found num_train_timesteps {steps}, expected at least 1")
        backbone = cls(pipe, config)
        if backbone.prediction not in cls.predictions:
            raise BackboneError(
                f"the pipeline's scheduler: found prediction_type {backbone.prediction!r}, expected "
                f"{' or '.join(map(repr, cls.predictions))}"
            )
        return backbone

    @classmethod
    def check_words(cls, config: BackboneConfig, placeholder: str, superclass: str) -> None:
        origin = cls.source(config)
        cls._check_letters(placeholder)
        for name in cls.towers.values():
            check_word(loading.read_tokenizer(origin, name), placeholder, superclass)

    @classmethod
    def _check_letters(cls, placeholder: str) -> None:
        if cls.small_letters and placeholder != placeholder.lower():
            raise TokenError(
                f"concept.placeholder: found {placeholder!r}, expected small letters, such as {placeholder.lower()!r}: "
                f"a {cls.Pipeline.__name__} makes them of all text"
            )

    @property
    def denoiser(self) -> nn.Module:
        return getattr(self.pipe, self.part)

    def edit_sites(self) -> list[EditSite]:
        return edit_sites_of(self.denoiser)

    def text_encoders(self) -> dict[str, nn.Module]:
        return {encoder: getattr(self.pipe, encoder) for encoder in self.towers}

    def encode(self, prompts: Sequence[str], word: str | None, *, padded: bool = True) -> Encoding:
        ids, masks, marks = [], [], []
        for encoder, tokenizer in self._tokenizers().items():
            rows = self._rows[encoder].read(tokenizer, prompts, lambda text, t=tokenizer: self._row(t, text))
            ids.append(torch.stack([row for row, _ in rows]))
            masks.append(torch.stack([mask for _, mask in rows]))
            if word is None:
                marks.append(self.positions(torch.zeros_like(ids[-1], dtype=torch.bool)))
                continue
            (wanted,) = self._words[encoder].read(tokenizer, [word], lambda text, t=tokenizer: token_ids(t, text))
            marks.append(self.positions(last_tokens(ids[-1], wanted)))
        for k, (prompt, found) in enumerate(zip(prompts, marks[0].any(1).tolist(), strict=True)):
            if not found and word is not None:
                raise TokenError(f"prompt {prompt!r}: expected the word {word!r} in it")
            if any(not torch.equal(others[k], marks[0][k]) for others in marks[1:]):
                raise TokenError(
                    f"prompt {prompt!r}: found {word!r} at other positions for one text encoder than for the other, "
                    "expected the same: is there a textual inversion in it that they know with different numbers of "
                    "vectors?"
                )
        if not padded and self.trims:
            length = max(int(mask.sum(1).max()) for mask in masks)
            ids, masks, marks = ([part[:, :length] for part in parts] for parts in (ids, masks, marks))
        context, extra = self._read(ids, masks)
        with torch.no_grad():
            inputs = self.inputs_of(context)
        # With offloading not the denoiser's device.
        return Encoding(context, marks[0].to(context.device), extra, None if inputs is context else inputs)

    def positions(self, row: Tensor) -> Tensor:
        """Of something for each token (B, N', ...) what belongs to the positions of the context (B, N, ...)."""
        return row

    def tokens(self, prompt: str) -> dict[int, str]:
        tokenizer = next(iter(self._tokenizers().values()))
        ids, mask = (self.positions(row[None])[0] for row in self._row(tokenizer, prompt))
        names: Any = tokenizer.convert_ids_to_tokens(ids.tolist())
        return {k: names[k] for k in mask.nonzero().flatten().tolist()}

    def mean_encoding(self, prompts: Sequence[str], word: str) -> Tensor:
        """Mean encoding (d,) of `word` in the prompts, at its last token.

        A text encoder that was asked the same before, and has the same weights, is not run again.
        """
        encoders = [*self.text_encoders().values()]
        ids = [tuple(token_ids(tokenizer, word)) for tokenizer in self._tokenizers().values()]
        make = super().mean_encoding
        if not all(map(fingerprint.reads_as_loaded, encoders, ids)):
            return make(prompts, word)
        kind = self.device.type
        autocast = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else None
        weights = (pair for encoder in encoders for pair in fingerprint.base_parameters(encoder))
        what = ("mean encoding", *prompts, word, *ids, autocast)
        return fingerprint.remembered(encoders[0], what, weights, lambda: make(prompts, word)).clone()

    def check_token(self, placeholder: str, superclass: str) -> None:
        self._check_letters(placeholder)
        check_pipeline(self.pipe, self.towers, placeholder, superclass)

    def check_prompts(self, prompts: Sequence[str]) -> None:
        for tokenizer in self._tokenizers().values():
            for prompt in prompts:
                try:
                    tokenizer(self.text(prompt, tokenizer), truncation=True, max_length=self.length(tokenizer))
                except TokenError as error:
                    raise TokenError(f"prompt {prompt!r}: {error}") from error

    def text(self, prompt: str, tokenizer: PreTrainedTokenizerBase) -> str:
        """What the pipeline has its tokenizer read of a prompt: a user's textual inversions are written out."""
        return self.pipe.maybe_convert_prompt(prompt, tokenizer)

    def length(self, tokenizer: PreTrainedTokenizerBase) -> int:
        """How many tokens the text encoder reads."""
        return tokenizer.model_max_length

    def add_token(self, placeholder: str, superclass: str, vectors: int | None = 1) -> AddedWord:
        self._check_letters(placeholder)
        return add_word(self.pipe, self.towers, placeholder, superclass, vectors, self.reading)

    def moment(self, progress: bool = True) -> Matrix:
        settings = self.config.covariance
        configured.check_settings(settings)
        encoders = self.text_encoders()
        dtypes = dict.fromkeys(str(next(encoder.parameters()).dtype) for encoder in encoders.values())
        key: dict[str, object] = {
            **{encoder: self.fingerprint()[encoder] for encoder in encoders},
            **{
                name: fingerprint.vocabulary_digest(self._stock_tokenizer(encoder))
                for encoder, name in self.towers.items()
            },
            "dtype": ", ".join(dtypes).replace("torch.", ""),
        }
        if settings.matrix is not None:
            matrix = configured.imported(settings, key)
            if "matrix" in matrix.origin:  # nothing else is known of it
                captions = islice(self.captions_of(self.defaults().covariance), _SAMPLE)
                with torch.no_grad():
                    configured.check_not_inverse(settings, matrix, self._encode_captions([*captions]))
        else:
            key |= {"captions": self._captions_digest(), "count": settings.count, "positions": settings.positions}
            adapted = any(fingerprint.has_adapters(encoder) for encoder in encoders.values())
            cached = None if adapted else key
            matrix = configured.measured(settings, self.captions(), self._encode_captions, cached, progress)
        self.covariance_origin = matrix.origin
        return matrix

    def second_moment(self, progress: bool = True) -> Tensor:
        projection: Any = base_module(self.edit_sites()[0].projection)
        return configured.factorised(self.config.covariance, self.moment(progress), projection.in_features)

    def captions(self) -> Captions:
        """The captions that `C` is made of. Raises ConfigError."""
        return self.captions_of(self.config.covariance)

    @classmethod
    def captions_of(cls, settings: CovarianceConfig) -> Captions:
        """The captions that these settings name. Raises ConfigError."""
        return caption_stream(settings.captions, settings.count)

    @classmethod
    def check_covariance(cls, config: BackboneConfig) -> None:
        settings = config.covariance
        configured.check_settings(settings)
        if settings.matrix is None:
            cls.captions_of(settings)
            return
        matrix = configured.imported(settings)
        width = loading.read_config(cls.source(config), cls.part).get("cross_attention_dim")
        configured.factorised(settings, matrix, width if isinstance(width, int) else None)

    @classmethod
    def check_controlnet(cls, config: BackboneConfig, net: Mapping[str, Any]) -> None:
        unet = loading.read_config(cls.source(config), cls.part)
        for key in ("cross_attention_dim", "addition_embed_type", "in_channels"):
            if net.get(key) != unet.get(key):
                raise BackboneError(
                    f"controlnet: found one with {key} {net.get(key)}, expected {unet.get(key)}, that of the model: it "
                    "is made for another kind"
                )

    @torch.no_grad()
    def latents(self, pixels: Tensor) -> Tensor:
        """Scaled latents of pixels (B, 3, H, W) in [-1, 1].

        An autoencoder that float16 would overflow (SDXL's `force_upcast`) computes in float32.
        """
        vae: Any = self.pipe.vae
        own = vae.dtype
        upcast = own == torch.float16 and vae.config.get("force_upcast", False)
        if upcast:
            vae.to(torch.float32)
        try:
            encoded = vae.encode(pixels.to(vae.device, vae.dtype))
        finally:
            if upcast:
                vae.to(own)
        latents = encoded.latent_dist.mode() if "latent_dist" in encoded else encoded.latent
        mean, std = vae.config.get("latents_mean"), vae.config.get("latents_std")
        if mean is not None and std is not None:  # per channel; the stock pipelines undo the same
            mean, std = (torch.tensor(value).to(latents).view(1, -1, 1, 1) for value in (mean, std))
            latents = (latents - mean) / std
        return (latents * vae.config.scaling_factor).to(self.device, self.dtype)

    def latent_shape(self) -> tuple[int, int, int]:
        side = self.config.resolution // self.pipe.vae_scale_factor
        return int(self.pipe.vae.config.latent_channels), side, side

    @property
    def prediction(self) -> str:
        """One of `predictions`."""
        return self._schedule.config.prediction_type

    @property
    def train_timesteps(self) -> int:
        return self._schedule.config.num_train_timesteps

    def add_noise(self, latents: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
        return self._schedule.add_noise(latents, noise, timesteps)

    def target(self, latents: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
        if not self.predicts_velocity:
            return noise
        return self._schedule.get_velocity(latents, noise, timesteps)

    def snr(self, timesteps: Tensor) -> Tensor:
        kept = self._schedule.alphas_cumprod.to(timesteps.device)[timesteps]
        return kept / (1 - kept)

    @property
    def predicts_velocity(self) -> bool:
        return self.prediction == "v_prediction"

    def predict(self, noisy: Tensor, timesteps: Tensor, encoding: Encoding) -> Tensor:
        context, denoiser = encoding.context.to(self.dtype), self.pipe.components[self.part]
        with gradient_checkpointing(denoiser) if self.config.gradient_checkpointing else nullcontext():
            output = denoiser(
                noisy.to(self.dtype),
                timestep=self.times(timesteps),
                encoder_hidden_states=context,
                **encoding.extra,
            ).sample
        return output[:, : noisy.shape[1]]  # some say their uncertainty besides

    def times(self, timesteps: Tensor) -> Tensor:
        """Diffusion steps (B,) as the denoiser is told them."""
        return timesteps

    def fingerprint(self, dtype: torch.dtype | None = None) -> dict[str, str]:
        if dtype not in self._fingerprints:
            projections = (
                (f"{site.name}.{name}", value)
                for site in self.edit_sites()
                for name, value in fingerprint.base_parameters(site.projection)
            )
            self._fingerprints[dtype] = {
                **self.kind(),
                **{
                    name: fingerprint.remembered_digest(encoder, "all", parameters, dtype)
                    for name, encoder in self.text_encoders().items()
                    for parameters in [fingerprint.encoder_parameters(encoder, self._stock_tokenizer(name))]
                },
                "projections": fingerprint.remembered_digest(self.denoiser, "projections", projections, dtype),
            }
        return dict(self._fingerprints[dtype])

    def _frozen(self) -> list[nn.Module]:
        return [getattr(self.pipe, self.part), self.pipe.vae, *self.text_encoders().values()]

    def _tokenizers(self) -> dict[str, PreTrainedTokenizerBase]:
        """Text encoder -> its tokenizer now."""
        return {encoder: getattr(self.pipe, name) for encoder, name in self.towers.items()}

    def _row(self, tokenizer: PreTrainedTokenizerBase, prompt: str) -> tuple[Tensor, Tensor]:
        """Ids (N,), padded, and mask (N,).

        Raises:
            TokenError: the prompt is too long.
        """
        limit = self.length(tokenizer)
        ids = tokenizer(self.text(prompt, tokenizer), verbose=False).input_ids
        if len(ids) > limit:
            raise TokenError(
                f"prompt {prompt!r}: {len(ids)} tokens with beginning and end, but the text encoder reads {limit}: it "
                "would be cut off; shorten it"
            )
        how: Any = {"padding": "max_length", "max_length": limit, "padding_side": self.reading.padding_side}
        padded = tokenizer.pad({"input_ids": ids}, return_tensors="pt", **how)
        return padded.input_ids, padded.attention_mask

    def _encode_captions(self, captions: list[str]) -> Tensor:
        """What K and V read, (B, N, d), or (M, d) where not all positions count; too long captions are cut off, as
        prompts are in use."""
        tokenizers = [*self._tokenizers().values()]
        inputs = [
            tokenizer(
                [self.text(caption, tokenizer) for caption in captions],
                padding="max_length",
                max_length=self.length(tokenizer),
                padding_side=self.reading.padding_side,
                truncation=True,
                return_tensors="pt",
            )
            for tokenizer in tokenizers
        ]
        context = self._read([i.input_ids for i in inputs], [i.attention_mask for i in inputs])[0]
        read = self.inputs_of(context)
        if self.config.covariance.positions == "words":
            return read[self.positions(configured.word_positions(tokenizers[0], inputs[0])).to(read.device)]
        if self.masked:
            return read[self.positions(inputs[0].attention_mask).bool().to(read.device)]
        return read

    def _captions_digest(self) -> str:
        """Of every caption of a file; of the first ones of a built-in set, since the others follow the same rules."""
        is_file = Path(self.config.covariance.captions).expanduser().is_file()
        captions = islice(self.captions(), None if is_file else BUILT_IN_SAMPLE)
        return captions_digest(captions)[: fingerprint.DIGITS]

    def _stock_tokenizer(self, encoder: str) -> PreTrainedTokenizerBase:
        table = self.text_encoders()[encoder].get_input_embeddings()  # type: ignore[operator]
        return table.stock_tokenizer if isinstance(table, Words) else self._tokenizers()[encoder]
