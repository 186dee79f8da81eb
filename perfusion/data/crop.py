"""One square of a picture and of its mask, at the resolution that a backbone is trained at."""

from __future__ import annotations

import numpy as np
import torch
from PIL import Image
from torch import Tensor

# The part of the mask's maximum from which a pixel counts when the crop is placed: noise far from the object, such as
# a JPEG leaves in a mask, must not move the crop.
_COUNTS = 0.05


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
