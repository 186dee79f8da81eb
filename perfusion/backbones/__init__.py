"""Frozen text-to-image models behind one seam (`base.py`).

A backbone is one file `perfusion/backbones/<name>.py` that defines `BACKBONE` (a subclass of `Backbone`, with the class
methods `defaults`, `fits`, `check_words` and `check_covariance` beside the seam's), and one preset in `conf/backbone/`.
"""

from __future__ import annotations

import dataclasses
import importlib
import weakref
from pathlib import Path
from typing import TYPE_CHECKING, Any

from perfusion.backbones.base import Backbone, BackboneError
from perfusion.config import BackboneConfig, ConfigError
from perfusion.registry import modules_that_define

if TYPE_CHECKING:
    from diffusers import DiffusionPipeline, StableDiffusionPipeline, StableDiffusionXLPipeline

# How a pipeline was loaded, for as long as it lives: wrapped again, it is the same backbone.
_configs: weakref.WeakKeyDictionary[DiffusionPipeline, BackboneConfig] = weakref.WeakKeyDictionary()


def available() -> list[str]:
    """Names of the backbones in this package."""
    return [*modules_that_define("BACKBONE", Path(__file__).parent)]


def backbone_class(name: str) -> type[Backbone]:
    """The `BACKBONE` of `perfusion.backbones.<name>`.

    Raises:
        ConfigError: no such backbone.
    """
    return _backbone(name)


def default_config(name: str) -> BackboneConfig:
    """The config that a pipeline of the backbone `name` gets where none is given. Raises ConfigError."""
    return _backbone(name).defaults()


def check_words(config: BackboneConfig, placeholder: str, superclass: str) -> None:
    """`Backbone.check_token` before any model is loaded: only tokenizers are read.

    Raises:
        ConfigError: no such backbone.
        BackboneError: no tokenizer where `config` says.
        TokenError: the placeholder is a word already, or either word cannot be used.
    """
    _backbone(config.name).check_words(config, placeholder, superclass)


def check_covariance(config: BackboneConfig) -> None:
    """Hold that `backbone.covariance` can be used, before any model is loaded.

    Raises:
        ConfigError: no such backbone, captions or selection of positions.
        CovarianceError: a matrix that cannot be read, or not be used with this model.
        BackboneError: no model where `config` says.
    """
    _backbone(config.name).check_covariance(config)


def load(config: BackboneConfig) -> StableDiffusionPipeline | StableDiffusionXLPipeline:
    """The frozen, stock diffusers pipeline that `config` describes; wrapped later, it has this config again.

    Raises:
        ConfigError: no such backbone.
        BackboneError: it cannot be loaded; the message says why.
    """
    loaded = _backbone(config.name).load(config)
    _configs[loaded.pipe] = config
    return loaded.pipe


def around(pipe: DiffusionPipeline, config: BackboneConfig | None = None) -> Backbone:
    """The backbone of a pipeline that is loaded already; nothing in it is changed.

    Args:
        config: default: the one that `load` used for this pipeline, else the defaults of the backbone that fits it
            best, at the resolution that its UNet was made for.

    Raises:
        ConfigError: `config` names no backbone.
        BackboneError: no backbone fits the pipeline.
    """
    config = config or _configs.get(pipe) or _guessed(pipe)
    return _backbone(config.name).around(pipe, config)


def _backbone(name: str) -> Any:
    if name not in available():
        raise ConfigError(f"backbone.name: no backbone {name!r}; there are: {', '.join(available())}")
    return importlib.import_module(f"perfusion.backbones.{name}").BACKBONE


def _guessed(pipe: DiffusionPipeline) -> BackboneConfig:
    fitting = [cls for cls in map(_backbone, available()) if cls.fits(pipe)]
    if not fitting:
        raise BackboneError(f"no backbone fits a {type(pipe).__name__}; there are: {', '.join(available())}")
    special = max(fitting, key=lambda cls: len(cls.__mro__))  # Toyland is a Stable Diffusion, but not the reverse
    return dataclasses.replace(special.defaults(), resolution=resolution_of(pipe))


def resolution_of(pipe: DiffusionPipeline) -> int:
    """Side in pixels of the pictures that a pipeline is made for."""
    config: Any = pipe.unet.config  # type: ignore[attr-defined]
    size = config.sample_size if isinstance(config.sample_size, int) else min(config.sample_size)
    return int(size * pipe.vae_scale_factor)  # type: ignore[attr-defined]


__all__ = [
    "Backbone",
    "BackboneError",
    "around",
    "available",
    "backbone_class",
    "check_covariance",
    "check_words",
    "default_config",
    "load",
    "resolution_of",
]
