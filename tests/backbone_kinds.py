"""The backbones of every kind, small and with random weights."""

import dataclasses
import functools
import inspect
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from perfusion import backbones
from perfusion.backbones.base import Backbone
from perfusion.config import BackboneConfig
from perfusion.editing.words import AddedWord
from tests.pipelines import folder_of, sd21_folder, sdxl_folder, tiny_pipeline_folder, toyland_folder

# kind -> name of its backbone, builder of a folder with a small pipeline of the kind
KINDS: dict[str, tuple[str, Callable[[Path], Path]]] = {
    "sd15": ("stable_diffusion", tiny_pipeline_folder),
    "sd21": ("stable_diffusion", sd21_folder),
    "sdxl": ("sdxl", sdxl_folder),
    "toyland": ("toyland", toyland_folder),
}


BEYOND = ("kolors", "pixart", "sana")  # whose denoiser projects the encodings before K and V read them
KINDS |= {kind: (kind, functools.partial(folder_of, kind)) for kind in BEYOND}


def config_of(name: str, folder: Path, cache: Path, **values: Any) -> BackboneConfig:
    """The defaults of a backbone, for a small pipeline and few captions."""
    config = backbones.default_config(name)
    covariance = dataclasses.replace(config.covariance, count=40, cache=str(cache))
    values = {"path": str(folder), "resolution": 64, "device": "cpu", "covariance": covariance} | values
    return dataclasses.replace(config, **values)


def loaded(kind: str, home: Path, **values: Any) -> Any:
    """A backbone of a kind, whose pipeline is written below `home` first."""
    name, folder = KINDS[kind]
    backbone = backbones.backbone_class(name).load(config_of(name, folder(home), home / "cache", **values))
    backbone.pipe.set_progress_bar_config(disable=True)
    return backbone


@contextmanager
def added(backbone: Backbone, vectors: int = 1) -> Iterator[AddedWord]:
    """`<cat*>` in the backbone, and out of it again whatever happens."""
    token = backbone.add_token("<cat*>", "cat", vectors)
    try:
        yield token
    finally:
        token.remove()


def stock(backbone: Backbone, prompts: list[str]) -> Tensor:
    """What the stock pipeline encodes."""
    pipe: Any = backbone.pipe
    settings: dict[str, Any] = {"device": backbone.device, "num_images_per_prompt": 1}
    name = "complex_human_instruction"  # which the call gives, and this function has no default for
    if given := inspect.signature(type(pipe).__call__).parameters.get(name):
        settings[name] = given.default
    with torch.no_grad():
        return pipe.encode_prompt(prompts, do_classifier_free_guidance=False, **settings)[0]
