"""Captions for `C`: the built-in grammar and files."""

import hashlib
import re
import tracemalloc
from itertools import islice
from pathlib import Path

import pytest

from perfusion.config import ConfigError
from perfusion.covariance.captions import caption_stream, captions_digest, everyday_phrases


def test_everyday_captions_are_the_same_in_every_run() -> None:
    everyday = list(caption_stream("everyday", 10_000))
    assert everyday[0] == "a gold map made of cardboard"
    digest = "e13bb901564edfa443d022b81f10e3a46b9e1cb548f872c0582e173b17c5d106"
    assert captions_digest(everyday) == digest, "every C in use, and every concept trained with one, stands on these"
    assert list(islice(caption_stream("everyday", 10**12), 50)) == everyday[:50]  # whatever the count


def test_every_symbol_of_the_grammar_is_defined_and_used() -> None:
    grammar = everyday_phrases()
    used = {name for phrases in grammar.values() for phrase in phrases for name in re.findall(r"\{(\w+)\}", phrase)}
    assert used | {"caption"} == set(grammar)


def test_a_file_gives_its_lines(tmp_path: Path) -> None:
    path = tmp_path / "captions.txt"
    path.write_bytes("\ufeffein Kätzchen\r\n\r\n  a dog \nun café\n".encode())
    assert list(caption_stream(str(path), 10)) == ["ein Kätzchen", "a dog", "un café"]
    assert list(caption_stream(str(path), 2)) == ["ein Kätzchen", "a dog"]


def test_captions_know_their_number_and_can_be_gone_through_again(tmp_path: Path) -> None:
    path = tmp_path / "captions.txt"
    path.write_bytes(b"\n one\r\ntwo\x0bthree\n\n" + "vier\u2028fünf".encode())
    lines = caption_stream(str(path), 10)
    assert len(lines) == 5 and list(lines) == list(lines) == ["one", "two", "three", "vier", "fünf"]
    assert len(caption_stream(str(path), 2)) == 2 and len(caption_stream("everyday", 7)) == 7
    joined = hashlib.sha256("\n".join(lines).encode()).hexdigest()
    assert captions_digest(lines) == joined


def test_a_long_file_is_not_held_in_memory(tmp_path: Path) -> None:
    path = tmp_path / "captions.txt"
    path.write_text("a caption of some length, and then some\n" * 200_000)  # 8 MB
    lines = caption_stream(str(path), 10**9)
    tracemalloc.start()
    assert sum(1 for _ in lines) == len(lines) == 200_000
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 1e6


def test_what_cannot_be_read_is_refused_at_once(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"captions: found no file 'everyda', expected .*everyday"):
        caption_stream("everyda", 1)
    blank = tmp_path / "blank.txt"
    blank.write_text("\n \n")
    with pytest.raises(ConfigError, match=r"blank\.txt: found no captions"):
        caption_stream(str(blank), 1)
    latin = tmp_path / "latin.txt"
    latin.write_bytes("café".encode("latin-1"))
    with pytest.raises(ConfigError, match=r"latin\.txt: no UTF-8 text at byte 3"):
        caption_stream(str(latin), 1)
    later = tmp_path / "later.txt"
    later.write_bytes("\ufeffé\na\ncafé".encode() + b"\xff")
    with pytest.raises(ConfigError, match=r"later\.txt: no UTF-8 text at byte 13"):
        caption_stream(str(later), 9)
    with pytest.raises(ConfigError, match=f"{tmp_path.name}: Is a directory"):
        caption_stream(str(tmp_path), 1)
