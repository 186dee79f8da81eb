"""A pipeline as a folder that stock diffusers loads, whatever is attached to it."""

from __future__ import annotations

import copy
import os
import tempfile
from pathlib import Path
from typing import Any

import torch
from diffusers import DiffusionPipeline
from torch import nn

from perfusion.backbones.fingerprint import base_parameters
from perfusion.editing.places import base_module
from perfusion.editing.words import Words
from perfusion.files import atomic_path

_INDEX = "model_index.json"


def save_pipeline(pipe: DiffusionPipeline, folder: Path, half: nn.Module | None = None) -> list[Path]:
    """Write `pipe` into `folder`, made where it is missing: safetensors, each file atomically, the index last.

    Added words, edits and adapters are left out; weights are those that the modules have now. Files of `folder` that
    are not the pipeline's stay.

    Args:
        half: model of diffusers in the pipeline whose weights are written in float16; the others keep their type.
            (Stock loading makes diffusers' models float32 again, but leaves text encoders as they lie there.)

    Returns:
        The files.
    """
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder.parent, prefix=f".{folder.name}.", suffix=".tmp") as temporary:
        made = Path(temporary)
        for name, part in pipe.components.items():
            if part is None:
                continue
            if isinstance(part, nn.Module):
                part = _plain(part, half=half is not None and base_module(part) is base_module(half))
            elif (tokenizer := _stock_tokenizer(pipe, name)) is not None:
                part = tokenizer
            part.save_pretrained(made / name)
        pipe.save_config(made)
        files = sorted(path.relative_to(made) for path in made.rglob("*") if path.is_file())
        files.sort(key=lambda file: file.name == _INDEX)  # last: a folder with an index is whole
        for file in files:
            (folder / file).parent.mkdir(exist_ok=True)
            with atomic_path(folder / file) as target:
                os.replace(made / file, target)
    return [folder / file for file in files]


def _plain(module: nn.Module, half: bool) -> Any:
    """A model with the weights of `module` that has nothing around its parts; itself if that is what it is."""
    stock: Any = base_module(module)
    weights = dict(base_parameters(stock))
    if not half and weights.keys() == dict(stock.named_parameters()).keys():
        return stock
    if half:
        weights = {name: value.half() for name, value in weights.items()}
    with torch.device("meta"):
        if hasattr(stock, "from_config"):  # diffusers
            empty = type(stock).from_config(stock.config)
        else:  # transformers, which writes into the config that it saves
            empty = type(stock)(copy.deepcopy(stock.config))
    empty.load_state_dict(weights, assign=True)
    return empty


def _stock_tokenizer(pipe: DiffusionPipeline, name: str) -> Any:
    """The tokenizer that stood in the place `name` before words were added; None if there are none."""
    encoder: Any = getattr(pipe, name.replace("tokenizer", "text_encoder"), None) if "tokenizer" in name else None
    table = encoder.get_input_embeddings() if encoder is not None else None
    return table.stock_tokenizer if isinstance(table, Words) else None
