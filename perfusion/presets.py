"""What `backbone=<name>` means on a command line: a preset of conf/backbone, or a backbone by its own name."""

from __future__ import annotations

import dataclasses

from omegaconf import OmegaConf

from perfusion import backbones
from perfusion.config import CONF, BackboneConfig, ConfigError, checked

FOLDER = CONF / "backbone"


def backbone_config(
    name: str, path: str | None = None, dtype: str = "float32", device: str = "auto", layout: str | None = None
) -> BackboneConfig:
    """The config of the backbone or preset `name`, with another source, dtype and device.

    Raises:
        ConfigError: neither a backbone nor a preset.
    """
    presets = {file.stem: file for file in FOLDER.glob("*.yaml")}
    if name in presets:
        config = checked(BackboneConfig, OmegaConf.to_container(OmegaConf.load(presets[name])), "backbone")
    elif name in backbones.available():
        config = backbones.default_config(name)
    else:
        known = ", ".join(sorted({*presets, *backbones.available()}))
        raise ConfigError(f"backbone: no backbone {name!r}; there are: {known}")
    return dataclasses.replace(config, path=path or config.path, layout=layout, dtype=dtype, device=device)
