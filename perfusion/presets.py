"""What `backbone=<name>` means on a command line: a preset of conf/backbone, or a backbone by its own name."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, Protocol

from omegaconf import OmegaConf

from perfusion import backbones
from perfusion.config import CONF, BackboneConfig, ConfigError, checked

if TYPE_CHECKING:
    from diffusers import StableDiffusionPipeline, StableDiffusionXLPipeline

    from perfusion.backbones import Backbone

FOLDER = CONF / "backbone"


def backbone_config(
    name: str, path: str | None = None, dtype: str = "float32", device: str = "auto", layout: str | None = None
) -> BackboneConfig:
    """The config of the backbone or preset `name`, with another source, dtype and device.

    Raises:
        ConfigError: neither a backbone nor a preset.
    """
    presets = [file.stem for file in FOLDER.glob("*.yaml")]
    if name in presets:
        config = checked(BackboneConfig, OmegaConf.to_container(_preset(name)), "backbone")
    elif name in backbones.available():
        config = backbones.default_config(name)
    else:
        known = ", ".join(sorted({*presets, *backbones.available()}))
        raise ConfigError(f"backbone: no backbone {name!r}; there are: {known}")
    return dataclasses.replace(config, path=path or config.path, layout=layout, dtype=dtype, device=device)


def _preset(name: str) -> Any:
    """The values of a preset, over those of the presets that its `defaults` name, as Hydra composes them."""
    values: Any = OmegaConf.load(FOLDER / f"{name}.yaml")
    below = [other for other in values.pop("defaults", []) if other != "_self_"]
    return OmegaConf.merge(*map(_preset, below), values)


class ModelOptions(Protocol):
    """What the options of a command say of the backbone that a concept is put into."""

    backbone: str | None  # None: the kind that the concept was trained on
    path: str | None
    layout: str | None
    dtype: str
    device: str


def load_for(fingerprint: Mapping[str, str], options: ModelOptions) -> Backbone:
    """A backbone for a concept with this fingerprint, of the kind that it was trained on unless the options say else;
    then it draws in the size that the weights are made for, which the kind alone (SD 1.x, SD 2.x) does not tell.

    Raises:
        ConfigError: neither a backbone nor a preset.
        BackboneError: it cannot be loaded; the message says why.
    """
    name = options.backbone or fingerprint.get("family", "toyland")
    config = backbone_config(name, options.path, options.dtype, options.device, options.layout)
    loaded = backbones.backbone_class(config.name).load(config)
    if options.backbone:
        return loaded
    return backbones.around(loaded.pipe, dataclasses.replace(config, resolution=backbones.resolution_of(loaded.pipe)))


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
    return backbones.load(backbone_config(backbone, path, dtype, device, layout))
