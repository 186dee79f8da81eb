"""Captions whose encodings make up `C`: a built-in set of everyday scenes, or a person's own file."""

from __future__ import annotations

import hashlib
import random
import re
from collections.abc import Callable, Iterable, Iterator
from functools import cache
from itertools import islice
from pathlib import Path

import yaml

from perfusion.config import ConfigError

_KEY = "backbone.covariance"


class Captions:
    """Captions that can be gone through again and again, one at a time in memory; `len()` is their number."""

    def __init__(self, size: int, make: Callable[[], Iterator[str]]) -> None:
        self._size, self._make = size, make

    def __len__(self) -> int:
        return self._size

    def __iter__(self) -> Iterator[str]:
        return islice(self._make(), self._size)


def caption_stream(name_or_path: str, count: int) -> Captions:
    """At most `count` captions: of the built-in set of this name, or of a UTF-8 text file with one caption per line.

    Caption k of a built-in set is the same whatever the count; a file gives what it has, blank lines left out. The file
    is read once here, to check and count its lines, and again whenever they are gone through.

    Raises:
        ConfigError: neither a set nor a file, or a file that is empty or no UTF-8.
    """
    if name_or_path == "everyday":
        return Captions(count, _everyday)
    path = Path(name_or_path).expanduser()
    if not path.exists():
        raise ConfigError(
            f"{_KEY}.captions: found no file {name_or_path!r}, expected a text file or a built-in set: everyday, on "
            "Toyland also toyland"
        )
    if size := sum(1 for _ in islice(_lines(path), count)):
        return Captions(size, lambda: _lines(path))
    raise ConfigError(f"{_KEY}.captions: {path}: found no captions, expected one per line")


def captions_digest(captions: Iterable[str]) -> str:
    """The sha256 of captions in their order, in hexadecimal."""
    total = hashlib.sha256()
    for k, caption in enumerate(captions):
        total.update(f"{chr(10) * (k > 0)}{caption}".encode())
    return total.hexdigest()


def _lines(path: Path) -> Iterator[str]:
    """The lines of a text file that are not blank, stripped. Raises ConfigError."""
    start = 0
    try:
        with path.open("rb") as file:
            for raw in file:
                try:
                    text = raw.decode("utf-8").removeprefix("" if start else "\ufeff")
                except UnicodeDecodeError as error:
                    place = start + error.start
                    raise ConfigError(f"{_KEY}.captions: {path}: no UTF-8 text at byte {place}") from error
                start += len(raw)
                yield from filter(None, (line.strip() for line in text.splitlines()))
    except OSError as error:
        raise ConfigError(f"{_KEY}.captions: {path}: {error.strerror}") from error


def _everyday() -> Iterator[str]:
    """Captions without end, the same in every run."""
    phrases = everyday_phrases()
    # Only `random()` keeps its sequence in every version of Python.
    rng = random.Random(2305)

    def expand(text: str) -> str:
        """`text` with every `{symbol}` replaced by one of its phrases, and so on for the symbols in these."""
        return re.sub(r"\{(\w+)\}", phrase, text)

    def phrase(symbol: re.Match[str]) -> str:
        options = phrases[symbol[1]]
        return expand(options[int(rng.random() * len(options))])

    while True:
        yield re.sub(r"\b([Aa]) (?=[aeiou](?!ni[fcq]|ne\b))", r"\1n ", expand("{caption}"))


@cache
def everyday_phrases() -> dict[str, list[str]]:
    """Each symbol of the built-in grammar, which everyday.yaml explains, with the phrases that may stand for it."""
    grammar = yaml.safe_load(Path(__file__).with_name("everyday.yaml").read_text(encoding="utf-8"))
    phrases = {symbol: text.splitlines() for symbol, text in grammar["phrases"].items()}
    words = {symbol: [word.replace("_", " ") for word in text.split()] for symbol, text in grammar["words"].items()}
    return phrases | words
