"""The border at which a concept file, perhaps a stranger's, becomes tensors and plain values.

Nothing in a file is executed. How much of everything there is is held before any of it is parsed, and what comes out
has the types that it should have, texts that can be shown, and numbers that float16 can hold. Code behind this border
need not ask again.
"""

from __future__ import annotations

import json
import math
import os
import stat
from collections import Counter
from collections.abc import Mapping
from typing import Any

from safetensors import SafetensorError, safe_open
from torch import Tensor

from perfusion.editing import TokenError
from perfusion.editing.tokens import check_spelling
from perfusion.files import PathLike

FORMAT_VERSION = 1

# What a file may have at most. The largest that training writes, DreamBooth's of SDXL in float32, has 14 GB and 2,400
# tensors, which are described in 400 kB. `perfusion.editing.tokens` has the bounds of the words.
MAX_BYTES = 16 * 2**30
MAX_HEADER = 2 * 2**20  # bytes
MAX_TENSORS = 4096
MAX_DIMENSIONS = 8
MAX_VECTORS = 75  # of a word: the tokens of a prompt
MAX_ENTRIES = 64  # of the metadata
MAX_ENTRY = 16_384  # characters of one
MAX_ITEMS = 256  # of a list or object in one
MAX_NESTING = 4  # of lists and objects in one
MAX_TEXT = 1024  # characters of a text
MAX_NAME = 128  # characters of a name
MAX_NUMBER = 1e9  # of a setting
MIN_NUMBER = 1e-30  # likewise, unless it is 0; float32 holds it
MAX_VALUE = 65_504.0  # of a tensor, in any dtype: the largest number of float16

_DTYPES = {"F16", "BF16", "F32", "F64"}
_KINDS = {
    stat.S_IFDIR: "a folder",
    stat.S_IFIFO: "a pipe",
    stat.S_IFSOCK: "a socket",
    stat.S_IFCHR: "a device",
    stat.S_IFBLK: "a device",
}


class ConceptFileError(ValueError):
    """A concept file that cannot be used; names the file, what was found and what was expected."""


def read(path: PathLike) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Tensors, on the CPU, and metadata of a concept file.

    Raises:
        ConceptFileError: no such file, not safetensors, truncated, larger than concepts are, a name that stands twice
            in its header, no concept, another format version; or a tensor that is empty, of a type that no concept has,
            or has values that float16 cannot hold.
    """
    where = shown(path)
    size = _size_of_file(path, where)
    try:
        _check_header(path, where, size)
        with safe_open(os.fspath(path), framework="pt") as file:
            metadata = file.metadata() or {}
            _check_version(where, metadata)
            _check_entries(where, metadata)
            names = [*file.keys()]
            _check_kinds(where, {name: file.get_slice(name) for name in names})
            # Memory of their own: a view of the file would change, or crash, when the file does.
            tensors = {name: file.get_tensor(name).clone() for name in names}
    except (SafetensorError, OSError, MemoryError) as error:
        raise _unreadable(where, str(error) or type(error).__name__) from error
    check_finite(where, tensors)
    return tensors, metadata


def shown(value: object, most: int = 256) -> str:
    """`value` for a message: one line, and not longer than it helps."""
    text = str(value)
    text = text if text.isprintable() else ascii(text)[1:-1]
    return text if len(text) <= most else f"{text[: most - 1]}…"


def entry(path: PathLike, metadata: Mapping[str, str], field: str, kind: type = str) -> Any:
    """A metadata entry: text, a whole number, or an object of texts.

    Raises:
        ConceptFileError: it is not there or not of this kind, or a text in it is too long or cannot be shown.
    """
    where = shown(path)
    if field not in metadata:
        raise ConceptFileError(f"{where}: found no metadata {field!r}, expected it in a concept")
    text = metadata[field]
    if kind is str:
        _check_text(where, field, text)
        return text
    try:
        found = json.loads(text)
    except (ValueError, RecursionError):
        found = None
    if type(found) is not kind:
        expected = "a JSON object" if kind is dict else "a whole number"
        raise ConceptFileError(f"{where}: metadata {field!r}: found {shown(repr(text), 80)}, expected {expected}")
    if isinstance(found, int) and not abs(found) < 2**64:
        raise ConceptFileError(f"{where}: metadata {field!r}: found {len(text)} digits, expected less than 2⁶⁴")
    return found


def texts(path: PathLike, metadata: Mapping[str, str], field: str) -> dict[str, str]:
    """A metadata entry that is an object of texts. Raises ConceptFileError."""
    found = entry(path, metadata, field, dict)
    _check_plain(shown(path), field, found)
    for key, value in found.items():
        if not isinstance(value, str):
            raise ConceptFileError(
                f"{shown(path)}: metadata {field!r}: found {key} of type {type(value).__name__}, expected text"
            )
    return found


def settings(path: PathLike, metadata: Mapping[str, str], field: str = "settings") -> dict[str, Any]:
    """The method's options as plain values; whether the method has them is for it to say. Raises ConceptFileError."""
    found = entry(path, metadata, field, dict)
    _check_plain(shown(path), field, found)
    if "name" in found:
        raise ConceptFileError(f"{shown(path)}: metadata {field!r}: found a name, expected it as metadata 'method'")
    return found


def words(path: PathLike, metadata: Mapping[str, str]) -> tuple[str, str]:
    """Placeholder and superclass. Raises ConceptFileError where no tokenizer would take them."""
    placeholder, superclass = (_present(path, metadata, field) for field in ("placeholder", "superclass"))
    try:
        check_spelling(placeholder, superclass)
    except TokenError as error:
        raise ConceptFileError(f"{shown(path)}: {error}") from error
    return placeholder, superclass


def check_finite(where: PathLike, tensors: Mapping[str, Tensor]) -> None:
    """Hold that all values are numbers that float16 has. Raises ConceptFileError."""
    for name, tensor in tensors.items():
        low, high = tensor.aminmax() if tensor.numel() else (0, 0)  # NaN, if there is one
        if low >= -MAX_VALUE and high <= MAX_VALUE:
            continue
        kind = str(tensor.dtype).removeprefix("torch.")
        bad = int((~tensor.isfinite()).sum())
        what = "NaN or infinite" if bad else f"beyond ±{MAX_VALUE:,.0f}"
        bad = bad or int((tensor.abs() > MAX_VALUE).sum())
        raise ConceptFileError(
            f"{shown(where)}: tensor {shown(name)!r}: found {bad} of {tensor.numel()} values {what} in {kind}, "
            "expected finite ones that float16 can hold"
        )


def check_number(where: str, key: str, value: float) -> None:
    """Hold that a setting is a number to calculate with. Raises ConceptFileError."""
    if value != 0 and not MIN_NUMBER <= abs(value) <= MAX_NUMBER:
        number = "a number that is none" if value != value else "infinity" if abs(value) == math.inf else _digits(value)
        raise ConceptFileError(
            f"{where}: {key}: found {number}, expected 0 or a number from {MIN_NUMBER:g} to {MAX_NUMBER:g}"
        )


def _digits(value: float) -> str:
    if isinstance(value, float):
        return f"{value:g}"
    # Python refuses to write larger ones out.
    return str(value) if value.bit_length() < 64 else f"a whole number of {value.bit_length()} bits"


def _unreadable(where: str, reason: str) -> ConceptFileError:
    return ConceptFileError(f"{where}: found no readable safetensors file ({shown(reason)}), expected a concept")


def _size_of_file(path: PathLike, where: str) -> int:
    """Bytes of a regular file; nothing else is opened, as a pipe would be waited for."""
    if not isinstance(path, (str, os.PathLike)) or not isinstance(os.fspath(path), str):
        raise ConceptFileError(f"{where}: found a path of type {type(path).__name__}, expected text: a concept's file")
    try:
        found = os.stat(path)
    except FileNotFoundError:
        raise ConceptFileError(f"{where}: found no such file, expected a concept") from None
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or error
        raise ConceptFileError(f"{where}: found no such file ({shown(reason)}), expected a concept") from error
    if not stat.S_ISREG(found.st_mode):
        kind = _KINDS.get(stat.S_IFMT(found.st_mode), "something else")
        raise ConceptFileError(f"{where}: found {kind}, expected a file with a concept")
    if found.st_size > MAX_BYTES:
        raise ConceptFileError(f"{where}: found {found.st_size:,} bytes, expected a concept of at most {MAX_BYTES:,}")
    return found.st_size


def _check_header(path: PathLike, where: str, size: int) -> None:
    """Hold that the header is of a size to be parsed, and names everything once: safetensors itself takes the last of
    two tensors, or two entries, of one name."""

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        found = dict(pairs)
        if len(found) < len(pairs):
            name = next(name for name, count in Counter(name for name, _ in pairs).items() if count > 1)
            raise ConceptFileError(f"{where}: found {shown(name)!r} twice in the header, expected every name once")
        return found

    with open(path, "rb") as file:
        length = int.from_bytes(file.read(8), "little")
        if length > size - 8:
            raise _unreadable(where, f"{size:,} bytes are too few" + (f" for a header of {length:,}" * (size >= 8)))
        if length > MAX_HEADER:
            raise ConceptFileError(f"{where}: found a header of {length:,} bytes, expected {MAX_HEADER:,} at most")
        content = file.read(length)
    try:
        header = json.loads(content, object_pairs_hook=unique)
    except ConceptFileError:
        raise
    except (ValueError, RecursionError) as error:
        raise _unreadable(where, str(error)) from error
    if isinstance(header, dict) and len(header) > MAX_TENSORS + 1:
        raise ConceptFileError(f"{where}: found {len(header):,} tensors, expected {MAX_TENSORS:,} at most")


def _check_version(where: str, metadata: Mapping[str, str]) -> None:
    found = metadata.get("format_version")
    if found is None:
        raise ConceptFileError(f"{where}: found a safetensors file without 'format_version', expected a concept")
    if found != str(FORMAT_VERSION):
        raise ConceptFileError(
            f"{where}: found format version {shown(found, 20)}, expected {FORMAT_VERSION}; another version of "
            "perfusion wrote it"
        )


def _check_entries(where: str, metadata: Mapping[str, str]) -> None:
    if len(metadata) > MAX_ENTRIES:
        raise ConceptFileError(f"{where}: found {len(metadata):,} entries of metadata, expected {MAX_ENTRIES} at most")
    for field, text in metadata.items():
        if len(text) > MAX_ENTRY or len(field) > MAX_NAME:
            raise ConceptFileError(
                f"{where}: metadata {shown(field)!r}: found {len(text):,} characters, expected {MAX_ENTRY:,} at most"
            )


def _check_kinds(where: str, slices: Mapping[str, Any]) -> None:
    """Hold that every tensor has a dtype and a shape that a concept's may have, before its values are read."""
    for name, part in slices.items():
        dtype, shape = part.get_dtype(), tuple(part.get_shape())
        if len(name) > MAX_TEXT or not name.isprintable():
            raise ConceptFileError(f"{where}: found a tensor {shown(name, 80)!r}, expected a name of printable letters")
        if dtype not in _DTYPES:
            raise ConceptFileError(
                f"{where}: tensor {shown(name)!r}: found {dtype}, expected one of {', '.join(sorted(_DTYPES))}"
            )
        if 0 in shape or len(shape) > MAX_DIMENSIONS:
            raise ConceptFileError(
                f"{where}: tensor {shown(name)!r}: found shape {shown(shape, 80)}, expected some values, in "
                f"{MAX_DIMENSIONS} dimensions at most"
            )
        if name.startswith("embedding.") and shape and shape[0] > MAX_VECTORS:
            raise ConceptFileError(
                f"{where}: tensor {shown(name)!r}: found {shape[0]:,} vectors, expected {MAX_VECTORS} at most, as "
                "many as a prompt has room for"
            )


def _present(path: PathLike, metadata: Mapping[str, str], field: str) -> str:
    if field not in metadata:
        raise ConceptFileError(f"{shown(path)}: found no metadata {field!r}, expected it in a concept")
    return metadata[field]


def _check_text(where: str, field: str, text: str, most: int = MAX_TEXT) -> None:
    if len(text) > most or not text.isprintable():
        raise ConceptFileError(
            f"{where}: metadata {field!r}: found {shown(text, 60)!r} of {len(text):,} characters, expected at most "
            f"{most:,}, all of them printable"
        )


def _check_plain(where: str, field: str, value: Any, key: str = "", depth: int = 1) -> None:
    """Hold that a value out of JSON is small and flat, and stands for itself alone."""
    if isinstance(value, (dict, list)):
        if len(value) > MAX_ITEMS or depth > MAX_NESTING:
            raise ConceptFileError(
                f"{where}: metadata {field!r}: found {len(value):,} items at depth {depth}, expected at most "
                f"{MAX_ITEMS} and a depth of {MAX_NESTING}"
            )
        for name, item in value.items() if isinstance(value, dict) else enumerate(value):
            if isinstance(name, str):
                _check_text(where, field, name, MAX_NAME)
            _check_plain(where, field, item, f"{key}.{name}" if key else str(name), depth + 1)
    elif isinstance(value, str):
        _check_text(where, field, value)
        if "${" in value or value == "???":  # OmegaConf would put something else in its place, as from the environment
            raise ConceptFileError(
                f"{where}: metadata {field!r}: {key}: found {shown(value, 60)!r}, expected text without '${{' and '???'"
            )
    elif isinstance(value, (int, float)):
        check_number(where, f"metadata {field!r}: {key}", value)
