"""A concept goes to the hub and comes back, with a card; the hub is a small local server."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from PIL import Image

from perfusion import hub as module
from perfusion.backbones.base import Backbone
from perfusion.cli import run_cli
from perfusion.concept import Concept, save_concept
from perfusion.concept_file import ConceptFileError
from perfusion.generate import main as generate
from perfusion.hub import HubError
from perfusion.inspect import main as inspect
from perfusion.manifest import read_manifest
from perfusion.methods.base import Word
from tests.concepts import untrained_concept
from tests.hub import LocalHub, local_hub
from tests.pipelines import tiny_pipeline_folder

WORD = Word("<bear*>", "teddy bear")


@pytest.fixture(scope="module")
def given(backbone: Backbone, tmp_path_factory: pytest.TempPathFactory) -> Concept:
    """As a run leaves it: a file with samples beside it."""
    file = tmp_path_factory.mktemp("run") / "concept.safetensors"
    save_concept(file, untrained_concept(backbone, WORD, 0))
    Image.new("RGB", (9, 9), "red").save(file.with_name("samples.png"))
    return Concept.load(file)


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[LocalHub]:
    with local_hub(tmp_path / "cache", monkeypatch) as hub:
        yield hub


@pytest.fixture
def login(hub: LocalHub, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_TOKEN", "right")


def test_there_and_back(given: Concept, hub: LocalHub, login: None, tmp_path: Path) -> None:
    address = given.push_to_hub("me/bear", license="cc-by-4.0", samples=True)
    assert address.startswith(f"{hub.address}/me/bear/commit/")
    assert hub.private == {"me/bear"}, "nobody else sees it unless that is asked for"
    assert hub.commits == [("me/bear", "main", f"Concept {given.hash}")]
    files = hub.repositories["me/bear"]
    assert files.keys() == {"concept.safetensors", "samples.png", "README.md"}
    assert len(files["concept.safetensors"]) == Path(given.source).stat().st_size, "in the dtypes that it has"
    assert files["samples.png"] == Path(given.source).with_name("samples.png").read_bytes()

    back = Concept.from_pretrained("me/bear")
    assert back.hash == given.hash and Path(back.source).is_relative_to(tmp_path / "cache")
    assert {**vars(back), "source": "", "tensors": {}} == {**vars(given), "source": "", "tensors": {}}
    assert Concept.from_pretrained("me/bear", local_files_only=True).hash == given.hash, "out of the cache"
    kept = [path for path in tmp_path.rglob("*") if path.is_file() and b"right" in path.read_bytes()]
    assert not kept and not any(b"right" in content for content in files.values()), "no token is written down"


def test_a_card_says_what_it_is_and_how_it_is_used(given: Concept, hub: LocalHub, login: None, capsys: Any) -> None:
    given.push_to_hub("me/bear", license="cc-by-4.0", samples=True)
    card = hub.repositories["me/bear"]["README.md"].decode()
    _, header, text = card.split("---\n", 2)
    known = yaml.safe_load(header)
    assert (known["license"], known["library_name"], known["pipeline_tag"]) == (
        "cc-by-4.0", "perfusion", "text-to-image",
    )  # fmt: skip
    assert {"perfusion", "stable_diffusion"} <= {*known["tags"]}
    assert "](samples.png)" in text and "- method: `perfusion`" in text and "- superclass: `teddy bear`" in text
    assert f"- hash: `{given.hash}`" in text and given.fingerprint["projections"] in text
    (code,) = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
    compile(code, "card", "exec")
    assert "from_pretrained('me/bear').attach(pipe)" in code and "<bear*>" in code
    capsys.readouterr()
    assert run_cli(inspect, ["hub:me/bear", "card=true"]) == 0
    shown = capsys.readouterr().out
    assert shown == card.replace("cc-by-4.0", "unknown").replace(
        "licence: `unknown`", "licence: not named by its author"
    ).replace(re.findall(r"!\[.*?\n\n", card)[0], ""), "the same card, but for what the file does not tell"
    assert run_cli(inspect, [given.source, "card=true"]) == 0
    assert "](samples.png)" in (shown := capsys.readouterr().out) and "load('concept.safetensors')" in shown


def test_a_card_that_is_there_and_who_sees_it_stay_as_they_are(given: Concept, hub: LocalHub, login: None) -> None:
    given.push_to_hub("me/bear", private=False)
    assert not hub.private and hub.repositories["me/bear"].keys() == {"concept.safetensors", "README.md"}
    hub.repositories["me/bear"]["README.md"] = b"my words"
    other = dataclasses.replace(given, superclass="cat")
    other.push_to_hub("me/bear", revision="wip", commit_message="Better")
    assert hub.repositories["me/bear"]["README.md"] == b"my words" and not hub.private
    assert hub.commits[-1] == ("me/bear", "wip", "Better")
    assert Concept.from_pretrained("me/bear", revision="wip").superclass == "cat"
    assert any(path.startswith("/me/bear/resolve/wip/") for path, _ in hub.received)


def test_markdown_of_a_stranger_is_shown_as_code(given: Concept) -> None:
    card = dataclasses.replace(
        given, placeholder="```<img>`", settings={"a": "`](x)"}, fingerprint={"family": "x')"}
    ).card()
    assert "# ```` ```<img>` ````" in card and "`` a `](x) ``" in card
    (code,) = re.findall(r"````python\n(.*?)````\n", card, re.DOTALL)
    compile(code, "card", "exec")


def test_generate_draws_what_lies_on_the_hub(
    given: Concept, hub: LocalHub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    given.push_to_hub("me/bear", token="right", private=False)
    monkeypatch.chdir(tmp_path)
    words = [f"path={tiny_pipeline_folder(tmp_path)}", "device=cpu", "steps=1", "num=1", "prompt=a <bear*>", "out=out"]
    assert run_cli(generate, ["concept=hub:me/bear", *words]) == 0
    (record,) = read_manifest("out")
    assert record.concept_hash == given.hash
    assert run_cli(generate, ["concept=[hub:me/bear@v1, hub:me/bear]", *words]) == 2, "twice the same word"
    assert any(path.startswith("/me/bear/resolve/v1/") for path, _ in hub.received)


@pytest.mark.parametrize("content", [b"", b"\x80\x04K\x01.", b"x" * 100, bytes(8) + b"{}"])
def test_what_is_downloaded_is_checked_as_any_file_is(content: bytes, hub: LocalHub, capsys: Any) -> None:
    hub.repositories["you/cat"] = {"concept.safetensors": content}
    with pytest.raises(ConceptFileError, match=r"concept\.safetensors: found"):
        Concept.from_pretrained("you/cat")
    for command in (generate, inspect):
        assert run_cli(command, ["concept=hub:you/cat", "prompt=a <cat*>"]) == 2
        assert "expected a concept" in capsys.readouterr().err


def test_what_the_hub_does_not_give_or_take(given: Concept, hub: LocalHub, monkeypatch: pytest.MonkeyPatch) -> None:
    hub.repositories |= {"you/empty": {"README.md": b""}, "you/mine": {"concept.safetensors": b"x"}}
    hub.private.add("you/mine")
    with pytest.raises(HubError, match=r"hub:you/empty: found no concept\.safetensors in it"):
        Concept.from_pretrained("you/empty")
    for name in ("you/none", "you/mine"):
        with pytest.raises(HubError, match=rf"hub:{name}: found no such repository that may be read .*hf auth login"):
            Concept.from_pretrained(name)
    with pytest.raises(HubError, match=r"hub:me/bear: the hub did not take it .*hf auth login"):
        given.push_to_hub("me/bear", token="wrong")
    for name in ("bear", "a/b/c", "me/b ear", "../x", "me/"):
        for call in (given.push_to_hub, Concept.from_pretrained):
            with pytest.raises(HubError, match="expected the name of a repository, owner/name"):
                call(name)
    monkeypatch.setattr(module, "offline", lambda: True)
    with pytest.raises(HubError, match=r"hub:you/none: found no such repository in the hub's cache, and the hub is"):
        Concept.from_pretrained("you/none")
    with pytest.raises(HubError, match="found no way to the hub"):
        given.push_to_hub("me/bear")


def test_a_folder_is_read_without_the_hub(given: Concept) -> None:
    assert Concept.from_pretrained(Path(given.source).parent).hash == given.hash
