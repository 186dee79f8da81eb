"""Atomic writes: a reader sees the old file or the whole new one, never a part, even after a crash or a full disk.

The new content is written beside its destination (so that the final rename stays on one filesystem), flushed to the
disk, and moved over the destination in one step. A symbolic link at the destination is replaced, not followed. Besides:
what an error of a file or a library says, in one line.
"""

import errno
import os
import re
import secrets
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

PathLike = str | os.PathLike[str]

_TEMPORARY = re.compile(r"\..*\.[0-9a-f]{16}\.tmp(\..*)?", re.DOTALL)  # what `atomic_path` gives


@contextmanager
def atomic_path(path: PathLike, flush: bool = True) -> Iterator[Path]:
    """Gives a path to write to; what was written there becomes `path` when the block ends without an exception.

    For writers that want a file name, such as `safetensors.torch.save_file` or `PIL.Image.save`: the temporary name
    ends in the same suffix. When the block raises, `path` is as it was before and nothing is left beside it; a block
    that writes no file raises `FileNotFoundError`.

    Without `flush` nothing waits for the disk: a killed process still leaves a whole file or none, but after a crash of
    the machine `path` may be damaged. For many files that are checked when they are read, and can be made again.

    Raises:
        NotADirectoryError: no such folder, before the block begins.
        IsADirectoryError: `path` is a folder, likewise.
    """
    path = Path(path)
    if not path.parent.is_dir():
        raise NotADirectoryError(
            errno.ENOTDIR, f"expected a folder to write {path.name} into, found none", str(path.parent)
        )
    if path.is_dir() and not path.is_symlink():
        raise IsADirectoryError(errno.EISDIR, "expected a file to write, found a folder", str(path))
    temporary = path.with_name(f".{path.stem}.{secrets.token_hex(8)}.tmp{path.suffix}")
    temporary.touch()
    mode = temporary.stat().st_mode  # as the umask has it; some writers (safetensors) make files for their owner alone
    temporary.unlink()
    try:
        yield temporary
        temporary.chmod(mode)
        if flush:
            _flush(temporary, os.O_RDWR)
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)  # gone already after `replace`
    if flush and os.name == "posix":  # Windows has no handle of a folder to flush
        _flush(path.parent, os.O_RDONLY)


def remove_unfinished(folder: Path) -> None:
    """Remove what killed processes left of atomic writes anywhere below `folder`; none may write there now."""
    for path in folder.rglob(".*.tmp*"):
        if _TEMPORARY.fullmatch(path.name):
            path.unlink(missing_ok=True)


def atomic_write_bytes(path: PathLike, data: bytes | bytearray | memoryview) -> None:
    """Writes `data` to `path` atomically, as in `atomic_path`."""
    with atomic_path(path) as temporary:
        temporary.write_bytes(data)


def atomic_write_text(path: PathLike, text: str) -> None:
    """Writes `text` to `path` atomically, in UTF-8 with its line ends unchanged, as in `atomic_path`."""
    atomic_write_bytes(path, text.encode("utf-8"))


def _flush(path: Path, flags: int) -> None:
    """Returns once the file (or the entries of the folder) at `path` is on the disk."""
    descriptor = os.open(path, flags)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def first_line(error: BaseException) -> str:
    """What a library's error says, for a sentence of one's own; the error's kind where it says nothing."""
    return (str(error).strip() or type(error).__name__).splitlines()[0]
