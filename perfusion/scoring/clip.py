"""Images and texts in one space, by an open_clip model that belongs to no pipeline: it only scores."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import open_clip
import torch
from huggingface_hub import hf_hub_download
from open_clip.constants import HF_SAFE_WEIGHTS_NAME
from open_clip.transform import PreprocessCfg, image_transform_v2
from PIL import Image
from torch import Tensor, nn
from torch.nn import functional as F

from perfusion import toyland
from perfusion.files import first_line
from perfusion.hub import offline

LOCAL_DIR = "local-dir:"
TOYLAND_WEIGHTS = Path(toyland.__file__).with_name("weights") / "scorer"
CONFIG_NAME = "open_clip_config.json"
# The names that open_clip prefers to any pickle that may lie in the same folder.
WEIGHT_NAMES = ("open_clip_model.safetensors", "open_clip_pytorch_model.safetensors")
_AT_ONCE = 64  # images or texts in one call of the model
_LISTED = 6  # tags named in a message before "and k more"


class ScorerError(ValueError):
    """A scoring model that cannot be had; says what was looked for and how to give it."""


def named_scorer(
    model: str | None, pretrained: str | None, device: str | torch.device, foreign: str | None, keys: str = ""
) -> ClipScorer:
    """The scorer called `model`; None is Toyland's own, which is for pictures of Toyland alone.

    Args:
        model, pretrained, device: see `ClipScorer`.
        foreign: a clause that says which pictures are not of Toyland, for the message; None if all are.
        keys: what the keys `scorer` and `pretrained` begin with, for the message.

    Raises:
        ScorerError: none is named where Toyland's own cannot judge, or there is none by that name.
    """
    if model is None and foreign is not None:
        raise ScorerError(
            f"{keys}scorer: not given, and {foreign}; name an open_clip model with its weights, as in "
            f"{keys}scorer=ViT-B-32 {keys}pretrained=<file or tag>"
        )
    return ClipScorer(model or "toyland", pretrained, device)


class ClipScorer:
    """A frozen open_clip model.

    Args:
        model: `toyland` (ships with the project), `local-dir:<folder>` or the folder alone (open_clip's format:
            open_clip_config.json and safetensors weights, with the tokenizer's files if it has its own), or a name that
            open_clip knows, such as `ViT-L-14`.
        pretrained: with a name, its weights: a safetensors file, or a tag, which is taken from the hub's cache, or from
            the hub if it can be reached; default: `openai`, of models that OpenAI has published. Not with a folder: it
            has its own.
        device: where it computes.

    Raises:
        ScorerError: no such model, folder, file or tag, weights in a pickle, or weights that do not fit the model.
    """

    def __init__(
        self, model: str = "toyland", pretrained: str | None = None, device: str | torch.device = "cpu"
    ) -> None:
        if pretrained is None and "openai" in open_clip.list_pretrained_tags_by_model(model):
            pretrained = "openai"
        self.name = model if pretrained is None else f"{model}/{pretrained}"
        if model == "toyland":
            model = f"{LOCAL_DIR}{TOYLAND_WEIGHTS}"
        elif Path(model).expanduser().is_dir() and model not in open_clip.list_models():
            model = f"{LOCAL_DIR}{model}"
        self.device = torch.device(device)
        settings: dict[str, Any] = {}
        if model.startswith(LOCAL_DIR):
            model, pretrained = _checked_folder(model, pretrained), None
        else:
            pretrained, settings = _checked_weights(model, pretrained)
        try:
            self._model: Any = open_clip.create_model(model, pretrained, device=self.device, **settings)
            self._tokenize: Any = open_clip.get_tokenizer(model)
        except Exception as error:  # open_clip lets torch, json, hub and tokenizer errors through as they are
            raise ScorerError(f"the scorer {self.name} cannot be loaded: {first_line(error)}") from error
        self._model.requires_grad_(False).eval()
        preprocess = PreprocessCfg(**self._model.visual.preprocess_cfg)
        self._preprocess: Any = image_transform_v2(preprocess, is_train=False)

    @torch.no_grad()
    def image_embeddings(self, images: Sequence[Image.Image]) -> Tensor:
        """n pictures of any size to (n, d), float32 on the scorer's device, rows of length 1."""
        pixels = [self._preprocess(image.convert("RGB")) for image in images]
        return self._normalized([self._model.encode_image(part) for part in self._parts(pixels)], len(images))

    @torch.no_grad()
    def text_embeddings(self, texts: Sequence[str]) -> Tensor:
        """n texts to (n, d), float32 on the scorer's device, rows of length 1. Long texts are cut off."""
        tokens = list(self._tokenize(list(texts))) if texts else []
        return self._normalized([self._model.encode_text(part) for part in self._parts(tokens)], len(texts))

    def fingerprint(self) -> str:
        """A hash of the weights."""
        return fingerprint(self._model)

    def _parts(self, items: list[Tensor]) -> list[Tensor]:
        return [torch.stack(items[i : i + _AT_ONCE]).to(self.device) for i in range(0, len(items), _AT_ONCE)]

    def _normalized(self, features: list[Tensor], count: int) -> Tensor:
        assert count > 0, "nothing to embed"
        return F.normalize(torch.cat(features).float(), dim=-1)


def fingerprint(model: nn.Module) -> str:
    """Sixteen hex digits over all tensors of a model and their names."""
    digest = hashlib.sha256()
    for name, tensor in sorted(model.state_dict().items()):
        values = tensor.detach().cpu().contiguous().flatten().view(torch.uint8)
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(values.numpy().data)
    return digest.hexdigest()[:16]


def _checked_folder(model: str, pretrained: str | None) -> str:
    """`local-dir:<folder>` with the folder's full path, after a look at what is in it."""
    if pretrained is not None:
        raise ScorerError(
            f"pretrained={pretrained!r}: expected none with a folder ({model}), which has its own weights"
        )
    folder = Path(model.removeprefix(LOCAL_DIR)).expanduser()
    if folder == TOYLAND_WEIGHTS and not folder.is_dir():
        raise ScorerError(f"Toyland's scorer is not in {folder}; run `make toyland`")
    if not folder.is_dir():
        raise ScorerError(f"{model}: no such folder; expected open_clip's format ({CONFIG_NAME}, {WEIGHT_NAMES[0]})")
    try:
        text = json.loads((folder / CONFIG_NAME).read_text(encoding="utf-8"))["model_cfg"]["text_cfg"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ScorerError(f"{folder / CONFIG_NAME}: expected open_clip's config with model_cfg: {error!r}") from error
    if not any((folder / name).is_file() for name in WEIGHT_NAMES):
        found = ", ".join(sorted(os.listdir(folder)))
        raise ScorerError(
            f"{folder}: expected weights in {' or '.join(WEIGHT_NAMES)} (pickles are not read), found {found}"
        )
    if text.get("hf_tokenizer_name") and not (folder / "tokenizer_config.json").is_file():
        raise ScorerError(f"{folder}: its text model has a tokenizer of its own, but there is no tokenizer_config.json")
    return f"{LOCAL_DIR}{folder}"


def _checked_weights(model: str, pretrained: str | None) -> tuple[str, dict[str, Any]]:
    """Weight file of a model that open_clip knows by name, and the settings that it was trained with."""
    if model not in open_clip.list_models():
        raise ScorerError(
            f"scorer {model!r}: expected toyland, {LOCAL_DIR}<folder>, or a name that open_clip knows, as ViT-L-14 "
            "(python -c 'import open_clip; print(open_clip.list_models())')"
        )
    if pretrained is None:
        raise ScorerError(f"scorer {model}: expected pretrained=<safetensors file or tag>; {_tags(model)}")
    if tag := open_clip.get_pretrained_cfg(model, pretrained):
        preprocess = {key: tag.get(key) for key in ("mean", "std", "interpolation", "resize_mode")}
        quick = {"force_quick_gelu": True} if tag.get("quick_gelu") else {}
        return _tagged(model, pretrained, tag), {"force_preprocess_cfg": preprocess, **quick}
    file = Path(pretrained).expanduser()
    if file.suffix != ".safetensors" and (file.suffix or file.exists()):
        raise ScorerError(f"pretrained={pretrained}: expected a .safetensors file (pickles are not read)")
    if not file.is_file():
        raise ScorerError(f"pretrained={pretrained}: neither a file nor a tag of {model}; {_tags(model)}")
    return str(file), {}


def _tagged(model: str, pretrained: str, tag: dict[str, Any]) -> str:
    """The safetensors file of a tag, in the hub's cache or downloaded into it."""
    repository, _, file = tag.get("hf_hub", "").rpartition("/")
    file = str(Path(file).with_suffix(".safetensors")) if file else HF_SAFE_WEIGHTS_NAME
    how = f"give pretrained=<safetensors file>, or {LOCAL_DIR}<folder> as the model"
    if not repository:
        raise ScorerError(f"scorer {model}/{pretrained}: published as a pickle only, which is not read; {how}")
    return from_hub(f"scorer {model}/{pretrained}", repository, file, how)


def from_hub(wanted_by: str, repository: str, file: str, instead: str) -> str:
    """A file of a repository in the hub's cache, or downloaded into it; `instead` says what to do without network.

    Raises:
        ScorerError: it cannot be had; the message names the model, the file and the cause.
    """
    try:
        return hf_hub_download(repository, file, local_files_only=offline())
    except Exception as error:  # of the hub's own classes, requests' or the operating system's
        raise ScorerError(
            f"{wanted_by}: looked for {file} of {repository} in the hub's cache and on the hub, found neither "
            f"({first_line(error)}). Without network {instead}"
        ) from error


def _tags(model: str) -> str:
    tags = open_clip.list_pretrained_tags_by_model(model)
    more = f" and {len(tags) - _LISTED} more" if len(tags) > _LISTED else ""
    return f"its tags are: {', '.join(tags[:_LISTED])}{more}" if tags else "it has no tags"
