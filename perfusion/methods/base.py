"""The method seam: what a method puts into a backbone, what of it is trained and how fast, its loss, and its state.

A method is one file `perfusion/methods/<name>.py` that defines `METHOD` (a subclass of `Method`) and its options (a
subclass of `MethodOptions`), and one preset `conf/method/<name>.yaml`. After `detach` the backbone is bit-identical to
before `attach`.
"""

from __future__ import annotations

import dataclasses
import importlib
import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from enum import Enum
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from perfusion import methods
from perfusion.backbones.base import Backbone, Encoding
from perfusion.config import ConfigError, checked
from perfusion.editing import EditError
from perfusion.editing.words import AddedWord
from perfusion.registry import modules_that_define

# How the rates go on after the warm-up: as they are, evenly to 0 at the end, or to 0 along half a cosine.
RateSchedule = Enum("RateSchedule", {"constant": "constant", "linear": "linear", "cosine": "cosine"}, module=__name__)


@dataclass
class MethodOptions:
    """What every method has."""

    name: str = "?"
    steps: int = 400  # optimizer steps
    batch_size: int = 16
    rate_schedule: RateSchedule = RateSchedule.constant  # of all rates, after the warm-up
    warmup_steps: int = 0  # steps in which the rates rise evenly to what is set
    min_snr_gamma: float | None = None  # γ of min-SNR weighting, 5 in its paper; null: all diffusion steps weigh alike

    def rate_factor(self, step: int) -> float:
        """What the rates are multiplied by at optimizer step `step`, the first being 0."""
        if step < self.warmup_steps:
            return (step + 1) / self.warmup_steps
        done = (step - self.warmup_steps) / max(1, self.steps - self.warmup_steps)
        if self.rate_schedule is RateSchedule.linear:
            return 1 - done
        return 1.0 if self.rate_schedule is RateSchedule.constant else (1 + math.cos(math.pi * done)) / 2


@dataclass(frozen=True)
class Word:
    """The concept's word and what it is a kind of."""

    placeholder: str
    superclass: str


@dataclass(frozen=True)
class Batch:
    """One training batch, on the backbone's device: a whole step's, or the part of it that one process sees at once."""

    latents: Tensor  # (B, c, h, w)
    masks: Tensor | None  # (B, 1, h, w) float32 with maximum 1, or None
    prompts: list[str]  # with the placeholder in them
    noise: Tensor  # (B, c, h, w)
    timesteps: Tensor  # (B,) int64
    prior: Batch | None = None  # pictures of the superclass, for methods that preserve it: (P, ...), without masks
    step_prompts: Sequence[str] | None = None  # of the whole step with its first part, none later; None: this is it all
    target: Tensor | None = None  # (B, c, h, w), what the denoiser should say; None: `Backbone.target`


@dataclass(frozen=True)
class Dial:
    """Something that can be set while an attached concept draws.

    Attributes:
        name: of the method's property.
        number: else it is a word.
        per_picture: the property also takes a tensor (S,), a value for each of the S pictures of a batch.
        between: of a number, the values that are worth trying, as a slider offers them; others are not refused.
        words: of a word, those that there are.
        about: what it does, in a few words.
    """

    name: str
    number: bool = True
    per_picture: bool = False
    between: tuple[float, float] = (0.0, 1.5)
    words: tuple[str, ...] = ()
    about: str = ""


class Method(nn.Module, ABC):
    """A personalization method. Its own parameters and buffers are all that training changes."""

    Options: ClassVar[type[MethodOptions]]
    dials: ClassVar[tuple[Dial, ...]] = ()  # no other file has to know them
    needs_covariance: ClassVar[bool] = False  # whether what it learns depends on the backbone's second moment
    # Options that presets need not name, and concept files name only where they are not the default.
    newer: ClassVar[tuple[str, ...]] = ("rate_schedule", "warmup_steps", "min_snr_gamma")

    def __init__(self, options: Any, word: Word) -> None:
        super().__init__()
        _check(options)
        self.options = options
        self.word = word
        self._undo = ExitStack()
        self.clear()

    @property
    def settings(self) -> dict[str, Any]:
        """What concept files say of the options: plain values, without the name."""
        return {
            key: value.name if isinstance(value, Enum) else value
            for key, value in dataclasses.asdict(self.options).items()
            if key != "name" and (key not in self.newer or value != getattr(self.Options(), key))
        }

    def clear(self) -> None:
        """Let go of all that belongs to a backbone; a method that has more than this adds it here."""
        self._backbone: Backbone | None = None  # None: not attached
        self.embeddings = nn.ParameterDict()  # text encoder -> trained vectors of the concept's word, (vectors, d_e)

    def attach(self, backbone: Backbone) -> None:
        """Put the method's changes into the backbone: all of them, or none if that raises.

        Raises:
            EditError: this method is attached already; and all that `put` raises.
        """
        if self._backbone is not None:
            raise EditError(f"{self.word.placeholder}: found it attached already, expected detach() before attach()")
        with ExitStack() as undo:
            undo.callback(self.clear)
            self._backbone = backbone
            for part in (backbone.pipe, backbone.denoiser, *backbone.text_encoders().values()):
                undo.callback(_hold(part, self))
            self.put(backbone, undo)
            self._undo = undo.pop_all()

    def detach(self) -> None:
        """Leave the backbone bit-identical to before `attach`; idempotent."""
        self._undo.close()

    @abstractmethod
    def put(self, backbone: Backbone, undo: ExitStack) -> None:
        """Make the method's changes to the backbone, and leave with `undo`, after each, what takes it back."""

    @property
    def backbone(self) -> Backbone:
        """The one that it is attached to."""
        assert self._backbone is not None, "attach() first"
        return self._backbone

    def add_word(
        self, undo: ExitStack, vectors: int | None, reads_as: str | None = None, trained: bool = True
    ) -> AddedWord:
        """Add the concept's placeholder to the backbone's vocabulary, for `put`; see `Backbone.add_token`.

        Args:
            reads_as: what it starts at; None: its superclass.
            trained: its vectors are among `embeddings`; else they stay what they are.

        Raises:
            TokenError: the word cannot be added.
        """
        added = self.backbone.add_token(self.word.placeholder, reads_as or self.word.superclass, vectors)
        undo.callback(added.remove)
        if trained:
            self.embeddings.update(added.embeddings())
            self._norms = {name: _norms(vectors).clone() for name, vectors in added.embeddings().items()}
        else:
            for vector in added.embeddings().values():
                vector.requires_grad_(False)
        return added

    @abstractmethod
    def parameter_groups(self) -> list[dict[str, Any]]:
        """Groups for AdamW: `params`, `lr`, `name`, and any other AdamW keyword."""

    def on_step(self, encoding: Encoding) -> None:
        """Called once a training step with its encodings, before the denoiser runs (e.g. a moving average).

        They are those of the whole step, also where processes share it or one takes it in parts; see `start_step`.
        """

    def start_step(self, backbone: Backbone, batch: Batch, encoding: Encoding) -> None:
        """Call `on_step` if `batch`, whose prompts have this encoding, is the first that this process sees of a step.

        Of a step in parts every process encodes all prompts: that costs little beside the denoiser, and processes need
        not tell each other anything.
        """
        if batch.step_prompts is None:
            self.on_step(encoding)
        elif batch.step_prompts:
            with torch.no_grad():
                self.on_step(backbone.encode(batch.step_prompts, self.word.placeholder))

    @torch.no_grad()
    def after_step(self) -> None:
        """Called after every optimizer step: where the options have a `direction_only` that is on, the word's vectors
        go back to the norms that they started with."""
        if getattr(self.options, "direction_only", False):
            for name, vectors in self.embeddings.items():
                vectors.mul_(self._norms[name] / _norms(vectors))

    @abstractmethod
    def tensors(self) -> dict[str, Tensor]:
        """What a concept file stores: name -> tensor. Attached methods only."""

    def state(self) -> dict[str, Tensor]:
        """Copies of `tensors`, float32, detached, on the CPU."""
        return {name: value.detach().to("cpu", torch.float32, copy=True) for name, value in self.tensors().items()}

    @torch.no_grad()
    def load_state(self, state: Mapping[str, Tensor]) -> None:
        """Put a `state()` back into an attached method, exactly but for the rounding to the tensors' own types: here
        into `tensors` themselves."""
        for name, value in self.tensors().items():
            value.copy_(state[name])

    def word_tensors(self, rows: int | None = None) -> dict[str, Tensor]:
        """`embedding.<encoder>` (vectors, d_e), for `tensors`: the first `rows` of `embeddings`, or all."""
        return {f"embedding.{encoder}": vectors[:rows] for encoder, vectors in self.embeddings.items()}

    def unusable(self, state: Mapping[str, Tensor]) -> str | None:
        """Why a state of finite numbers and the right shapes cannot be drawn, in words; None: it can."""
        return None

    @abstractmethod
    def state_shapes(self, backbone: Backbone) -> dict[str, tuple[int, ...]]:
        """Names and shapes that `state()` has on this backbone, without attaching: a file is checked against it."""

    def word_shapes(self, backbone: Backbone, rows: int) -> dict[str, tuple[int, ...]]:
        """Those of `word_tensors`, for `state_shapes`."""
        encoders: dict[str, Any] = backbone.text_encoders()
        return {
            f"embedding.{name}": (rows, encoder.get_input_embeddings().embedding_dim)
            for name, encoder in encoders.items()
        }

    def export(self, folder: Path) -> list[Path]:
        """Write the attached concept into `folder`, made where it is missing, in the format that stock diffusers loads.

        Returns:
            The files, each written atomically; none, and no folder, for a method without a stock format.
        """
        return []

    def loss(self, backbone: Backbone, batch: Batch) -> dict[str, Tensor]:
        """Loss terms, summed by the training loop; a method changes `adapted` or `terms` instead."""
        batch = self.adapted(batch)
        encoding = backbone.encode(batch.prompts, self.word.placeholder)
        self.start_step(backbone, batch, encoding)
        return self.terms(backbone, batch, encoding)

    @property
    def masked(self) -> bool:
        """Whether the loss looks at masks: not, if the options have a `masked_loss` that is off."""
        return getattr(self.options, "masked_loss", True)

    def adapted(self, batch: Batch) -> Batch:
        """The batch that is trained on: here without masks, if the loss does not look at them."""
        return batch if self.masked else dataclasses.replace(batch, masks=None)

    def terms(self, backbone: Backbone, batch: Batch, encoding: Encoding) -> dict[str, Tensor]:
        """Loss terms of an adapted batch and its prompts' encodings: here the masked denoising error, `masked_mean`."""
        return {"denoising": masked_mean(self.error(backbone, batch, encoding), batch.masks)}

    def error(self, backbone: Backbone, batch: Batch, encoding: Encoding) -> Tensor:
        """`squared_error` (B, c, h, w), each sample times the weight of its diffusion step if the options have one:
        min-SNR-γ (Hang et al. 2023, arXiv 2303.09556), min(SNR, γ) for the error of the clean latents."""
        error, gamma = squared_error(backbone, batch, encoding), self.options.min_snr_gamma
        if gamma is None:
            return error
        snr = backbone.snr(batch.timesteps).float()
        weight = snr.clamp(max=gamma) / (snr + 1) if backbone.predicts_velocity else (gamma / snr).clamp(max=1)
        return error * weight.view(-1, 1, 1, 1)


def _hold(part: Any, method: Method) -> Callable[[], None]:
    """Have `part.save_pretrained` refuse until the function that is returned has been called for all methods: what it
    would write with something attached could not be loaded, or draws noise."""

    def refuse(*args: Any, **kwargs: Any) -> Any:
        raise EditError(
            "save_pretrained: a concept is attached, and what would be written could not be loaded again; expected "
            "detach() first (a concept is a file of its own: perfusion.concept.save_concept)"
        )

    holders = vars(part).setdefault("_perfusion_holders", set())
    holders.add(id(method))
    part.save_pretrained = refuse

    def release() -> None:
        holders.discard(id(method))
        if not holders:
            vars(part).pop("save_pretrained", None)

    return release


def squared_error(backbone: Backbone, batch: Batch, encoding: Encoding) -> Tensor:
    """(B, c, h, w), float32: of what the denoiser says of the batch's noisy latents, given its prompts' encodings."""
    noisy = backbone.add_noise(batch.latents, batch.noise, batch.timesteps)
    predicted = backbone.predict(noisy, batch.timesteps, encoding).float()
    return (predicted - target_of(backbone, batch).float()).square()


def target_of(backbone: Backbone, batch: Batch) -> Tensor:
    """(B, c, h, w): what the denoiser should say of the batch's noisy latents."""
    if batch.target is not None:
        return batch.target
    return backbone.target(batch.latents, batch.noise, batch.timesteps)


def masked_mean(error: Tensor, masks: Tensor | None) -> Tensor:
    """The mean of an error (B, c, h, w), a scalar.

    With soft masks (B, 1, h, w) each sample's error is weighted by its mask and divided by the mask's sum, so that
    small and large objects count the same.
    """
    if masks is None:
        return error.mean()
    weight = masks.expand_as(error)
    per_sample = (error * weight).flatten(1).sum(1) / weight.flatten(1).sum(1)
    return per_sample.mean()


def _norms(vectors: Tensor) -> Tensor:
    return vectors.detach().norm(dim=-1, keepdim=True)


def _check(options: MethodOptions) -> None:
    warmup, gamma = options.warmup_steps, options.min_snr_gamma
    bounds = {
        "warmup_steps": (0 <= warmup < max(1, options.steps), f"0 or more, and less than method.steps={options.steps}"),
        "min_snr_gamma": (gamma is None or 0 < gamma < math.inf, "more than 0, or null"),
    }
    check_bounds(options, bounds)


def check_bounds(options: MethodOptions, bounds: Mapping[str, tuple[bool, str]]) -> None:
    """Hold what options must hold: for each, whether it does, and what was expected. Raises ConfigError."""
    for key, (holds, expected) in bounds.items():
        if not holds:
            raise ConfigError(f"method.{key}: found {getattr(options, key)!r}, expected {expected}")


def available() -> list[str]:
    """Names of the methods in this package and in the folders of PERFUSION_METHODS."""
    return sorted(name for folder in methods.__path__ for name in modules_that_define("METHOD", Path(folder)))


def method_class(name: str) -> type[Method]:
    """The `METHOD` of `perfusion.methods.<name>`.

    Raises:
        ConfigError: no such method.
    """
    if name not in available():
        raise ConfigError(f"method.name: no method {name!r}; there are: {', '.join(available())}")
    return importlib.import_module(f"perfusion.methods.{name}").METHOD


def build(values: Mapping[str, Any], word: Word) -> Method:
    """The method that a `method` config group describes, with checked options."""
    cls = method_class(str(values.get("name")))
    return cls(checked(cls.Options, values, "method"), word)
