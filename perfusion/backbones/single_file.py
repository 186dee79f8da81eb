"""Checkpoints in one safetensors file, as Stable Diffusion is handed about besides diffusers' folders.

Such a file holds weights alone. The configs come from a layout (`perfusion.backbones.layouts`), which its tensors tell
or `backbone.layout` names, and the tokenizers from the layout's folder or, being CLIP's, from the open_clip package. So
nothing is asked of a hub.
"""

from __future__ import annotations

import gzip
import importlib.util
import json
import warnings
from pathlib import Path
from typing import Any, TypeVar

import torch
from diffusers import DiffusionPipeline
from diffusers.loaders.single_file_model import SINGLE_FILE_LOADABLE_CLASSES
from safetensors import safe_open
from torch import nn
from transformers import CLIPTokenizer

from perfusion.backbones.base import BackboneError
from perfusion.backbones.layouts import available_layouts, layout_config, layout_folder, meta_pipeline
from perfusion.toyland.tokenizer import END, START, byte_alphabet

P = TypeVar("P", bound=DiffusionPipeline)

_VOCABULARIES = ("vocab.json", "tokenizer.json")
_UNET = "model.diffusion_model."  # what the names of a checkpoint's UNet begin with
_MERGES = 49_408 - 2 * 256 - 2  # of CLIP's vocabulary: what is neither a byte, in its two forms, nor a special token
_VOCABULARY = "bpe_simple_vocab_16e6.txt.gz"
_POSITIONS = 77


def read_single_file(
    cls: type[P], checkpoint: Path, layout: Path, dtype: torch.dtype, tokenizers: list[str], **parts: Any
) -> P:
    """The pipeline of class `cls` in a checkpoint, with the configs of the folder `layout`.

    Args:
        tokenizers: names of its tokenizers.
        parts: further arguments of the pipeline.

    Raises:
        BackboneError: weights are missing, or a tokenizer.
        SingleFileComponentError, OSError, ValueError, RuntimeError, SafetensorError: what diffusers could not read.
    """
    found: Any = {name: folder_tokenizer(layout, name) for name in tokenizers}
    loader: Any = cls  # not every DiffusionPipeline has from_single_file
    try:
        pipe = loader.from_single_file(
            str(checkpoint), config=str(layout), torch_dtype=dtype, local_files_only=True, **found, **parts
        )
    except NotImplementedError as error:  # torch, asked to move weights that got no values
        raise _not_whole(checkpoint, layout, _missing_in(checkpoint, layout)) from error
    if missing := _without_values(pipe):
        raise _not_whole(checkpoint, layout, missing)
    with safe_open(checkpoint, framework="pt") as file:
        marks = {"v_pred", "ztsnr"} & set(file.keys())  # how fine-tuned SDXL checkpoints say what they predict
    if "v_pred" in marks:
        settings = {"prediction_type": "v_prediction", "rescale_betas_zero_snr": "ztsnr" in marks}
        pipe.scheduler = type(pipe.scheduler).from_config({**pipe.scheduler.config, **settings})
    return pipe


def _not_whole(checkpoint: Path, layout: Path, missing: str) -> BackboneError:
    return BackboneError(
        f"backbone.path: {checkpoint} lacks some of its weights, first {missing} (as diffusers names it), expected a "
        f"whole checkpoint of the layout {layout.name}"
    )


def _without_values(pipe: DiffusionPipeline) -> str | None:
    """The first weight of a loaded pipeline that the checkpoint did not have, `<part>.<name>`."""
    for part, model in pipe.components.items():
        if isinstance(model, nn.Module):
            for name, weight in model.named_parameters():
                if weight.is_meta:
                    return f"{part}.{name}"
    return None


def _missing_in(checkpoint: Path, layout: Path) -> str:
    """The first weight of UNet or autoencoder that the checkpoint has not, found without reading any."""
    with safe_open(checkpoint, framework="pt") as file:
        there = {name: torch.empty(file.get_slice(name).get_shape(), device="meta") for name in file.keys()}  # noqa: SIM118
    whole: Any = meta_pipeline(str(layout))
    for part in ("unet", "vae"):
        model = getattr(whole, part)
        convert: Any = SINGLE_FILE_LOADABLE_CLASSES[type(model).__name__]["checkpoint_mapping_fn"]
        try:
            found = convert(config=dict(model.config), checkpoint=dict(there))
        except KeyError as error:
            return str(error.args[0])
        for name, _ in model.named_parameters():
            if name not in found:
                return f"{part}.{name}"
    return "one that it is not known by name"


def layout_of(checkpoint: Path) -> str:
    """The known layout of a checkpoint in one file, by the names and shapes in its header; no weights are read.

    Raises:
        BackboneError: none of them: what it is instead, as far as can be told.
        SafetensorError, OSError: not readable.
    """
    with safe_open(checkpoint, framework="pt") as file:
        names = set(file.keys())
        unet = sorted(name for name in names if name.startswith(_UNET))
        contexts = [name for name in unet if name.endswith("attn2.to_k.weight")]
        width = file.get_slice(contexts[0]).get_shape()[1] if contexts else None
        entry = f"{_UNET}input_blocks.0.0.weight"
        channels = file.get_slice(entry).get_shape()[1] if entry in names else 4
    if not contexts:
        raise BackboneError(
            f"backbone.path: {checkpoint} holds no UNet of Stable Diffusion ({_UNET}...): is it a LoRA, an autoencoder "
            "or another model? Expected a whole checkpoint"
        )
    if channels != 4:
        raise BackboneError(
            f"backbone.path: {checkpoint} holds a UNet with {channels} input channels (inpainting or the like), "
            "expected 4, a text-to-image model"
        )
    known: dict[int, list[str]] = {}
    for name in available_layouts():
        if not (layout_folder(name) / "tokenizer").is_dir():
            continue  # its vocabulary is not CLIP's, so a file alone would not be enough
        known.setdefault(int(layout_config(name, "unet")["cross_attention_dim"]), []).append(name)
    if width not in known:
        wanted = ", ".join(f"{d} ({' or '.join(names)})" for d, names in sorted(known.items()))
        raise BackboneError(
            f"backbone.path: {checkpoint} holds a UNet that reads texts of width {width}, expected one of {wanted}; "
            "for another architecture give backbone.layout=<diffusers folder with its configs>"
        )
    first, *others = known[width]
    if others:
        warnings.warn(
            f"{checkpoint}: the file does not say whether it predicts noise or velocity; it is taken for {first}. "
            f"backbone.layout={' or '.join(known[width])} says it",
            stacklevel=2,
        )
    return first


def folder_tokenizer(folder: Path, name: str) -> CLIPTokenizer:
    """The tokenizer `name` of a folder in diffusers' format: its own, or CLIP's where it has but the settings of one.

    Raises:
        BackboneError: the folder has no such tokenizer, or no vocabulary is at hand.
        OSError, ValueError: it cannot be read.
    """
    if any((folder / name / file).is_file() for file in _VOCABULARIES):
        return CLIPTokenizer.from_pretrained(str(folder), subfolder=name, local_files_only=True)
    settings = folder / name / "tokenizer_config.json"
    if not settings.is_file():
        raise BackboneError(
            f"backbone.layout: found no {name} in {folder}, expected {name}/vocab.json and {name}/merges.txt"
        )
    return clip_tokenizer(json.loads(settings.read_text(encoding="utf-8")).get("pad_token", END))


def clip_tokenizer(pad_token: str) -> CLIPTokenizer:
    """CLIP's tokenizer, 49,408 tokens, made from the file of merges that the open_clip package carries.

    All of Stable Diffusion 1.x, 2.x and XL read text with it; they differ in the padding alone.

    Raises:
        BackboneError: open_clip is not there, or without the file.
    """
    spec = importlib.util.find_spec("open_clip")  # finds it without the seconds of importing it
    homes = [Path(place) for place in (spec.submodule_search_locations or [])] if spec else []
    file = next((home / _VOCABULARY for home in homes if (home / _VOCABULARY).is_file()), None)
    if file is None:
        raise BackboneError(
            "backbone.layout: a checkpoint in one file holds no tokenizer, and CLIP's vocabulary is not in the "
            "open_clip package here; give backbone.layout=<diffusers folder> with tokenizer/vocab.json and "
            "tokenizer/merges.txt of the model"
        )
    lines = gzip.decompress(file.read_bytes()).decode("utf-8").split("\n")
    merges = [tuple(line.split()) for line in lines[1 : 1 + _MERGES]]  # the first line names the version
    alphabet = byte_alphabet()
    tokens = [*alphabet, *(character + "</w>" for character in alphabet), *map("".join, merges), START, END]
    vocabulary = {token: i for i, token in enumerate(tokens)}
    return CLIPTokenizer(
        vocab=vocabulary,
        merges=merges,  # type: ignore[arg-type]
        pad_token=pad_token,
        model_max_length=_POSITIONS,
    )
