"""The kinds of files that pictures come in, and which of them can be read here."""

from __future__ import annotations

from importlib.util import find_spec

FORMATS = ("JPEG", "PNG", "WEBP")  # as Pillow calls them, like all below
SUFFIXES = (".jpg", ".jpeg", ".png", ".webp")
NEWER = ("HEIF", "AVIF")  # what phones make; whether they can be read depends on what is installed
OTHERS = (".heic", ".heif", ".avif", ".tif", ".tiff", ".bmp", ".gif", ".jxl", ".dng")  # suffixes of pictures

_NEEDS = {
    "HEIF": "HEIC files are read with the package pillow-heif (pip install pillow-heif); or save them as JPEG",
    "AVIF": "AVIF files are read by Pillow 11.3 and later where they have libavif, or save them as JPEG",
}


def readable(kind: str) -> bool:
    """Whether pictures of this kind can be read here."""
    if kind == "HEIF":
        return find_spec("pillow_heif") is not None
    if kind == "AVIF":
        from PIL import features

        return features.check("avif") is True
    return kind in FORMATS


def prepare(kind: str) -> None:
    """Have Pillow know the kind, which can be read here."""
    if kind == "HEIF":
        from pillow_heif import register_heif_opener  # type: ignore[import-not-found]

        register_heif_opener()


def hint(kind: str) -> str:
    """What is to be done about a kind that cannot be read here."""
    return _NEEDS.get(kind, "only JPEG, PNG, WebP, HEIC and AVIF are read")


def described(kind: str) -> str:
    """A kind that is no picture to be read, for a message."""
    return f"a {'HEIC' if kind == 'HEIF' else kind} file ({hint(kind)})" if kind in NEWER else kind
