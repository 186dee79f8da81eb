"""What others made for the same model, put into a pipeline by the loaders of diffusers: LoRAs, textual inversions, and
schedulers. Concepts are attached afterwards."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import diffusers
from safetensors import SafetensorError, safe_open

from perfusion.config import ConfigError
from perfusion.files import first_line

SCHEDULERS = {
    "ddim": "DDIMScheduler",
    "dpm++": "DPMSolverMultistepScheduler",
    "unipc": "UniPCMultistepScheduler",
    "euler": "EulerDiscreteScheduler",
}
_OF_FLOWS = ("dpm++", "unipc")
_A1111 = "emb_params"  # the one tensor in an embedding of that program; its file's name is the word
_XL = {"clip_l": "", "clip_g": "_2"}  # the two tensors of an embedding for SDXL: which text encoder reads them


def set_scheduler(pipe: Any, name: str) -> None:
    """Have the pipeline denoise by one of `SCHEDULERS`, with the noise levels that it has. Raises ConfigError."""
    if name not in SCHEDULERS:
        raise ConfigError(f"scheduler: found {name!r}, expected one of {', '.join(SCHEDULERS)}")
    prediction = pipe.scheduler.config.get("prediction_type", "flow_prediction")  # those of flows alone do not say so
    if prediction == "flow_prediction" and name not in _OF_FLOWS:
        raise ConfigError(
            f"scheduler: found {name!r}, expected {' or '.join(_OF_FLOWS)}: this model was trained on flows"
        )
    pipe.scheduler = getattr(diffusers, SCHEDULERS[name]).from_config(pipe.scheduler.config)


def load_loras(pipe: Any, files: Sequence[str], scales: Sequence[float]) -> None:
    """Load LoRAs, all of them at their scales: safetensors in the format of diffusers, PEFT or kohya.

    Raises:
        ConfigError: a file that is none, or whose layers are not those of this model.
    """
    _check_takes(pipe, "lora", "load_lora_weights", files)
    names = []
    for k, file in enumerate(files):
        path = _safetensors("lora", file)
        names.append(f"lora_{k}")
        try:
            pipe.load_lora_weights(
                str(path.parent), weight_name=path.name, adapter_name=names[-1], local_files_only=True
            )
        except Exception as error:  # whatever diffusers and PEFT raise at keys or shapes that they do not expect
            raise ConfigError(f"lora: {file} does not fit this model: {first_line(error)}") from error
        if names[-1] not in {name for part in pipe.get_list_adapters().values() for name in part}:
            raise ConfigError(f"lora: {file} does not fit this model: it has none of the layers that it names")
    if names:
        pipe.set_adapters(names, [*scales])


def load_embeddings(pipe: Any, files: Sequence[str]) -> list[str]:
    """Load textual inversions, and give the word of each: the name of a diffusers file's tensor, or the file's own name
    for those of A1111 (`.safetensors`, and `.pt`, of which nothing but tensors is read).

    Raises:
        ConfigError: a file that is none, whose vectors are not as wide as this model's, or whose word is known already.
    """
    _check_takes(pipe, "embedding", "load_textual_inversion", files)
    words: list[str] = []
    parts: list[tuple[Any, str]]  # contents, and the end of the name of the text encoder that reads them
    for file in files:
        path = Path(file).expanduser()
        if path.suffix == ".pt" and path.is_file():
            word, parts = path.stem, [(str(path), "")]
        else:
            tensors = _tensors("embedding", file)
            word = path.stem if {*tensors} & {_A1111, *_XL} else next(iter(tensors))
            parts = [(tensors[name], _XL.get(name, "")) for name in tensors]
        for content, suffix in parts:
            encoder, tokenizer = (getattr(pipe, f"{kind}{suffix}", None) for kind in ("text_encoder", "tokenizer"))
            try:
                pipe.load_textual_inversion(content, token=word, text_encoder=encoder, tokenizer=tokenizer)
            except Exception as error:  # whatever diffusers raises at contents that it does not expect
                raise ConfigError(f"embedding: {file} does not fit this model: {first_line(error)}") from error
        words.append(word)
    return words


def _check_takes(pipe: Any, key: str, loader: str, files: Sequence[str]) -> None:
    if files and not hasattr(pipe, loader):
        raise ConfigError(f"{key}: found {files[0]}, but diffusers has no {loader} for a {type(pipe).__name__}")


def _safetensors(key: str, file: str) -> Path:
    path = Path(file).expanduser()
    if path.suffix != ".safetensors" or not path.is_file():
        found = "no such file" if not path.is_file() else f"a file of type {path.suffix or 'unknown'!r}"
        raise ConfigError(f"{key}: {file}: found {found}, expected a .safetensors file")
    return path


def _tensors(key: str, file: str) -> dict[str, Any]:
    try:
        with safe_open(_safetensors(key, file), framework="pt") as opened:
            found = {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118 (not a dict)
    except (SafetensorError, OSError) as error:
        raise ConfigError(f"{key}: {file} cannot be read: {error}") from error
    if len(found) != 1 and {*found} != {*_XL}:
        raise ConfigError(f"{key}: {file}: found {len(found)} tensors, expected one, or {' and '.join(_XL)}")
    return found
