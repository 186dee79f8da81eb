"""Where a pipeline comes from, and what is said to the user when it cannot come from there."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import diffusers
import torch
import transformers
from diffusers import DiffusionPipeline, UNet2DConditionModel
from torch import nn
from transformers import PreTrainedTokenizerBase

from perfusion.backbones.base import BackboneError
from perfusion.backbones.layouts import layout_folder, pipeline_class
from perfusion.backbones.single_file import folder_tokenizer, layout_of, read_single_file
from perfusion.bars import without_loading_bars
from perfusion.config import BackboneConfig
from perfusion.files import first_line
from perfusion.hub import offline

P = TypeVar("P", bound=DiffusionPipeline)

DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}
_HUB_ID = re.compile(r"[\w-][\w.-]*/[\w-][\w.-]*")


@dataclass(frozen=True)
class Source:
    """A folder or a checkpoint in one file on this machine, or the id of a repository on the hub."""

    name: str
    local: bool
    layout: Path | None = None  # of a checkpoint in one file: the folder with its configs

    @property
    def local_files_only(self) -> bool:
        """What loaders are told: whether to ask the hub."""
        return self.local or offline()


def source(config: BackboneConfig, *expected: str) -> Source:
    """The source that `backbone.path` names; it must hold a diffusers pipeline of one of the classes `expected`.

    Raises:
        BackboneError: no path, no such folder or file, or another kind of either.
    """
    if not config.path:
        raise BackboneError(
            f"backbone.path: {config.name} ships no weights; give backbone.path=<folder, .safetensors file or hub id> "
            f"of a diffusers {' or '.join(expected)}"
        )
    path = Path(config.path).expanduser()
    if path.is_file():
        return Source(str(path), local=True, layout=_layout(path, config.layout, expected))
    if config.layout:
        raise BackboneError(
            f"backbone.layout: found {config.layout!r} beside backbone.path={config.path}, expected it only with a "
            "checkpoint in one file; a folder has its own configs"
        )
    if path.is_dir():
        _check_folder(path, expected)
        return Source(str(path), local=True)
    if _HUB_ID.fullmatch(config.path):
        return Source(config.path, local=False)
    raise BackboneError(
        f"backbone.path: no folder {config.path}; expected a diffusers folder, a .safetensors file or a hub id "
        "'owner/name'"
    )


def _layout(checkpoint: Path, layout: str | None, expected: Sequence[str]) -> Path:
    """The folder with the configs of a checkpoint in one file."""
    if checkpoint.suffix != ".safetensors":
        raise BackboneError(
            f"backbone.path: {checkpoint} is a file of type {checkpoint.suffix or 'unknown'!r}, expected .safetensors "
            "or a diffusers folder: .ckpt, .pt and .bin files are pickles, which can run code when they are read; a "
            "tool of your choice can convert one, where you trust it"
        )
    if layout is None:
        with reading(Source(str(checkpoint), local=True)):
            layout = layout_of(checkpoint)
    try:
        folder = layout_folder(layout)
        found = pipeline_class(folder)
    except (BackboneError, OSError, ValueError, AttributeError) as error:
        raise BackboneError(f"backbone.layout: {error}") from error
    if found not in expected:
        raise BackboneError(
            f"backbone.path: {checkpoint} is, by its layout {layout}, a {found}, expected a {' or '.join(expected)}; "
            "another backbone= may take it"
        )
    return folder


def read_pipeline(cls: type[P], origin: Source, dtype: torch.dtype, tokenizers: list[str], **parts: Any) -> P:
    """The pipeline of class `cls` at `origin`, in `dtype`; of safetensors only. `parts` are the pipeline's arguments.

    Raises:
        BackboneError: it cannot be read; the message says why.
    """
    with reading(origin), without_loading_bars() if origin.local else nullcontext():  # a download keeps its bars
        if origin.layout:
            pipe = read_single_file(cls, Path(origin.name), origin.layout, dtype, tokenizers, **parts)
        else:
            how: dict[str, Any] = {
                "dtype": dtype,
                "use_safetensors": True,
                "local_files_only": origin.local_files_only,
            }
            encoders = [name.replace("tokenizer", "text_encoder") for name in tokenizers]
            parts |= {name: _read_text_encoder(cls, origin, name, how) for name in encoders}
            pipe = cls.from_pretrained(origin.name, **how, **parts)
        for name in tokenizers:
            check_tokenizer(getattr(pipe, name))
        for name, part in pipe.components.items():  # diffusers only logs what it does not find
            if not isinstance(part, nn.Module):
                continue
            if lacking := [key for key, value in part.named_parameters() if value.is_meta]:
                raise OSError(_incomplete(name, lacking))
            for key, value in part.named_parameters():
                if not torch.stack(value.detach().aminmax()).isfinite().all():
                    raise OSError(f"the weights of its {name} hold NaN or infinity, first in {key}")
    return pipe


def _read_text_encoder(cls: type[P], origin: Source, name: str, how: Mapping[str, Any]) -> Any:
    """The text encoder `name`. Raises OSError if weights of it are missing, in whose place transformers puts noise."""
    index: Any = cls.load_config(origin.name, local_files_only=how["local_files_only"])
    encoder, report = _class(index[name]).from_pretrained(origin.name, subfolder=name, output_loading_info=True, **how)
    if report["missing_keys"]:
        raise OSError(_incomplete(name, sorted(report["missing_keys"])))
    return encoder


def _class(named: Sequence[str]) -> Any:
    """The class that model_index.json names by a library, or a pipeline of diffusers that has it, and its name."""
    library, name = named
    return getattr(transformers if library == "transformers" else getattr(diffusers.pipelines, library), name)


def _incomplete(part: str, lacking: Sequence[str]) -> str:
    more = f" and {len(lacking) - 1} more" if len(lacking) > 1 else ""
    return f"the weights of its {part} are not whole: they lack {lacking[0]}{more}"


def read_tokenizer(origin: Source, name: str) -> PreTrainedTokenizerBase:
    """The tokenizer `name` of the pipeline at `origin`, without its models. Raises BackboneError."""
    with reading(origin):
        if origin.layout:
            tokenizer = folder_tokenizer(origin.layout, name)
        else:
            how: dict[str, Any] = {"local_files_only": origin.local_files_only}
            index: Any = DiffusionPipeline.load_config(origin.name, **how)
            tokenizer = _class(index[name]).from_pretrained(origin.name, subfolder=name, **how)
        check_tokenizer(tokenizer)
    return tokenizer


def read_config(origin: Source, part: str) -> Mapping[str, Any]:
    """The config of a model of diffusers in the pipeline at `origin`, without weights. Raises BackboneError."""
    name, local = (str(origin.layout), True) if origin.layout else (origin.name, origin.local_files_only)
    with reading(origin):
        found = UNet2DConditionModel.load_config(name, subfolder=part, local_files_only=local)  # any model's
    assert isinstance(found, dict)
    return found


def _check_folder(folder: Path, expected: Sequence[str]) -> None:
    index = folder / "model_index.json"
    try:
        found = pipeline_class(folder)
    except FileNotFoundError:
        raise BackboneError(
            f"backbone.path: {folder} is not a diffusers pipeline: it holds no model_index.json"
        ) from None
    except Exception as error:
        raise BackboneError(f"backbone.path: cannot read {index}: {error}") from error
    if found not in expected:
        raise BackboneError(
            f"backbone.path: {folder} holds a {found}, expected a {' or '.join(expected)}{no_single_input(found)}"
        )


def kind_of(origin: Source) -> str:
    """The name of the class of the pipeline at `origin`. Raises BackboneError."""
    if origin.layout:
        return pipeline_class(origin.layout)
    with reading(origin):
        index: Any = DiffusionPipeline.load_config(origin.name, local_files_only=origin.local_files_only)
    return index["_class_name"]


@contextmanager
def reading(origin: Source) -> Iterator[None]:
    """Turn what diffusers, transformers and the hub raise into one BackboneError that names the source."""
    try:
        yield
    except BackboneError:  # says it already
        raise
    except Exception as error:  # whatever a library makes of files that are not what it expects
        reason = first_line(error)
        if origin.local:
            raise BackboneError(f"backbone.path: cannot load {origin.name}: {reason}") from error
        gave = "cannot be reached" if offline() else f"did not give it ({reason})"
        raise BackboneError(
            f"backbone.path: {origin.name} is no folder here, and the hub {gave}. Expected a diffusers "
            "folder, or a hub id that can be reached or lies in the hub's cache, with safetensors weights"
        ) from error


def check_tokenizer(tokenizer: PreTrainedTokenizerBase) -> None:
    """Raise OSError if it has no words: transformers makes an empty tokenizer where the files of one are missing."""
    if tokenizer.vocab_size <= len(tokenizer.all_special_ids):
        raise OSError("its tokenizer has no vocabulary: are vocab.json and merges.txt, or tokenizer.json, there?")


_JOINT = ("StableDiffusion3", "Flux", "QwenImage", "ZImage", "AuraFlow", "HunyuanImage", "CogView", "Lumina", "HiDream")


def no_single_input(pipeline: str) -> str:
    """Why a concept cannot be put into a pipeline of this class, as the end of a sentence; empty where it might be."""
    if not pipeline.startswith(_JOINT):
        return ""
    return (
        ": its text changes from block to block (joint attention of text and picture), so no single i* stands for a "
        "concept in all of them"
    )


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
        there = has[device.type]
    except (RuntimeError, KeyError) as error:
        raise BackboneError(f"backbone.device: found {name!r}, expected auto, cuda, cuda:1, mps or cpu") from error
    if not there:
        raise BackboneError(f"backbone.device: found {name!r}, but torch sees no {device.type} device here")
    return device
