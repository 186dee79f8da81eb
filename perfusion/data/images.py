"""The pictures that a person gives: which files are meant, each of them as plain RGB, and all of them as squares at the
resolution that a backbone is trained at.

Everything that can be wrong with them is a `ConceptImageError`, raised here, before any model is loaded.
"""

from __future__ import annotations

import glob
import io
import os
import re
import sys
import warnings
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from PIL import Image, ImageCms, ImageOps

if TYPE_CHECKING:  # commands that only look at files do without it
    from torch import Tensor

from perfusion.data.formats import NEWER, OTHERS, SUFFIXES, described, hint, prepare, readable

_HEAD = 64  # bytes of a file that tell what it is
_HEIF = {b"heic", b"heix", b"heim", b"heis", b"hevc", b"hevx", b"mif1", b"msf1"}
_AVIF = {b"avif", b"avis"}
_NAMES = {b"GIF8": "GIF", b"BM": "BMP", b"II*\0": "TIFF", b"MM\0*": "TIFF", b"%PDF": "PDF"}
_LISTED = 8  # files named in a message before "and k more"
# The part of the mask's maximum from which a pixel counts when the crop is placed: noise far from the object, such as
# a JPEG leaves in a mask, must not move the crop.
_COUNTS = 0.05

# Gives the mask of an RGB picture that was read from a path: float32 (H, W) in [0, 1] of the picture's aspect ratio.
MaskOf = Callable[[Image.Image, Path], np.ndarray]


class ConceptImageError(ValueError):
    """The images or masks of a concept cannot be used. The message names the file, what was found and expected."""


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


def load_examples(paths: Sequence[Path], resolution: int, mask_of: MaskOf | None = None) -> Examples:
    """The pictures in these files, with their masks if there is something that gives them, cropped and scaled by `fit`
    to R = `resolution`.

    Raises:
        ConceptImageError: anything that is wrong with the files, each of which is decoded in full here, or with a mask.
    """
    import torch

    squares: list[tuple[Tensor, Tensor | None]] = []
    for path in paths:
        image = read_image(path)
        squares.append(fit(image, None if mask_of is None else mask_of(image, path), resolution))
    masks = [mask[None] for _, mask in squares if mask is not None]
    pixels = torch.stack([square for square, _ in squares])
    return Examples(pixels, torch.stack(masks) if masks else None, [path.name for path in paths])


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
    import torch

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


def find_images(spec: str | Sequence[str], key: str = "concept.images") -> list[Path]:
    """The image files that `spec` means.

    Args:
        spec: a folder (the JPEG, PNG, WebP, HEIC and AVIF files directly in it, the last two where they can be read;
            its other files, its hidden files and its sub-folders, such as `mask/`, are passed over), a glob
            (`photos/*.jpg`, `**` enters folders), a file, or a list of any of these. A path that exists is never read
            as a glob. `~` is the home folder.
        key: the setting that `spec` came from, for the messages.

    Returns:
        The paths, absolute, in the order of `spec` and in natural order (2 before 10) within a folder or glob.
        A file that is meant twice, or reached by two names, is there once.

    Raises:
        ConceptImageError: nothing was given, a path does not exist, a part of `spec` holds no image, a file that is
            named, or that calls itself an image by its suffix, is none by its first bytes.
    """
    parts: list[Any] = [spec] if isinstance(spec, str | os.PathLike | int | float) else list(spec)
    parts = [str(part) if isinstance(part, int | float) else part for part in parts]  # YAML reads 2023 as a number
    if not parts or any(not isinstance(part, str | os.PathLike) or not os.fspath(part).strip() for part in parts):
        raise ConceptImageError(
            f"{key}={spec!r} names nothing: expected a folder, a glob, a file, or a list of these (JPEG, PNG or WebP)."
        )
    found: dict[Path, Path] = {}
    for part in parts:
        given = f"{key}={os.fspath(part)!r}"
        try:
            images = _expand(os.path.expanduser(os.fspath(part)), given)
        except OSError as error:  # a folder that may not be entered, for one
            raise ConceptImageError(f"{given}: {error.strerror}: {error.filename}.") from error
        for path in images:
            found.setdefault(path.resolve(), path)
    return list(found.values())


def decode(path: Path) -> Image.Image:
    """The picture in a JPEG, PNG, WebP, HEIC or AVIF file, every pixel decoded, turned as its EXIF orientation says, in
    its own mode; of an animation the first frame.

    Raises:
        ConceptImageError: unreadable, truncated or damaged, another format, or more pixels than
            `PIL.Image.MAX_IMAGE_PIXELS` (a decompression bomb).
    """
    kind = _kind(path)
    if not readable(kind):
        raise ConceptImageError(f"{path}: expected a JPEG, PNG or WebP file, found {described(kind)}.")
    prepare(kind)
    try:
        with warnings.catch_warnings():
            # PIL only warns between one and two times its limit.
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            with Image.open(path, formats=(kind,)) as image:
                image.load()  # Image.verify() would pass a truncated JPEG: only decoding finds it
                return ImageOps.exif_transpose(image)
    except (Image.DecompressionBombWarning, Image.DecompressionBombError) as error:
        size = str(error).split(",")[0]  # "Image size (n pixels) exceeds limit of m pixels"
        raise ConceptImageError(f"{path}: too large to be opened safely. {size}; make it smaller first.") from error
    except Exception as error:  # a decoder of damaged bytes may raise anything
        raise ConceptImageError(f"{path}: unreadable, truncated or damaged {kind} file: {error}.") from error


def read_image(path: Path) -> Image.Image:
    """The picture in a file as 8-bit RGB.

    Orientation as EXIF says; transparency is laid over white, so the colours that a file hides under it never show;
    16 bits are scaled to 8, not clipped; CMYK, palettes and grey are converted; colours of another profile than sRGB
    (CMYK, Adobe RGB, the Display P3 of telephones) are brought to sRGB.

    Raises:
        ConceptImageError: as `decode`.
    """
    image = decode(path)
    profile = image.info.get("icc_profile")
    if is_grey16(image):
        values = grey16(image)
        hidden = image.info.get("transparency")  # one grey value that stands for "nothing here"
        values = values if hidden is None else np.where(values * 65535 == hidden, 1.0, values)
        image = Image.fromarray((values * 255).round().astype(np.uint8))
    if image.has_transparency_data:
        rgba = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), rgba).convert("RGB")
    if profile and image.mode in ("RGB", "CMYK"):
        image = _to_srgb(image, profile)
    return image.convert("RGB")


def is_grey16(image: Image.Image) -> bool:
    """Whether the picture is grey with more than 8 bits, which PIL's own conversions clip instead of scaling."""
    return image.mode.startswith("I")


def grey16(image: Image.Image) -> np.ndarray:
    """A grey picture of 16 bits (see `is_grey16`) as float64 (H, W) in [0, 1]."""
    return np.asarray(image).astype(np.float64) / 65535


def _to_srgb(image: Image.Image, profile: bytes) -> Image.Image:
    """An RGB or CMYK picture whose colours mean what the ICC profile says, as sRGB."""
    try:
        source = ImageCms.ImageCmsProfile(io.BytesIO(profile))
        if image.mode == "RGB" and "sRGB" in ImageCms.getProfileDescription(source):
            return image
        converted = ImageCms.profileToProfile(image, source, ImageCms.createProfile("sRGB"), outputMode="RGB")
    except (ImageCms.PyCMSError, OSError):  # a profile that is damaged, or of another colour space: as without one
        return image
    assert converted is not None, "only None when converting in place"
    return converted


def _expand(text: str, given: str) -> list[Path]:
    """The images that one folder, glob or file means; `given` begins the messages."""
    root = Path.cwd()
    path = root / text
    if path.is_dir():
        candidates = [p for p in path.iterdir() if not p.name.startswith(".")]
        seen = f"{path} holds {listing(candidates)}"
    elif path.exists():
        kind = _kind(path) if path.is_file() else "no regular file"
        if not readable(kind):
            raise ConceptImageError(f"{given}: expected a JPEG, PNG or WebP file, found {described(kind)}.")
        return [path]
    elif any(c in text for c in "*?["):
        candidates = [Path(p) for p in glob.glob(os.path.join(glob.escape(str(root)), text), recursive=True)]
        seen = f"it matches {listing(candidates)}" if candidates else f"it matches nothing; {_around(path)}"
    else:
        raise ConceptImageError(f"{given}: no such file or folder; {_around(path)}.")
    candidates = sorted(candidates, key=_natural)
    images = [p for p in candidates if _is_image(p, given)]
    left_out = _left_out({*candidates} - {*images})
    if not images:
        more = "".join(f" {why[0].upper()}{why[1:]}." for why in left_out)
        raise ConceptImageError(f"{given}: no JPEG, PNG or WebP file there: {seen}.{more}")
    if not path.is_dir():
        return images
    stems = {image.stem for image in images}
    for image in images:
        if (whole := re.sub(r"[_.-]mask$", "", image.stem)) != image.stem and whole in stems:
            raise ConceptImageError(
                f"{given}: found {image.name} beside a picture {whole}, as though it were its mask, expected pictures "
                "alone; put masks into a folder of their own and name it in concept.masks"
            )
    for why, files in left_out.items():
        print(f"note: {given}: passed over {listing(files)}: {why}", file=sys.stderr)
    return images


def _left_out(files: Iterable[Path]) -> dict[str, list[Path]]:
    """Those of the files that are pictures of a kind that is not read, by the reason."""
    reasons: dict[str, list[Path]] = {}
    for file in sorted(files, key=_natural):
        kind = _kind(file) if file.is_file() else ""
        if kind in NEWER or file.suffix.lower() in OTHERS:
            reasons.setdefault(hint(kind), []).append(file)
    return reasons


def _is_image(path: Path, given: str) -> bool:
    """Whether a file is an image by its first bytes; one that only its suffix calls an image is an error."""
    if path.is_dir() or not (path.is_file() or path.is_symlink()):
        return False
    kind = _kind(path)
    if not readable(kind) and path.suffix.lower() in SUFFIXES:
        raise ConceptImageError(
            f"{given}: {path} is no JPEG, PNG or WebP file as its name says: found {described(kind)}."
        )
    return readable(kind)


def _kind(path: Path) -> str:
    """What a file is by its first bytes, one of `FORMATS` or `NEWER`, or words for anything else.

    Raises:
        ConceptImageError: the file cannot be opened.
    """
    try:
        with open(path, "rb") as file:
            head = file.read(_HEAD)
    except OSError as error:
        raise ConceptImageError(f"{path}: cannot be opened: {error.strerror or error}.") from error
    return _kind_of(head)


def _kind_of(head: bytes) -> str:
    if head.startswith(b"\xff\xd8\xff"):
        return "JPEG"
    if head.startswith(b"\x89PNG\r\n\x1a\n"):
        return "PNG"
    if head[:4] == b"RIFF" and head[8:12] == b"WEBP":
        return "WEBP"
    if not head:
        return "an empty file"
    if head[4:8] == b"ftyp":
        return _kind_of_box(head)
    for start, name in _NAMES.items():
        if head.startswith(start):
            return f"a {name} file (save it as JPEG or PNG first)"
    return f"a file that begins with {head[:16]!r}"


def _kind_of_box(head: bytes) -> str:
    """HEIC and AVIF begin like videos do, and name themselves among the brands that follow."""
    end = min(int.from_bytes(head[:4], "big"), len(head))
    brands = {head[8:12], *(head[k : k + 4] for k in range(16, end - 3, 4))}
    if brands & _AVIF:
        return "AVIF"
    return "HEIF" if brands & _HEIF else "a video file"


def _natural(path: Path) -> tuple[list[list[str | int]], str]:
    """Sorts 2.jpg before 10.jpg, whatever the case, folder by folder."""
    pieces = [re.split(r"(\d+)", part.casefold()) for part in path.parts]
    return [[int(p) if i % 2 else p for i, p in enumerate(part)] for part in pieces], str(path)


def _around(path: Path) -> str:
    """What lies where a path ought to be: in the nearest folder above it that exists."""
    folder = next((p for p in path.parents if p.is_dir()), Path(path.anchor))
    return f"{folder} holds {listing(p for p in folder.iterdir() if not p.name.startswith('.'))}"


def listing(paths: Iterable[Path]) -> str:
    """File names for a message: in natural order, folders marked with a slash, the first few of many."""
    names = [p.name + "/" * p.is_dir() for p in sorted(paths, key=_natural)]
    more = f" and {len(names) - _LISTED} more" if len(names) > _LISTED else ""
    return ", ".join(names[:_LISTED]) + more if names else "nothing"
