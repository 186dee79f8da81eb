"""Progress bars that a terminal shows moving, and that write a line every few seconds where they go to a file."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from tqdm import tqdm

SECONDS = 5.0  # between two lines in a file


class LinesInAFile:
    """Goes before a class of tqdm; what has begun less than `SECONDS` ago has written nothing yet, and the end always
    writes a line."""

    fp: Any
    disable: bool
    _written: float | None = None

    def display(self, msg: str | None = None, pos: int | None = None) -> Any:
        if self.fp.isatty():
            return super().display(msg, pos)  # type: ignore[misc]
        now = time.monotonic()
        if self._written is None:
            self._written = now
        ends = self.disable  # as `close` has it, which ends the line itself
        if msg == "" or not (ends or now - self._written >= SECONDS):
            return False
        self._written = now
        self.fp.write(f"{self}" + "\n" * (not ends))
        self.fp.flush()
        return True


class Bar(LinesInAFile, tqdm):
    """A bar on stderr."""


@contextmanager
def without_loading_bars() -> Iterator[None]:
    """Have diffusers and transformers show no bar for every part of a model, if stderr is no terminal."""
    if sys.stderr.isatty():
        yield
        return
    import diffusers
    import transformers

    shown = [library.utils.logging for library in (diffusers, transformers)]
    shown = [logging for logging in shown if logging.is_progress_bar_enabled()]
    for logging in shown:
        logging.disable_progress_bar()
    try:
        yield
    finally:
        for logging in shown:
            logging.enable_progress_bar()
