"""Pictures in the space of a DINO model, by timm: likeness without any language in it."""

from __future__ import annotations

import importlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor
from torch.nn import functional as F

from perfusion.scoring.clip import LOCAL_DIR, ScorerError, fingerprint, from_hub

WEIGHTS = "model.safetensors"
_AT_ONCE = 64  # images in one call of the model


class DinoScorer:
    """A frozen timm model that gives one vector per picture: without its classifier, after its own pooling.

    Args:
        model: `local-dir:<folder>` or the folder (timm's format: config.json and model.safetensors), or a name that
            timm knows, such as `vit_small_patch16_224.dino`, which CustomConcept101 reports.
        pretrained: with a name, a safetensors file with its weights; default: from the hub's cache, or the hub.
        device: where it computes.

    Raises:
        ScorerError: no timm, no such model or folder, weights that are a pickle, cannot be had or do not fit.
    """

    def __init__(self, model: str, pretrained: str | None = None, device: str | torch.device = "cpu") -> None:
        try:
            timm: Any = importlib.import_module("timm")
        except ImportError as error:
            raise ScorerError("dino: needs timm, the extra dino of this package; `make setup` installs it") from error
        if Path(model).expanduser().is_dir():
            model = f"{LOCAL_DIR}{model}"
        self.name = model if pretrained is None else f"{model}/{pretrained}"
        self.device = torch.device(device)
        settings: dict[str, Any] = {}
        if model.startswith(LOCAL_DIR):
            model = _checked_folder(model, pretrained)
        else:
            settings["pretrained_cfg_overlay"] = {"file": _weights(timm, model, pretrained)}
        try:
            self._model: Any = timm.create_model(model, pretrained=True, num_classes=0, **settings)
        except Exception as error:  # timm lets torch, json and safetensors errors through as they are
            raise ScorerError(f"dino={self.name}: cannot be loaded: {str(error).splitlines()[:1]}") from error
        self._model.to(self.device).requires_grad_(False).eval()
        self._preprocess: Any = timm.data.create_transform(**timm.data.resolve_model_data_config(self._model))

    @torch.no_grad()
    def image_embeddings(self, images: Sequence[Image.Image]) -> Tensor:
        """n pictures of any size to (n, d), float32 on the scorer's device, rows of length 1."""
        assert images, "nothing to embed"
        features = []
        for start in range(0, len(images), _AT_ONCE):
            pixels = torch.stack([self._preprocess(i.convert("RGB")) for i in images[start : start + _AT_ONCE]])
            features.append(self._model(pixels.to(self.device)))
        return F.normalize(torch.cat(features).float(), dim=-1)

    def fingerprint(self) -> str:
        """A hash of the weights."""
        return fingerprint(self._model)


def _checked_folder(model: str, pretrained: str | None) -> str:
    if pretrained is not None:
        raise ScorerError(f"dino_pretrained={pretrained!r}: expected none with a folder ({model}), which has its own")
    folder = Path(model.removeprefix(LOCAL_DIR)).expanduser()
    for name in ("config.json", WEIGHTS):
        if not (folder / name).is_file():
            found = ", ".join(sorted(p.name for p in folder.iterdir())) if folder.is_dir() else "no such folder"
            raise ScorerError(f"dino={model}: expected timm's format (config.json, {WEIGHTS}), found {found}")
    return f"{LOCAL_DIR}{folder}"


def _weights(timm: Any, model: str, pretrained: str | None) -> str:
    """The safetensors file of a model that timm knows by name."""
    if not timm.is_model(model):
        raise ScorerError(f"dino={model}: expected a folder, {LOCAL_DIR}<folder>, or a name that timm knows")
    if pretrained is not None:
        file = Path(pretrained).expanduser()
        if file.suffix != ".safetensors" or not file.is_file():
            raise ScorerError(f"dino_pretrained={pretrained}: expected a .safetensors file (pickles are not read)")
        return str(file)
    known = timm.get_pretrained_cfg(model, allow_unregistered=True)
    repository = getattr(known, "hf_hub_id", None)
    how = f"give dino_pretrained=<safetensors file>, or {LOCAL_DIR}<folder> as the model"
    if not repository:
        raise ScorerError(f"dino={model}: timm knows no weights for it on the hub; {how}")
    return from_hub(f"dino={model}", repository, WEIGHTS, how)
