"""Soft masks of the object in the pictures: found, paired with their images, read, and brought to the latent's size."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image
from torch import Tensor
from torch.nn import functional

from perfusion.data.images import ConceptImageError, MaskOf, decode, find_images, grey16, is_grey16, listing

ASPECT_TOLERANCE = 0.02
_CHROMA = 24  # of 255: how far the channels of a grey that a JPEG stored may lie apart


def masks_of_files(spec: str | Sequence[str], images: Sequence[Path]) -> MaskOf:
    """What gives each of the images its mask, read from the file that `find_masks` pairs with it; raises as that.

    It raises ConceptImageError for a mask that `read_mask` or `check_aspect` refuses.
    """
    file_of = dict(zip(images, find_masks(spec, images), strict=True))

    def mask_of(image: Image.Image, path: Path) -> np.ndarray:
        mask = read_mask(file_of[path])
        check_aspect(mask, file_of[path], image, path)
        return mask

    return mask_of


def find_masks(spec: str | Sequence[str], images: Sequence[Path]) -> list[Path]:
    """The mask file of each image: `mask/cat.png` belongs to `cat.jpg`, the names without suffix being equal.

    Args:
        spec: a folder, a glob, a file or a list of these, as in `images.find_images`.
        images: the image files (n).

    Returns:
        n paths, in the order of `images`.

    Raises:
        ConceptImageError: as `find_images`; a mask without image, an image without mask, two masks for one image, two
            images of one name, a mask that is the image itself.
    """
    by_stem: dict[str, Path] = {}
    for mask in find_images(spec, key="concept.masks"):
        if mask.stem in by_stem:
            raise ConceptImageError(f"two masks of one name: {by_stem[mask.stem]} and {mask}. Expected one per image.")
        by_stem[mask.stem] = mask
    of_stem: dict[str, Path] = {}
    for image in images:
        if image.stem in of_stem:
            raise ConceptImageError(
                f"two images of one name: {of_stem[image.stem]} and {image}. Masks find images by name: rename one."
            )
        of_stem[image.stem] = image
    for stem, mask in by_stem.items():
        if stem not in of_stem:
            raise ConceptImageError(
                f"mask without image: {mask}. No image is named {stem!r}; the images are {listing(images)}. "
                "Name in concept.masks only the masks of these images."
            )
    for image in images:
        if image.stem not in by_stem:
            raise ConceptImageError(
                f"image without mask: {image}. Expected a mask named {image.stem}.png (or .jpg, .webp); "
                f"the masks are {listing(by_stem.values())}."
            )
        if by_stem[image.stem].resolve() == image.resolve():
            raise ConceptImageError(f"{image} is given as image and as its own mask. concept.masks expects masks.")
    return [by_stem[image.stem] for image in images]


def read_mask(path: Path) -> np.ndarray:
    """A mask as float32 (H, W) in [0, 1], 1 where the object is; soft values are kept, 16-bit ones at full precision.

    Of any mode. Opaque pictures count by their brightness. In a picture with transparency, brightness and opacity are
    multiplied if the visible colours are greys of several kinds; if they are all the same (a mask drawn in alpha alone)
    or colourful (the object cut out of its background), opacity alone is the mask. Labels 0 and 1 in 8 bits are a
    faint mask, which `normalise_mask` makes full.

    Raises:
        ConceptImageError: as `images.decode`; a mask that is zero everywhere.
    """
    image = decode(path)
    if is_grey16(image):
        mask = grey16(image)
    elif image.has_transparency_data:
        mask = _of_transparency(image.convert("RGBA"))
    else:
        mask = np.asarray(image.convert("RGB").convert("L")) / 255.0
    if not mask.max() > 0:
        raise ConceptImageError(
            f"{path}: the mask is zero everywhere ({mask.shape[1]}x{mask.shape[0]} pixels). Expected white or grey "
            "where the object is; leave concept.masks out to train on the whole image."
        )
    return mask.astype(np.float32)


def check_aspect(mask: np.ndarray, mask_path: Path, image: Image.Image, image_path: Path) -> None:
    """Hold that a mask (H, W) has its image's shape, at any size, within 2 % or the pixel that rounding costs.

    Raises:
        ConceptImageError: it has not.
    """
    (height, width), expected = mask.shape, mask.shape[1] * image.height / image.width
    if abs(height - expected) <= max(ASPECT_TOLERANCE * expected, 1):
        return
    turned = abs(width - height * image.height / image.width) <= ASPECT_TOLERANCE * width
    hint = " The mask lies on its side: images are turned as their EXIF orientation says." if turned else ""
    raise ConceptImageError(
        f"{mask_path}: the mask is {width}x{height}, its image {image_path} is {image.width}x{image.height}. Any size "
        f"will do, but width : height must agree within 2 %; found {width / height:.3f} and "
        f"{image.width / image.height:.3f}.{hint}"
    )


def normalise_mask(mask: Tensor) -> Tensor:
    """Each mask (..., H, W) divided by its own maximum (Perfusion weights its loss by such a soft mask).

    The maximum must be above zero, which `read_mask` and `images.fit` see to.
    """
    peak = mask.amax(dim=(-2, -1), keepdim=True)
    assert bool((peak > 0).all()), "a mask is zero everywhere"
    return mask / peak


def mask_to_latent(mask: Tensor, size: int) -> Tensor:
    """Masks (B, 1, R, R) at the latent's resolution: (B, 1, size, size), each the mean over the area of its pixels,
    then divided by the mask's own maximum."""
    return normalise_mask(functional.interpolate(mask, size=(size, size), mode="area"))


def _of_transparency(rgba: Image.Image) -> np.ndarray:
    """The mask in an RGBA picture as float (H, W) in [0, 1]; see `read_mask`."""
    colours, opacity = np.asarray(rgba)[..., :3].astype(np.int16), np.asarray(rgba)[..., 3] / 255.0
    brightness = np.asarray(rgba.convert("RGB").convert("L")) / 255.0
    visible = colours[opacity > 0]
    if opacity.min() == 1 or not len(visible):
        return brightness * opacity
    one_colour = not np.ptp(visible, axis=0).any()
    colourful = np.ptp(visible, axis=1).max() > _CHROMA
    return opacity if one_colour or colourful else brightness * opacity
