"""The pictures of one concept, and their masks, as squares at the resolution that a backbone is trained at."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from perfusion.data.images import find_images, read_image
from perfusion.data.masks import check_aspect, find_masks, read_mask

Segment = Callable[[Image.Image, Path], np.ndarray]  # a picture, and what messages call it

# The part of the mask's maximum from which a pixel counts when the crop is placed: noise far from the object, such as
# a JPEG leaves in a mask, must not move the crop.
_COUNTS = 0.05


@dataclass(frozen=True)
class Examples:
    """The n pictures of one concept.

    Attributes:
        pixels: float32 (n, 3, R, R) in [-1, 1].
        masks: float32 (n, 1, R, R) in [0, 1], none of them zero everywhere; or None.
        names: n file names, for messages.
    """

    pixels: Tensor
    masks: Tensor | None
    names: list[str]

    def __post_init__(self) -> None:
        n, channels, height, width = self.pixels.shape
        assert n == len(self.names) > 0 and channels == 3 and height == width
        assert self.masks is None or self.masks.shape == (n, 1, height, width)

    def __len__(self) -> int:
        return len(self.names)

    def pictures(self) -> list[Image.Image]:
        """The n pictures as they are after cropping and scaling, RGB."""
        values = ((self.pixels + 1) * 127.5).round().clamp(0, 255).byte()
        return [Image.fromarray(picture.permute(1, 2, 0).numpy()) for picture in values]


def load_examples(
    images_spec: str | Sequence[str],
    masks_spec: str | Sequence[str] | None,
    resolution: int,
    base: Path | None = None,
    segment: Segment | None = None,
) -> Examples:
    """The pictures, and masks if any, that a person named, cropped and scaled by `fit` to R = `resolution`.

    Args:
        images_spec: as in `images.find_images`.
        masks_spec: as in `masks.find_masks`; None for none.
        resolution: R, in pixels.
        base: the folder that relative paths start from; default: the working directory.
        segment: gives a picture's mask, float32 (H, W) in [0, 1] of its aspect ratio, where `masks_spec` is None.

    Raises:
        ConceptImageError: anything that is wrong with the files, each of which is decoded in full here, or what
            `segment` raises.
    """
    assert masks_spec is None or segment is None
    paths = find_images(images_spec, base)
    mask_paths = [None] * len(paths) if masks_spec is None else find_masks(masks_spec, paths, base)
    pixels: list[Tensor] = []
    masks: list[Tensor] = []
    for path, mask_path in zip(paths, mask_paths, strict=True):
        image, mask = read_image(path), None
        if mask_path is not None:
            mask = read_mask(mask_path)
            check_aspect(mask, mask_path, image, path)
        elif segment is not None:
            mask = segment(image, path)
        square, square_mask = fit(image, mask, resolution)
        pixels.append(square)
        if square_mask is not None:
            masks.append(square_mask[None])
    return Examples(torch.stack(pixels), torch.stack(masks) if masks else None, [path.name for path in paths])


def fit(image: Image.Image, mask: np.ndarray | None, resolution: int) -> tuple[Tensor, Tensor | None]:
    """Scale a picture until its shorter side is R = `resolution`, then crop the longer side to R.

    Without a mask the crop is central. With one it is the most central among the crops that keep most of the mask's
    weight, so an object that fits into the square is not cut. Image and mask are cropped alike, whatever the mask's
    own size. Smaller pictures are enlarged. Lanczos for the image; an antialiased triangle, which has no overshoot, for
    the mask.

    Args:
        image: RGB, 8 bits.
        mask: float32 (H, W) in [0, 1] of the image's aspect ratio at any size, not zero everywhere, or None.
        resolution: R, in pixels.

    Returns:
        pixels: float32 (3, R, R) in [-1, 1].
        mask: float32 (R, R) in [0, 1], not zero everywhere; None if none was given.
    """
    assert image.mode == "RGB" and resolution > 0
    side, spare = min(image.size), max(image.size) - min(image.size)
    wide = image.width > image.height
    offset = spare // 2
    if mask is not None:
        weight = np.where(mask >= _COUNTS * mask.max(), mask, 0)
        offset = _best_offset(weight.sum(0 if wide else 1, dtype=np.float64), side, spare)
    left, top = (offset, 0) if wide else (0, offset)
    # Cropping and scaling in one step: a panorama never becomes a huge picture in between.
    square = (left, top, left + side, top + side)
    scaled = image.resize((resolution, resolution), Image.Resampling.LANCZOS, box=square)
    pixels = torch.from_numpy(np.asarray(scaled, dtype=np.float32) / 127.5 - 1).permute(2, 0, 1).contiguous()
    if mask is None:
        return pixels, None
    sx, sy = mask.shape[1] / image.width, mask.shape[0] / image.height
    box = (square[0] * sx, square[1] * sy, square[2] * sx, square[3] * sy)
    box = (box[0], box[1], min(box[2], mask.shape[1]), min(box[3], mask.shape[0]))
    soft = Image.fromarray(np.ascontiguousarray(mask, dtype=np.float32))
    soft = np.asarray(soft.resize((resolution, resolution), Image.Resampling.BILINEAR, box=box)).clip(0, 1)
    assert soft.max() > 0, "the best crop of a mask that is not zero keeps some of it"
    return pixels, torch.from_numpy(soft.copy())


def _best_offset(profile: np.ndarray, side: int, spare: int) -> int:
    """Where, from 0 to `spare` pixels, a window of `side` pixels keeps most of the mask's weight along the image's
    longer side; `profile` is that weight, (n,) for any n; of equally good offsets the most central."""
    long = side + spare
    total = np.concatenate([[0.0], profile.cumsum()])
    before = np.interp(np.arange(long + 1) / long, np.arange(len(total)) / len(profile), total)  # left of each pixel
    kept = before[side:] - before[: spare + 1]
    good = np.flatnonzero(kept >= kept.max() * (1 - 1e-9))  # equal but for rounding
    return int(good[np.abs(good - spare / 2).argmin()])
