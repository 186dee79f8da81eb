"""Pictures of the superclass, which a method holds on to (prior preservation): real ones, or drawn by the base model.

Drawn pictures are PNG files in a folder that is named after everything they depend on. Each is drawn once; a drawing
that was interrupted goes on with the pictures that are missing, to the same pictures.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from PIL import Image
from torch import Tensor

from perfusion.data.dataset import seed_of
from perfusion.data.images import ConceptImageError, find_images, fit, read_image
from perfusion.files import atomic_path, atomic_write_text

CACHE_FORMAT = 1
KEY = "concept.prior"
_INPUTS = "inputs.json"

Drawing = Callable[[Sequence[str], Sequence[int]], Iterable[Image.Image]]  # prompts and seeds to pictures, in order


@dataclass(frozen=True)
class PriorImages:
    """n pictures of the superclass, as files, and what each of them shows."""

    paths: tuple[Path, ...]
    prompts: tuple[str, ...]

    def __post_init__(self) -> None:
        assert len(self.paths) == len(self.prompts) > 0

    def __len__(self) -> int:
        return len(self.paths)

    def pixels(self, start: int, stop: int, resolution: int) -> Tensor:
        """Pictures `start` to `stop`, float32 (k, 3, R, R) in [-1, 1], see `images.fit`. Raises ConceptImageError."""
        return torch.stack([fit(read_image(path), None, resolution)[0] for path in self.paths[start:stop]])


def real_images(spec: str | Sequence[str], count: int, prompt: str) -> PriorImages:
    """The first `count` pictures that a person named, or all if they are fewer.

    A text file beside a picture, of the same name, holds its caption; for others it is `prompt`.

    Args:
        spec: as in `images.find_images`.

    Raises:
        ConceptImageError: anything that is wrong with the files, each of which is decoded in full here.
    """
    paths = find_images(spec, key=KEY)[:count]
    for path in paths:
        read_image(path)
    return PriorImages(tuple(paths), tuple(_caption(path) or prompt for path in paths))


def drawn_images(
    cache: Path,
    made_of: Mapping[str, object],
    prompt: str,
    count: int,
    seed: int,
    draw: Drawing,
    batch_size: int,
) -> PriorImages:
    """`count` pictures of `prompt`, drawn now as far as they do not lie in `cache` yet.

    Kernels round differently for every batch shape, so pictures are drawn in whole batches only, always of the same
    ones: picture k is the same whatever is missing and whatever `count` is. Of the last batch all pictures are kept.

    Args:
        cache: the folder that has a folder for every set of inputs.
        made_of: everything else that the pictures depend on, in JSON values: model, schedule, steps, guidance, ...
        seed: of the set; each picture has a seed of its own, made of this one and its number.
        draw: gives a picture for each prompt and seed; it is asked for batches of `batch_size` in their order.

    Raises:
        OSError: the folder cannot be written to.
    """
    inputs = {"format": CACHE_FORMAT, "prompt": prompt, "seed": seed, "batch_size": batch_size, **made_of}
    folder = cache / cache_key(inputs)
    wanted = range(-(-count // batch_size) * batch_size)
    missing = {k for k in wanted if not _path(folder, k).exists()}
    if any(k in missing for k in range(count)):
        folder.mkdir(parents=True, exist_ok=True)
        atomic_write_text(folder / _INPUTS, json.dumps(inputs, indent=2, sort_keys=True) + "\n")
        numbers = [k for k in wanted if not missing.isdisjoint(_batch_of(k, batch_size))]
        images = draw([prompt] * len(numbers), [seed_of("prior", seed, k) for k in numbers])
        for k, image in zip(numbers, images, strict=True):
            if k in missing:
                with atomic_path(_path(folder, k)) as temporary:
                    image.save(temporary)
    return PriorImages(tuple(_path(folder, k) for k in range(count)), (prompt,) * count)


def cache_key(inputs: Mapping[str, object]) -> str:
    """16 hexadecimal digits that stand for `inputs`, JSON values in any order."""
    canonical = json.dumps(dict(inputs), sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(canonical.encode()).hexdigest()[:16]


def _batch_of(k: int, batch_size: int) -> range:
    start = k - k % batch_size
    return range(start, start + batch_size)


def _path(folder: Path, k: int) -> Path:
    return folder / f"{k:05d}.png"


def _caption(path: Path) -> str:
    """What the text file beside a picture says; nothing where there is none."""
    file = path.with_suffix(".txt")
    try:
        return " ".join(file.read_text(encoding="utf-8").split()) if file.exists() else ""
    except (OSError, UnicodeDecodeError) as error:
        raise ConceptImageError(f"{KEY}: {file}: expected a caption in UTF-8: {error}.") from error
