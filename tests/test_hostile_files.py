"""Files from strangers: each is refused in a sentence, or is a concept that draws; soon, and without a trace."""

from __future__ import annotations

import dataclasses
import functools
import itertools
import json
import os
import socket
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import load, save

from perfusion import inspect
from perfusion.backbones.base import Backbone
from perfusion.cli import USER_ERROR, run_cli
from perfusion.concept import Concept, ConceptFileError, save_concept
from perfusion.editing import EditError, TokenError
from perfusion.methods.base import Word
from tests.concepts import Snapshot, random_concept, untrained_concept

LIMIT = 5.0  # seconds; a file takes a small part of one, and the rest is for machines that are busy
WORD = Word("<bear*>", "teddy bear")
PROMPTS = ["a photo of a <bear*> on the beach", "", "<bear*>"]

Header = dict[str, Any]


@pytest.fixture(scope="module")
def valid(backbone: Backbone, tmp_path_factory: pytest.TempPathFactory) -> bytes:
    path = tmp_path_factory.mktemp("valid") / "bear.safetensors"
    save_concept(path, untrained_concept(backbone, WORD, seed=7))
    return path.read_bytes()


@pytest.fixture(scope="module")
def encodings(backbone: Backbone) -> torch.Tensor:
    pipe: Any = backbone.pipe
    texts = [prompt.replace(WORD.placeholder, "cat") for prompt in PROMPTS]
    return pipe.encode_prompt(texts, torch.device("cpu"), 1, False)[0]


@pytest.fixture(autouse=True)
def untouched(backbone: Backbone) -> Iterator[None]:
    before = Snapshot(backbone.pipe)
    yield
    assert before.differences() == []


def answer(backbone: Backbone, path: Any, encodings: torch.Tensor) -> str:
    """What a file is answered with: an error's message, or "" where all that it edits is finite."""
    started = time.monotonic()
    try:
        concept = Concept.load(path)
        with concept.attach(backbone), torch.no_grad():
            pipe: Any = backbone.pipe
            prompt = f"a photo of {concept.placeholder}"
            own = pipe.encode_prompt(prompt, torch.device("cpu"), 1, False)[0]
            for site in backbone.edit_sites():
                module: Any = site.projection
                assert torch.isfinite(module(torch.cat([own, encodings]))).all(), site.name
        assert concept.hash and inspect.describe_concept(concept, Path(path))
        message = ""
    except (ConceptFileError, TokenError) as error:
        message = str(error)
        assert isinstance(error, TokenError) or str(path)[:100] in message
        assert message.isprintable() and len(message) < 2000, message
    assert time.monotonic() - started < LIMIT
    return message


def parts(content: bytes) -> tuple[Header, bytes]:
    size = int.from_bytes(content[:8], "little")
    return json.loads(content[8 : 8 + size]), content[8 + size :]


def whole(header: Header | bytes, data: bytes) -> bytes:
    packed = header if isinstance(header, bytes) else json.dumps(header).encode()
    return len(packed).to_bytes(8, "little") + packed + data


def metadata(**changes: str) -> Callable[[Header, bytes], bytes]:
    def change(header: Header, data: bytes) -> bytes:
        return whole({**header, "__metadata__": header["__metadata__"] | changes}, data)

    return change


def options(text: str) -> Callable[[Header, bytes], bytes]:
    """The settings with `text`, JSON of an object without its braces, at their end."""

    def change(header: Header, data: bytes) -> bytes:
        old = json.loads(header["__metadata__"]["settings"])
        key = json.loads("{" + text.split(":")[0] + ":0}").popitem()[0]
        old.pop(key, None)
        return metadata(settings=json.dumps(old)[:-1] + f", {text}}}")(header, data)

    return change


def tensor(dtype: str, shape: list[int], size: int) -> Callable[[Header, bytes], bytes]:
    def change(header: Header, data: bytes) -> bytes:
        added = {"dtype": dtype, "shape": shape, "data_offsets": [len(data), len(data) + size]}
        return whole({**header, "more": added}, data + bytes(size))

    return change


def rewritten(change: Callable[[dict[str, torch.Tensor]], object]) -> Callable[[Header, bytes], bytes]:
    """The file with its tensors changed in place."""

    def made(header: Header, data: bytes) -> bytes:
        content = load(whole(header, data))
        change(content)
        return save(content, header["__metadata__"])

    return made


def replaced(field: str, **changes: Any) -> Callable[[Header, bytes], bytes]:
    """The file with other values in the JSON object that an entry of its metadata is."""
    return lambda h, d: metadata(**{field: json.dumps(json.loads(h["__metadata__"][field]) | changes)})(h, d)


def lacking(field: str) -> Callable[[Header, bytes], bytes]:
    def change(header: Header, data: bytes) -> bytes:
        kept = {key: value for key, value in header["__metadata__"].items() if key != field}
        return whole({**header, "__metadata__": kept}, data)

    return change


def twice(key: str, *inside: str) -> Callable[[Header, bytes], bytes]:
    """The file with an entry of its header that stands there twice, which safetensors itself does not mind."""

    def change(header: Header, data: bytes) -> bytes:
        value = functools.reduce(dict.__getitem__, inside, header)[key]
        entry = json.dumps({key: value})[1:-1]
        return whole(json.dumps(header).replace(entry, f"{entry}, {entry}").encode(), data)

    return change


def more_tensors(count: int) -> Callable[[Header, bytes], bytes]:
    def change(header: Header, data: bytes) -> bytes:
        at = len(data)
        added = {
            f"x{k}": {"dtype": "F16", "shape": [1], "data_offsets": [at + 2 * k, at + 2 * k + 2]} for k in range(count)
        }
        return whole({**header, **added}, data + bytes(2 * count))

    return change


def values(name: str, value: float) -> Callable[[Header, bytes], bytes]:
    """All values of a tensor become `value`."""
    return rewritten(lambda tensors: tensors[name].fill_(value))


def in_single_precision(value: float) -> Callable[[Header, bytes], bytes]:
    """The last value of a tensor in float32 is `value`."""
    return rewritten(lambda tensors: tensors.update(target_input=torch.tensor([1.0] * 31 + [value])))


HOSTILE = {
    "four bits": (tensor("F4", [4], 2), "found F4, expected one of"),
    "eight bits": (tensor("F8_E4M3", [4], 4), "found F8_E4M3, expected one of"),
    "complex": (tensor("C64", [1], 8), "found C64, expected one of"),
    "whole numbers": (tensor("I64", [1], 8), "found I64, expected one of"),
    "empty": (tensor("F32", [0], 0), "found shape (0,), expected some values"),
    "empty and huge": (tensor("F32", [0, 2**61], 0), "found shape (0, 2305843009213693952), expected some values"),
    "many dimensions": (tensor("F32", [1] * 5000, 4), "in 8 dimensions at most"),
    "overflow": (tensor("F32", [2**62, 2**62], 8), "no readable safetensors file"),
    "20,000 tensors": (more_tensors(20_000), "found 20,005 tensors, expected 4,096 at most"),
    "4,000 tensors": (more_tensors(4_000), "found a tensor 'x0' (1,), expected only"),
    "a tensor's long name": (lambda h, d: whole({**h, "x" * 9000: h["values"]}, d), "no readable"),
    "NaN": (values("values", float("nan")), "values NaN or infinite in float16"),
    "larger than float16": (in_single_precision(1e38), "1 of 32 values beyond ±65,504 in float32"),
    "i* of length 0": (values("target_input", 0.0), "at a right angle or of length 0"),
    "direction of length 0": (values("direction", 0.0), "at a right angle or of length 0"),
    "300,000 entries": (metadata(**{f"k{k}": "" for k in range(300_000)}), "found a header of"),
    "1,000 entries": (metadata(**{f"k{k}": "" for k in range(1000)}), "entries of metadata, expected 64 at most"),
    "a long entry": (metadata(more="x" * 100_000), "found 100,000 characters, expected 16,384 at most"),
    "nested metadata": (metadata(settings="[" * 10_000), "metadata 'settings': found '[[["),
    "nested objects": (metadata(settings='{"a":' * 3000 + "1" + "}" * 3000), "metadata 'settings': found"),
    "deep settings": (options('"more": [[[[[1]]]]]'), "and a depth of 4"),
    "a nested header": (lambda h, d: whole(b"[" * 100_000, d), "no readable safetensors file"),
    "a header of digits": (lambda h, d: whole(b'{"a":' + b"1" * 10_000 + b"}", d), "no readable safetensors file"),
    "a header of objects": (
        lambda h, d: whole(b'{"a":[' + b"{}," * 600_000 + b"{}]}", d),
        "no readable safetensors file",
    ),
    "a header of names": (
        lambda h, d: whole(b"{" + b",".join(b'"%d":0' % k for k in range(150_000)) + b"}", d),
        "found 150,000 tensors, expected",
    ),
    "1e29": (options('"sample_beta": 1e29'), "sample_beta: found 1e+29, expected 0 or a number"),
    "a whole number of 400 digits": (options(f'"sample_beta": {10**400}'), "found a whole number of 1329 bits"),
    "a whole number of 10,000 digits": (options(f'"steps": 1{"0" * 10_000}'), "expected a JSON object"),
    "digits as text": (options(f'"sample_beta": "{"9" * 500}"'), "sample_beta: found infinity"),
    "NaN in settings": (options('"sample_beta": NaN'), "found a number that is none"),
    "NaN as text": (options('"sample_beta": "nan"'), "found a number that is none"),
    "infinity in settings": (options('"sample_tau": Infinity'), "found infinity"),
    "τ of almost 0": (options('"sample_tau": 1e-60'), "sample_tau: found 1e-60"),
    "a list for a number": (options('"sample_tau": [1, 2]'), "cannot use it: method.sample_tau"),
    "an object for a number": (options('"sample_tau": {"a": 1}'), "cannot use it: method"),
    "none for a number": (options('"sample_tau": null'), "cannot use it: method.sample_tau"),
    "a number for a word": (options('"key_lock": 7'), "cannot use it: method.key_lock"),
    "billions of vectors": (options('"vectors": 999999999'), "found shape (1, 32), expected (999999999, 32)"),
    "a missing value": (options('"sample_tau": "???"'), "expected text without '${' and '???'"),
    "the environment": (options('"name2": "${oc.env:HOME}"'), "expected text without '${'"),
    "another method in settings": (options('"name": "dreambooth"'), "found a name, expected it as metadata 'method'"),
    "another module": (metadata(method="../../concept"), "no method '../../concept'"),
    "a dunder": (metadata(method="__init__"), "no method '__init__'"),
    "a long method": (metadata(method="x" * 10_000), "metadata 'method': found"),
    "a seed": (metadata(seed="1" + "0" * 4000), "found 4001 digits"),
    "numbers for texts": (metadata(fingerprint='{"family": 5}'), "found family of type int, expected text"),
    "lists for texts": (metadata(versions='{"torch": ["a"]}'), "found torch of type list, expected text"),
    "terminal control": (metadata(commit="\x1b[2J"), "expected at most 1,024, all of them printable"),
    "half a character": (metadata(versions='{"torch": "\\ud800"}'), "all of them printable"),
    "a long placeholder": (metadata(placeholder="x" * 1_000_000), "found 1,000,000 characters"),
    "a placeholder of 65": (metadata(placeholder="x" * 65), "expected at most 64, all of them printable"),
    "a long superclass": (metadata(superclass="cat " * 40), "expected at most 128, all of them printable"),
    "a superclass of many tokens": (metadata(superclass="!?" * 60), "tokens, expected 32 at most"),
    "two words": (metadata(placeholder="a b"), "expected one word without spaces"),
    "no superclass": (metadata(superclass=" "), "expected one or several words"),
    "the letter é": (metadata(placeholder="é"), "'é' stands for a byte or a part of a word"),
    "a letter in two parts": (metadata(placeholder="<e\u0301*>"), "reads as '<é*>', expected a word that it leaves"),
    "another file": (lambda h, d: save({"weight": torch.zeros(3)}), "without 'format_version'"),
    "another version": (metadata(format_version="2"), "found format version 2, expected 1"),
    "a tensor twice": (twice("target_input"), "found 'target_input' twice in the header"),
    "an entry twice": (twice("seed", "__metadata__"), "found 'seed' twice in the header"),
    "a seed in letters": (metadata(seed="seven"), "metadata 'seed': found 'seven', expected a whole number"),
    "broken settings": (metadata(settings="{broken"), "metadata 'settings': found '{broken', expected a JSON object"),
    "a list for a fingerprint": (metadata(fingerprint="[1, 2]"), "metadata 'fingerprint': found '[1, 2]', expected a"),
    "an unknown option": (replaced("settings", betta=1.0), "this version of perfusion cannot use it: "),
    "a word for a number": (replaced("settings", tau="warm"), "this version of perfusion cannot use it: "),
    "of another family": (replaced("fingerprint", family="sdxl"), "found family stable_diffusion, expected sdxl"),
    "of other words": (replaced("fingerprint", text_encoder="0" * 16), ", expected 0000000000000000"),
    "of other projections": (replaced("fingerprint", projections="0" * 16), ", expected 0000000000000000"),
    "of other prompts": (replaced("fingerprint", prompts="toyland"), "found prompts imagenet, expected toyland"),
    "of two encoders": (replaced("fingerprint", text_encoder_2="f" * 16), "found text_encoder_2 none, expected ffff"),
    "without values": (rewritten(lambda t: t.pop("values")), "found no tensor 'values', expected one ("),
    "without its word": (rewritten(lambda t: t.pop("embedding.text_encoder")), "found no tensor 'embedding.text_enc"),
    "a tensor too many": (
        rewritten(lambda t: t.update(keys=torch.zeros(3))),
        "found a tensor 'keys' (3,), expected only target_input, direction, values, embedding.text_encoder",
    ),
    "a value too few": (
        rewritten(lambda t: t.update(values=t["values"][1:].clone())),
        "expected (216,) on this backbone",
    ),
    "a dimension too many": (
        rewritten(lambda t: t.update(target_input=t["target_input"][None].clone())),
        "tensor 'target_input': found shape (1, 32), expected (32,)",
    ),
    "no safetensors": (lambda h, d: b"PK\x03\x04" + bytes(200), "no readable safetensors file"),
    "a pickle": (lambda h, d: b"\x80\x02}q\x00.", "no readable safetensors file"),
    "nothing": (lambda h, d: b"", "no readable safetensors file"),
    "truncated": (lambda h, d: whole(h, d)[:-1], "no readable safetensors file"),
    "too much": (lambda h, d: whole(h, d) + b"x", "no readable safetensors file"),
}


FIELDS = ["method", "superclass", "placeholder", "settings", "fingerprint", "covariance", "seed", "versions", "commit"]
HOSTILE |= {f"without {field}": (lacking(field), f"found no metadata '{field}'") for field in FIELDS}


@pytest.mark.parametrize("kind", HOSTILE)
def test_a_hostile_file_is_refused_in_a_sentence(
    backbone: Backbone, valid: bytes, encodings: torch.Tensor, tmp_path: Path, kind: str
) -> None:
    change, message = HOSTILE[kind]
    path = tmp_path / "x.safetensors"
    path.write_bytes(change(*parts(valid)))
    assert message in answer(backbone, path, encodings)


def test_the_file_that_they_are_made_of_is_a_concept(
    backbone: Backbone, valid: bytes, encodings: torch.Tensor, tmp_path: Path
) -> None:
    path = tmp_path / "x.safetensors"
    for content in (valid, whole(*parts(valid)), in_single_precision(2.0)(*parts(valid))):
        path.write_bytes(content)
        assert answer(backbone, path, encodings) == ""


def test_what_is_no_file_is_not_waited_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    os.mkfifo("pipe")
    with socket.socket(socket.AF_UNIX) as server:
        server.bind("socket")
        for path, message in (
            ("pipe", "found a pipe, expected a file"),
            ("socket", "found a socket, expected a file"),
            (".", "found a folder, expected a file"),
            ("/dev/zero", "found a device, expected a file"),
            ("", "found no such file"),
            ("nothing", "found no such file"),
            ("pipe/x", "found no such file"),
            ("x" * 5000, "found no such file (File name too long)"),
            ("a\0b", "found no such file"),
            (b"pipe", "found a path of type bytes, expected text"),
            (None, "found a path of type NoneType, expected text"),
            (0, "found a path of type int, expected text"),
        ):
            with pytest.raises(ConceptFileError) as caught:
                Concept.load(path)  # type: ignore[arg-type]
            assert message in str(caught.value) and len(str(caught.value)) < 500


def test_a_file_of_a_terabyte_is_not_read(tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    header = json.dumps({"x": {"dtype": "F16", "shape": [2**39], "data_offsets": [0, 2**40]}}).encode()
    path.write_bytes(whole(header, b""))
    os.truncate(path, 8 + len(header) + 2**40)  # without taking up any
    with pytest.raises(ConceptFileError, match=r"found 1,\d+,\d+,\d+,\d+ bytes, expected a concept of at most"):
        Concept.load(path)


def test_inspect_refuses_likewise(valid: bytes, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "x.safetensors"
    path.write_bytes(tensor("F32", [0], 0)(*parts(valid)))
    assert run_cli(inspect.main, [str(path)]) == USER_ERROR
    assert "found shape (0,)" in capsys.readouterr().err
    assert run_cli(inspect.main, ["x" * 5000]) == USER_ERROR


@pytest.mark.parametrize("name", ["lora", "textual_inversion", "dreambooth", "custom_diffusion"])
def test_settings_of_other_methods(backbone: Backbone, encodings: torch.Tensor, tmp_path: Path, name: str) -> None:
    concept = random_concept(backbone, WORD, 0, name=name)
    path = tmp_path / "x.safetensors"
    save_concept(path, concept)
    assert answer(backbone, path, encodings) == ""
    for key, value in (("steps", 1e29), ("batch_size", 10**400), ("weight_decay", "nan"), ("masked_loss", {})):
        save_concept(path, dataclasses.replace(concept, settings=concept.settings | {key: value}))
        assert key in answer(backbone, path, encodings)


def test_layers_that_are_not_there(backbone: Backbone, encodings: torch.Tensor, tmp_path: Path) -> None:
    concept = random_concept(backbone, WORD, 0, name="lora")
    path = tmp_path / "x.safetensors"
    save_concept(path, dataclasses.replace(concept, settings=concept.settings | {"targets": ["nowhere"]}))
    assert "nowhere" in answer(backbone, path, encodings)


# --- failures while it is being attached ------------------------------------------------------------------------------


def test_whatever_fails_while_attaching_leaves_no_trace(
    backbone: Backbone, valid: bytes, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "x.safetensors"
    path.write_bytes(valid)
    concept = Concept.load(path)
    before = Snapshot(backbone.pipe)
    for target in (
        "perfusion.editing.words.taught",
        "perfusion.editing.words.Words.place",
        "perfusion.editing.words.spelled",
        "perfusion.methods.perfusion.attach_edit",
        "perfusion.methods.perfusion.Perfusion.load_state",
        "perfusion.concept.Attached",
    ):

        def fail(*args: Any, **kwargs: Any) -> Any:
            raise RuntimeError("out of memory")

        with monkeypatch.context() as patch:
            patch.setattr(target, fail)
            with pytest.raises(RuntimeError, match="out of memory"):
                concept.attach(backbone)
        assert before.differences() == [], target
    for dials in ({"beta": float("nan")}, {"tau": 0.0}, {"key_lock": "none"}):
        with pytest.raises(EditError):
            concept.attach(backbone, **dials)
        assert before.differences() == [], dials


def test_a_failure_leaves_those_that_are_attached(
    backbone: Backbone, valid: bytes, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, other = tmp_path / "x.safetensors", untrained_concept(backbone, Word("<dog*>", "dog"), 1)
    with other.attach(backbone):
        before = Snapshot(backbone.pipe)
        for kind in ("i* of length 0", "the letter é", "20,000 tensors"):
            path.write_bytes(HOSTILE[kind][0](*parts(valid)))
            with pytest.raises(ValueError):
                Concept.load(path).attach(backbone)
            assert before.differences() == [], kind

        concept = dataclasses.replace(other, placeholder="<bear*>")

        def fail(*args: Any) -> None:
            raise RuntimeError("out of memory")

        monkeypatch.setattr("perfusion.methods.perfusion.Perfusion.load_state", fail)
        with pytest.raises(RuntimeError, match="out of memory"):
            concept.attach(backbone)
        assert before.differences() in ([], ["tokenizer"])  # which may be another copy
        assert [*backbone.pipe.tokenizer.added_tokens_encoder] == [*before.known["tokenizer"][1]]


# --- any file ---------------------------------------------------------------------------------------------------------

NUMBERS = st.one_of(st.integers(), st.floats(), st.sampled_from([10**400, 1e29, -1, 0, 1e-300, 2**63]))
JSON = st.recursive(
    st.one_of(st.none(), st.booleans(), NUMBERS, st.text(max_size=20)),
    lambda inner: st.one_of(st.lists(inner, max_size=4), st.dictionaries(st.text(max_size=8), inner, max_size=4)),
    max_leaves=8,
)
KEYS = ["beta", "tau", "sample_beta", "sample_tau", "key_lock", "vectors", "steps", "ema", "masked_loss", "name"]
FUZZ = {"deadline": None, "database": None, "derandomize": True, "suppress_health_check": list(HealthCheck)}


@st.composite
def headers(draw: st.DrawFn, valid: bytes) -> bytes:
    """The valid file with one entry of its metadata, setting or tensor changed for another."""
    header, data = parts(valid)
    told = header["__metadata__"]
    kind = draw(st.sampled_from(["settings", "entry", "json", "tensor"]))
    if kind == "settings":
        changed = json.loads(told["settings"]) | {draw(st.sampled_from(KEYS)): draw(JSON)}
        told["settings"] = json.dumps(changed)
    elif kind == "entry":
        told[draw(st.sampled_from(FIELDS))] = draw(st.text(max_size=80))
    elif kind == "json":
        told[draw(st.sampled_from(FIELDS))] = json.dumps(draw(JSON))
    else:
        name = draw(st.sampled_from([name for name in header if name != "__metadata__"]))
        part = draw(st.sampled_from(["dtype", "shape", "data_offsets"]))
        types = st.sampled_from(["F16", "BF16", "F32", "F4", "F8_E5M2", "C64", "BOOL", "I8", ""])
        sizes = st.lists(st.integers(-1, 2**64), max_size=4)
        header[name][part] = draw(types if part == "dtype" else sizes)
    return whole(header, data)


def mutated(valid: bytes, draw: np.random.Generator) -> bytes:
    """The valid file with some bytes changed, cut out, doubled or made of others; half of them in its header."""
    content = bytearray(valid)
    end = 8 + int.from_bytes(valid[:8], "little") if draw.random() < 0.5 else len(content)
    for _ in range(draw.integers(1, 4)):
        at, length = int(draw.integers(0, end)), int(draw.integers(1, 9))
        match draw.integers(0, 5):
            case 0:
                content[at : at + 1] = draw.bytes(1)
            case 1:
                content[at : at + length] = draw.bytes(length)
            case 2:
                del content[at : at + length]
            case 3:
                content[at:at] = content[at : at + length]
            case _:  # a digit or letter for another, so that JSON stays JSON
                content[at : at + 1] = draw.choice([*b'0123456789eE-.{}[]",:azAZ$'], 1).astype("u1").tobytes()
    return bytes(content)


def fuzzed(backbone: Backbone, valid: bytes, encodings: torch.Tensor, folder: Path, examples: int) -> int:
    """Twice `examples` files, half of them Hypothesis's; gives how many there were."""
    path, tried = folder / "x.safetensors", itertools.count()

    @settings(max_examples=examples, **FUZZ)
    @given(headers(valid))
    def refused_or_drawn(content: bytes) -> None:
        next(tried)
        path.write_bytes(content)
        answer(backbone, path, encodings)

    refused_or_drawn()
    draw = np.random.default_rng(0)
    answers = []
    for _ in range(examples):
        path.write_bytes(mutated(valid, draw))
        answers.append(answer(backbone, path, encodings))
    assert "" in answers and len(set(answers)) > 5
    return next(tried) + len(answers)


def test_any_file_is_refused_or_drawn(
    backbone: Backbone, valid: bytes, encodings: torch.Tensor, tmp_path: Path
) -> None:
    assert fuzzed(backbone, valid, encodings, tmp_path, examples=250) >= 400


@pytest.mark.slow
@pytest.mark.trust
def test_many_files_are_refused_or_drawn(
    backbone: Backbone,
    valid: bytes,
    encodings: torch.Tensor,
    tmp_path: Path,
    record_property: Callable[[str, object], None],
) -> None:
    record_property("files", fuzzed(backbone, valid, encodings, tmp_path, examples=5000))
