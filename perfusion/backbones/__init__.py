"""Frozen text-to-image models behind one seam (`base.py`): which there are, what their presets say, how one is loaded.

A backbone is one file `perfusion/backbones/<name>.py` that defines `BACKBONE` (a subclass of `Backbone`), and one
preset in `conf/backbone/`.
"""

from __future__ import annotations

import dataclasses
import importlib
import weakref
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from omegaconf import OmegaConf

from perfusion.backbones.base import Backbone, BackboneError
from perfusion.backbones.loading import no_single_input
from perfusion.config import CONF, BackboneConfig, ConfigError, checked
from perfusion.registry import modules_that_define

if TYPE_CHECKING:
    from diffusers import DiffusionPipeline, StableDiffusionPipeline, StableDiffusionXLPipeline

PRESETS = CONF / "backbone"
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
    if name not in available():
        raise ConfigError(f"backbone.name: no backbone {name!r}; there are: {', '.join(available())}")
    return importlib.import_module(f"perfusion.backbones.{name}").BACKBONE


def default_config(name: str) -> BackboneConfig:
    """The config that a pipeline of the backbone `name` gets where none is given. Raises ConfigError."""
    return backbone_class(name).defaults()


def backbone_config(
    name: str, path: str | None = None, dtype: str = "float32", device: str = "auto", layout: str | None = None
) -> BackboneConfig:
    """The config of the preset `name` of conf/backbone, or of the backbone of this name, with another source, dtype and
    device.

    Raises:
        ConfigError: neither a backbone nor a preset.
    """
    presets = [file.stem for file in PRESETS.glob("*.yaml")]
    if name in presets:
        config = checked(BackboneConfig, OmegaConf.to_container(_preset(name)), "backbone")
    elif name in available():
        config = default_config(name)
    else:
        known = ", ".join(sorted({*presets, *available()}))
        raise ConfigError(f"backbone: no backbone {name!r}; there are: {known}")
    return dataclasses.replace(config, path=path or config.path, layout=layout, dtype=dtype, device=device)


def _preset(name: str) -> Any:
    """The values of a preset, over those of the presets that its `defaults` name, as Hydra composes them."""
    values: Any = OmegaConf.load(PRESETS / f"{name}.yaml")
    below = [other for other in values.pop("defaults", []) if other != "_self_"]
    return OmegaConf.merge(*map(_preset, below), values)


class ModelOptions(Protocol):
    """What the options of a command say of its backbone."""

    backbone: str | None  # a preset or a backbone
    path: str | None
    layout: str | None
    dtype: str
    device: str


def chosen(options: ModelOptions, default: str) -> BackboneConfig:
    """The config of the backbone that a command's options name, `default` where they name none. Raises ConfigError."""
    name = options.backbone or default
    return backbone_config(name, options.path, options.dtype, options.device, options.layout)


def load_backbone(options: ModelOptions, default: str) -> Backbone:
    """The backbone that a command's options name; where they name none, `default`, drawing in the size that the weights
    are made for: that differs within a family (SD 1.x, SD 2.x).

    Raises:
        ConfigError: neither a backbone nor a preset.
        BackboneError: it cannot be loaded; the message says why.
    """
    config = chosen(options, default)
    loaded = backbone_class(config.name).load(config)
    if options.backbone:
        return loaded
    return around(loaded.pipe, dataclasses.replace(config, resolution=resolution_of(loaded.pipe)))


def load(
    backbone: str = "toyland",
    path: str | None = None,
    dtype: str = "float32",
    device: str = "auto",
    layout: str | None = None,
) -> StableDiffusionPipeline | StableDiffusionXLPipeline:
    """A frozen, stock diffusers pipeline, ready for `Concept.attach`.

    Args:
        backbone: `toyland`; or `sd15`, `sd21`, `sdxl` with a `path`: a preset, or a backbone by its own name.
        path: diffusers folder, .safetensors file or hub id; None: the weights that the backbone ships.
        dtype: float32, float16 or bfloat16.
        device: auto (cuda, then mps, then cpu), or a torch device.
        layout: of a .safetensors file: the known layout, or the diffusers folder, that has its configs; None: as the
            file looks.

    Raises:
        ConfigError: neither a backbone nor a preset.
        BackboneError: it cannot be loaded; the message says why.
    """
    config = backbone_config(backbone, path, dtype, device, layout)
    pipe: Any = backbone_class(config.name).load(config).pipe
    _configs[pipe] = config
    return pipe


def around(pipe: DiffusionPipeline, config: BackboneConfig | None = None) -> Backbone:
    """The backbone of a pipeline that is loaded already; nothing in it is changed.

    Args:
        config: default: the one that `load` used for this pipeline, else the defaults of the backbone that fits it
            best, at the resolution that its denoiser was made for.

    Raises:
        ConfigError: `config` names no backbone.
        BackboneError: no backbone fits the pipeline.
    """
    config = config or _configs.get(pipe) or _guessed(pipe)
    return backbone_class(config.name).around(pipe, config)


def _guessed(pipe: DiffusionPipeline) -> BackboneConfig:
    fitting = [cls for cls in map(backbone_class, available()) if cls.fits(pipe)]
    if not fitting:
        kind = type(pipe).__name__
        why = no_single_input(kind)
        raise BackboneError(f"no backbone fits a {kind}{why}; there are: {', '.join(available())}")
    special = max(fitting, key=lambda cls: len(cls.__mro__))  # Toyland is a Stable Diffusion, but not the reverse
    return dataclasses.replace(special.defaults(), resolution=resolution_of(pipe))


def resolution_of(pipe: DiffusionPipeline) -> int:
    """Side in pixels of the pictures that a pipeline is made for."""
    parts = pipe.components
    config: Any = parts["unet" if "unet" in parts else "transformer"].config
    size = config.sample_size if isinstance(config.sample_size, int) else min(config.sample_size)
    return int(size * pipe.vae_scale_factor)  # type: ignore[attr-defined]
