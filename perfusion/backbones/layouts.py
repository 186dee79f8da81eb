"""Architectures without weights: the public configs of known models, and how a folder of configs becomes a pipeline on
the meta device, to count and measure.

`layouts/<name>/` is a folder in diffusers' format with the configs as their publishers ship them, but without
weights and vocabulary (see `single_file.clip_tokenizer`).
"""

from __future__ import annotations

import importlib
import inspect
import json
from pathlib import Path
from typing import Any

import diffusers
import torch
from diffusers import DiffusionPipeline

from perfusion.backbones.base import BackboneError

_FOLDER = Path(__file__).with_name("layouts")
_LIBRARIES = ("diffusers", "transformers")  # whose classes a model_index.json may name
_PIPELINES = ("kolors",)  # pipelines of diffusers that have text encoders of their own
_CONFIGS = {"scheduler": "scheduler_config.json"}  # else config.json


def available_layouts() -> list[str]:
    """Names of the known layouts."""
    return sorted(path.name for path in _FOLDER.iterdir() if path.is_dir())


def layout_folder(layout: str) -> Path:
    """The folder of a known layout, or the folder in diffusers' format that `layout` names itself.

    Raises:
        BackboneError: neither.
    """
    if layout in available_layouts():
        return _FOLDER / layout
    folder = Path(layout).expanduser()
    if (folder / "model_index.json").is_file():
        return folder
    raise BackboneError(f"no layout {layout!r}; there are: {', '.join(available_layouts())}, or a diffusers folder")


def layout_config(layout: str, part: str) -> dict[str, Any]:
    """The config of `part` (`unet`, `text_encoder`, `vae`, `scheduler`, ...) in `layout`.

    Raises:
        BackboneError: no such layout.
    """
    file = layout_folder(layout) / part / _CONFIGS.get(part, "config.json")
    return json.loads(file.read_text(encoding="utf-8"))


def pipeline_class(folder: Path) -> str:
    """The name of the pipeline's class that a folder's model_index.json gives."""
    return str(json.loads((folder / "model_index.json").read_text(encoding="utf-8")).get("_class_name"))


def meta_pipeline(layout: str) -> DiffusionPipeline:
    """`untrained_pipeline` on the meta device: every shape, no memory; a backbone around it can be measured."""
    return untrained_pipeline(layout, torch.device("meta"))


def untrained_pipeline(layout: str, device: torch.device) -> DiffusionPipeline:
    """The whole pipeline of a layout, or of a diffusers folder's configs, on `device` with random weights, float32.

    It has neither tokenizers nor a safety checker.

    Raises:
        BackboneError: no such layout, or a part of a class that is not diffusers' or transformers'.
        OSError, ValueError: a config that is not there or cannot be read.
    """
    folder = layout_folder(layout)
    index = json.loads((folder / "model_index.json").read_text(encoding="utf-8"))
    cls: Any = getattr(diffusers, pipeline_class(folder), None)
    if cls is None:
        raise BackboneError(f"{folder}: found a pipeline {pipeline_class(folder)!r}, which diffusers does not have")
    expected, optional = DiffusionPipeline._get_signature_keys(cls)
    parts: dict[str, Any] = dict.fromkeys(expected)
    for name in expected:
        library, kind = index.get(name) or ("", "")
        if kind and name.startswith(("scheduler", "vae", "unet", "transformer", "text_encoder")):
            parts[name] = _part(folder, name, library, kind, device)
    settings = {key: value for key, value in index.items() if key in optional}
    if "requires_safety_checker" in optional:
        settings["requires_safety_checker"] = False
    return cls(**parts, **settings)


def _part(folder: Path, name: str, library: str, kind: str, device: torch.device) -> Any:
    where = library if library in _LIBRARIES else f"diffusers.pipelines.{library}"
    cls: Any = getattr(importlib.import_module(where), kind, None) if library in (*_LIBRARIES, *_PIPELINES) else None
    if cls is None:
        raise BackboneError(f"{folder}: found {name} of {library}.{kind}, expected a class of {', '.join(_LIBRARIES)}")
    if name == "scheduler":  # it computes with what it holds, which the meta device has not
        return cls.from_config(cls.load_config(folder, subfolder=name))
    with device:
        if hasattr(cls, "config_class"):  # transformers
            # ChatGLM would put itself into memory, whatever the device.
            more = {"empty_init": False} if "empty_init" in inspect.signature(cls.__init__).parameters else {}
            return cls(cls.config_class.from_pretrained(folder, subfolder=name), **more).eval()
        return cls.from_config(cls.load_config(folder, subfolder=name))
