"""Where a pipeline comes from, and what is said to the user when it cannot come from there."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError
from transformers import PreTrainedTokenizerBase

from perfusion.backbones.base import BackboneError
from perfusion.config import BackboneConfig

DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}
_HUB_ID = re.compile(r"[\w-][\w.-]*/[\w-][\w.-]*")


@dataclass(frozen=True)
class Source:
    """What `from_pretrained` takes: a folder on this machine, or the id of a repository on the hub."""

    name: str
    local: bool


def source(config: BackboneConfig, pipeline_class: str) -> Source:
    """The source that `backbone.path` names; a folder must hold a diffusers pipeline of class `pipeline_class`.

    Raises:
        BackboneError: no path, no such folder, or another kind of folder or file.
    """
    if not config.path:
        raise BackboneError(
            f"backbone.path: {config.name} ships no weights; give backbone.path=<folder or hub id> of a diffusers "
            f"{pipeline_class}"
        )
    folder = Path(config.path).expanduser()
    if folder.is_dir():
        _check_folder(folder, pipeline_class)
        return Source(str(folder), local=True)
    if folder.exists():
        raise BackboneError(
            f"backbone.path: {config.path} is a file, expected a folder in diffusers' format (model_index.json and one "
            "folder for each part); diffusers' from_single_file and save_pretrained make one from a checkpoint"
        )
    if _HUB_ID.fullmatch(config.path):
        return Source(config.path, local=False)
    raise BackboneError(f"backbone.path: no folder {config.path}; expected a diffusers folder or a hub id 'owner/name'")


def _check_folder(folder: Path, pipeline_class: str) -> None:
    index = folder / "model_index.json"
    try:
        found = json.loads(index.read_text(encoding="utf-8")).get("_class_name")
    except FileNotFoundError:
        raise BackboneError(
            f"backbone.path: {folder} is not a diffusers pipeline: it holds no model_index.json"
        ) from None
    except (OSError, ValueError, AttributeError) as error:
        raise BackboneError(f"backbone.path: cannot read {index}: {error}") from error
    if found != pipeline_class:
        raise BackboneError(f"backbone.path: {folder} holds a {found}, expected a {pipeline_class}")


@contextmanager
def reading(origin: Source) -> Iterator[None]:
    """Turn what diffusers, transformers and the hub raise into one BackboneError that names the source."""
    try:
        yield
    except (OSError, ValueError, RuntimeError, SafetensorError) as error:
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        if origin.local:
            raise BackboneError(f"backbone.path: cannot load {origin.name}: {reason}") from error
        raise BackboneError(
            f"backbone.path: {origin.name} is no folder here, and the hub did not give it ({reason}). Expected a "
            "diffusers folder, or a hub id that can be reached or lies in the hub's cache, with safetensors weights"
        ) from error


def check_tokenizer(tokenizer: PreTrainedTokenizerBase) -> None:
    """Raise OSError if it has no words: transformers makes an empty tokenizer where the files of one are missing."""
    if tokenizer.vocab_size <= len(tokenizer.all_special_ids):
        raise OSError("its tokenizer has no vocabulary: are vocab.json and merges.txt, or tokenizer.json, there?")


def resolve_dtype(name: str) -> torch.dtype:
    """The torch dtype of `backbone.dtype`. Raises BackboneError."""
    if name not in DTYPES:
        raise BackboneError(f"backbone.dtype: found {name!r}, expected one of {', '.join(DTYPES)}")
    return DTYPES[name]


def resolve_device(name: str) -> torch.device:
    """The device of `backbone.device`; `auto` is cuda, then mps, then cpu. Raises BackboneError."""
    has = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available(), "cpu": True}
    if name == "auto":
        return torch.device(next(kind for kind, there in has.items() if there))
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise BackboneError(f"backbone.device: found {name!r}, expected auto, cuda, cuda:1, mps or cpu") from error
    if not has.get(device.type, True):
        raise BackboneError(f"backbone.device: found {name!r}, but torch sees no {device.type} device here")
    return device
