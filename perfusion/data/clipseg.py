"""Soft masks that CLIPSeg draws from a word (Lüddecke and Ecker, CVPR 2022, arXiv 2112.10003), kept beside a hash of
their picture.

A kept mask is a grey PNG of 16 bits that a person can look at; copied and renamed, it serves as a mask of one's own.
"""

from __future__ import annotations

import hashlib
import io
import json
import logging
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from PIL import Image
from PIL.PngImagePlugin import PngInfo
from torch import Tensor
from torch.nn import functional

from perfusion.data.images import ConceptImageError
from perfusion.files import atomic_write_bytes, first_line
from perfusion.hub import offline

if TYPE_CHECKING:
    from transformers import CLIPSegForImageSegmentation, CLIPSegProcessor

SPEC = "clipseg"  # what concept.masks says to have masks drawn; a folder of this name is `./clipseg`
SIDE = 352  # pixels of a mask's longer side: what CLIPSeg itself sees
UNSURE = 0.5  # a best probability below it is worth a warning
FORMAT = 1
_TEXT = "perfusion.clipseg"  # the PNG's text with what the mask was made of
_HUB_ID = re.compile(r"[\w-][\w.-]*/[\w-][\w.-]*")
_LEVELS = 65535

_log = logging.getLogger(__name__)


class ClipSeg:
    """Masks of one thing in pictures: what CLIPSeg answers to a word, divided by its own maximum.

    The model is loaded at the first picture whose mask is not kept yet, and runs on the CPU in float32.

    Args:
        model: hub id, or folder in the format of transformers, with safetensors weights.
        prompt: what to look for, such as "cat".
        cache: folder of the kept masks.

    Raises:
        ConceptImageError: `model` is neither a folder nor could it be a hub id.
    """

    def __init__(self, model: str, prompt: str, cache: Path) -> None:
        self.prompt, self.cache = prompt, cache
        folder = Path(model).expanduser()
        self._local = folder.is_dir()
        if not self._local and not _HUB_ID.fullmatch(model):
            raise ConceptImageError(
                f"concept.clipseg: no folder {model}; expected the folder of a CLIPSeg model with safetensors weights, "
                "or a hub id 'owner/name'"
            )
        self._name = str(folder) if self._local else model
        self._identity = _contents(folder) if self._local else model
        self._parts: tuple[CLIPSegForImageSegmentation, CLIPSegProcessor] | None = None

    def __call__(self, image: Image.Image, path: Path) -> np.ndarray:
        """The mask of an RGB picture, the same numbers whether it was kept or is new.

        Args:
            path: what messages call the picture.

        Returns:
            float32 (h, w) in [0, 1] with maximum 1, in the picture's aspect ratio, its longer side `SIDE` pixels.

        Raises:
            ConceptImageError: the model cannot be had, or what it answers is no mask.
        """
        inputs = self._inputs(image)
        file = self.cache / f"{hashlib.sha256(inputs.encode()).hexdigest()[:16]}.png"
        try:
            return _read(file, inputs)
        except FileNotFoundError:
            pass
        except (OSError, ValueError, SyntaxError) as error:  # PIL raises all of these on damaged files
            _log.warning("%s: kept mask not usable (%s); drawing it anew", file, error)
        mask = self._draw(image, path)
        try:
            self.cache.mkdir(parents=True, exist_ok=True)
            _write(file, mask, inputs)
        except OSError as error:  # a lost mask costs time, not the run
            _log.warning("%s: mask not kept (%s)", file, error)
        return _floats(mask)

    def _inputs(self, image: Image.Image) -> str:
        """Everything that a mask depends on, as one text."""
        pixels = hashlib.sha256(f"{image.size} ".encode() + image.tobytes()).hexdigest()
        about = {"format": FORMAT, "image": pixels, "model": self._identity, "prompt": self.prompt, "side": SIDE}
        return json.dumps(about, sort_keys=True)

    @torch.no_grad()
    def _draw(self, image: Image.Image, path: Path) -> np.ndarray:
        """uint16 (h, w) with maximum 65535."""
        model, processor = self._loaded()
        inputs: Any = processor(text=[self.prompt], images=[image], padding=True, truncation=True, return_tensors="pt")
        logits = model(**inputs).logits
        probability = logits.float().sigmoid().reshape(1, 1, *logits.shape[-2:])  # of one picture it may come as (H, W)
        peak = float(probability.max())
        if not 0 < peak <= 1:
            raise ConceptImageError(
                f"{path}: CLIPSeg's answer to {self.prompt!r} has the maximum {peak}, expected a number above zero; "
                f"look at the weights in concept.clipseg={self._name}"
            )
        if peak < UNSURE:
            _log.warning(
                "%s: CLIPSeg hardly sees a %r there (its best probability is %.2f); look at the mask in %s, or give "
                "masks of your own",
                *(path, self.prompt, peak, self.cache),
            )
        mask = _resized(probability, image)
        return (mask / mask.max() * _LEVELS).round().numpy().astype(np.uint16)

    def _loaded(self) -> tuple[CLIPSegForImageSegmentation, CLIPSegProcessor]:
        if self._parts is None:
            from transformers import CLIPSegForImageSegmentation, CLIPSegProcessor

            with self._reading():
                processor = CLIPSegProcessor.from_pretrained(self._name, local_files_only=self._local or offline())
                tokenizer: Any = processor.tokenizer  # type: ignore[attr-defined]
                if tokenizer.vocab_size <= len(tokenizer.all_special_ids):
                    raise OSError("its tokenizer has no vocabulary")
                loaded: Any = CLIPSegForImageSegmentation.from_pretrained(
                    self._name,
                    use_safetensors=True,
                    local_files_only=self._local or offline(),
                    output_loading_info=True,
                )
                model, report = loaded
                if missing := sorted(report["missing_keys"]):  # they would be random numbers
                    raise OSError(f"{len(missing)} of its weights are missing, such as {missing[0]}")
            self._parts = model.eval(), processor
        return self._parts

    @contextmanager
    def _reading(self) -> Iterator[None]:
        """Turn what transformers and the hub raise into one ConceptImageError that names the source."""
        from safetensors import SafetensorError

        try:
            yield
        except (OSError, ValueError, RuntimeError, TypeError, AttributeError, SafetensorError) as error:
            reason = first_line(error)
            where = f"cannot load {self._name}"
            if not self._local:
                hub = "cannot be reached" if offline() else "did not give it"
                where = f"{self._name} is no folder here, and the hub {hub}"
            raise ConceptImageError(
                f"concept.clipseg: {where} ({reason}). Expected a CLIPSeg model with safetensors weights: a folder, or "
                "a hub id that can be reached or lies in the hub's cache. Masks of your own, concept.masks=<folder>, "
                "or none, concept.masks=null, need no such model"
            ) from error


def _resized(probability: Tensor, image: Image.Image) -> Tensor:
    """(1, 1, H, W), over the picture squeezed into a square, to (h, w) in the picture's aspect ratio."""
    longer = max(image.size)
    size = (max(1, round(SIDE * image.height / longer)), max(1, round(SIDE * image.width / longer)))
    return functional.interpolate(probability, size=size, mode="bilinear", antialias=True)[0, 0]


def _contents(folder: Path) -> str:
    """A sha256 over the names and contents of the files in a folder that a model is loaded from."""
    total = hashlib.sha256()
    for file in sorted(folder.iterdir()):
        if file.suffix in (".json", ".safetensors", ".txt"):
            with file.open("rb") as content:
                total.update(f"{file.name} {hashlib.file_digest(content, 'sha256').hexdigest()}\n".encode())
    return total.hexdigest()


def _write(file: Path, mask: np.ndarray, inputs: str) -> None:
    text, data = PngInfo(), io.BytesIO()
    text.add_text(_TEXT, inputs)
    Image.fromarray(mask).save(data, "PNG", pnginfo=text)
    atomic_write_bytes(file, data.getvalue())


def _read(file: Path, inputs: str) -> np.ndarray:
    """float32 (h, w); OSError, ValueError or SyntaxError unless the file is whole and was made of `inputs`."""
    with Image.open(file, formats=["PNG"]) as image:
        image.load()
        found = getattr(image, "text", {}).get(_TEXT)
        if found != inputs:
            raise ValueError(f"found a mask made of {found}, expected {inputs}")
        mask = np.asarray(image)
    if mask.ndim != 2 or mask.max() != _LEVELS:
        raise ValueError(f"found {mask.dtype} {mask.shape} with maximum {mask.max()}, expected 16-bit grey up to white")
    return _floats(mask)


def _floats(mask: np.ndarray) -> np.ndarray:
    return (mask / np.float64(_LEVELS)).astype(np.float32)
