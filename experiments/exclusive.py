"""A folder that one process works in at a time."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from filelock import FileLock, Timeout

from perfusion.config import ConfigError


@contextmanager
def alone(folder: Path, instead: str) -> Iterator[None]:
    """Hold a folder, made if missing, for this process; however it ends, the folder is free then.

    Args:
        instead: the key that names another folder, for the message.

    Raises:
        ConfigError: another process works there.
    """
    folder.mkdir(parents=True, exist_ok=True)
    try:
        held = FileLock(folder / ".lock").acquire(timeout=0)
    except Timeout:
        raise ConfigError(
            f"{folder}: found another process at work there, expected none; wait for it or choose another {instead}"
        ) from None
    with held:
        yield
