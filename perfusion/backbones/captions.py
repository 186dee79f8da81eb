"""Captions whose encodings make up `C`: a built-in set of everyday scenes, or a person's own file."""

from __future__ import annotations

import random
import re
from collections.abc import Iterator
from itertools import islice
from pathlib import Path

from perfusion.backbones.everyday import PHRASES
from perfusion.config import ConfigError

BUILT_IN = ("everyday",)
_KEY = "backbone.covariance"


def caption_stream(name_or_path: str, count: int) -> Iterator[str]:
    """At most `count` captions: of the built-in set of this name, or of a UTF-8 text file with one caption per line.

    Caption k of a built-in set is the same whatever the count; a file gives what it has, blank lines left out.

    Raises:
        ConfigError: a count below 1, neither a set nor a file, or a file that is empty or no UTF-8.
    """
    if count < 1:
        raise ConfigError(f"{_KEY}.count: found {count}, expected at least 1")
    if name_or_path == "everyday":
        return islice(_everyday(), count)
    return islice(iter(_lines(name_or_path)), count)


def _lines(name: str) -> list[str]:
    path = Path(name).expanduser()
    if not path.exists():
        raise ConfigError(
            f"{_KEY}.captions: {name!r} is neither a set of captions that this backbone has ({', '.join(BUILT_IN)}) "
            "nor a file"
        )
    try:
        lines = [line.strip() for line in path.read_text(encoding="utf-8-sig").splitlines()]
    except UnicodeDecodeError as error:
        raise ConfigError(f"{_KEY}.captions: {path}: no UTF-8 text at byte {error.start}") from error
    except OSError as error:
        raise ConfigError(f"{_KEY}.captions: {path}: {error.strerror}") from error
    if captions := [line for line in lines if line]:
        return captions
    raise ConfigError(f"{_KEY}.captions: {path}: found no captions, expected one per line")


def _everyday() -> Iterator[str]:
    """Captions without end, the same in every run."""
    # Only `random()` keeps its sequence in every version of Python.
    rng = random.Random(2305)
    while True:
        caption = _expand("{caption}", rng)
        yield re.sub(r"\b([Aa]) (?=[aeiou](?!ni[fcq]|ne\b))", r"\1n ", caption)


def _expand(text: str, rng: random.Random) -> str:
    """`text` with every `{symbol}` replaced by one of the symbol's phrases, and so on for the symbols in these."""

    def phrase(match: re.Match[str]) -> str:
        options = PHRASES[match[1]]
        return _expand(options[int(rng.random() * len(options))], rng)

    return re.sub(r"\{(\w+)\}", phrase, text)
