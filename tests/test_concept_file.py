"""Concept files: what they hold, how large they are, and what is said about one that cannot be used."""

import dataclasses
import json
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from perfusion import provenance
from perfusion.backbones import around
from perfusion.backbones.base import Backbone
from perfusion.backbones.layouts import meta_pipeline
from perfusion.concept import Concept, ConceptFileError, read, save_concept
from perfusion.methods.base import Word, build
from tests.concepts import things, things_and_hooks, untrained_concept
from tests.pipelines import tiny_pipeline, toyland_pipeline

WORD = Word("<bear*>", "teddy bear")
PROMPT = "a photo of a <bear*> on the beach"


@pytest.fixture(scope="module")
def concept(backbone: Backbone) -> Concept:
    return untrained_concept(backbone, WORD, seed=7)


@pytest.fixture
def path(concept: Concept, tmp_path: Path) -> Path:
    save_concept(tmp_path / "bear.safetensors", concept)
    return tmp_path / "bear.safetensors"


@pytest.fixture(autouse=True)
def untouched(backbone: Backbone) -> Iterator[None]:
    """No test leaves a trace on the pipeline, least of all one in which attaching fails."""
    before = things(backbone)
    yield
    assert things(backbone) == before


# --- what a file holds ------------------------------------------------------------------------------------------------


def test_a_file_gives_back_what_was_saved(backbone: Backbone, concept: Concept, path: Path) -> None:
    loaded = Concept.load(path)
    for field in dataclasses.fields(Concept):
        if field.name not in ("tensors", "source"):
            assert getattr(loaded, field.name) == getattr(concept, field.name), field.name
    assert loaded.source == str(path)
    assert (loaded.method, loaded.superclass, loaded.placeholder) == ("perfusion", "teddy bear", "<bear*>")
    assert loaded.seed == 7 and loaded.settings["sample_beta"] == 0.4 and loaded.settings["key_lock"] == "local"
    assert loaded.covariance == "everyday:50:0.01"
    assert set(loaded.versions) == {"perfusion", "torch", "diffusers", "transformers"} - (
        set() if "perfusion" in provenance.provenance()["versions"] else {"perfusion"}
    )
    assert loaded.fingerprint == {**backbone.fingerprint(), "prompts": "imagenet"}
    assert loaded.fingerprint.keys() == {"family", "text_encoder", "projections", "prompts"}
    assert loaded.tensors.keys() == concept.tensors.keys()
    for name, tensor in loaded.tensors.items():
        assert tensor.dtype == torch.float16 and torch.equal(tensor, concept.tensors[name].half()), name


def test_a_file_is_plain_safetensors(path: Path) -> None:
    assert load_file(path).keys() == {"target_input", "direction", "values", "embedding.text_encoder"}
    tensors, metadata = read(path)
    assert metadata["format_version"] == "1" and all(isinstance(value, str) for value in metadata.values())
    assert all(torch.equal(tensor, load_file(path)[name]) for name, tensor in tensors.items())


def test_single_precision_on_request(concept: Concept, tmp_path: Path) -> None:
    save_concept(tmp_path / "x.safetensors", concept, dtype=torch.float32)
    loaded = Concept.load(tmp_path / "x.safetensors")
    assert all(torch.equal(loaded.tensors[name], tensor) for name, tensor in concept.tensors.items())


def test_the_hash_is_that_of_the_files_tensors(concept: Concept, path: Path, tmp_path: Path) -> None:
    loaded = Concept.load(path)
    assert len(loaded.hash) == 12 and loaded.hash == concept.rounded(torch.float16).hash != concept.hash
    assert dataclasses.replace(loaded, seed=8).hash == loaded.hash
    assert save_concept(tmp_path / "again.safetensors", loaded).hash == loaded.hash
    values = loaded.tensors["values"].clone()
    values[3] += 0.01
    assert dataclasses.replace(loaded, tensors={**loaded.tensors, "values": values}).hash != loaded.hash


@pytest.mark.parametrize(
    ("layout", "values", "others", "limit"),
    [("sd15", 12_480, 3 * 768, 30_720), ("sd21", 12_480, 3 * 1024, 32_768), ("sdxl", 83_200, 3 * 2048, 180_000)],
)
def test_a_concept_in_a_public_layout_is_as_small_as_it_is_said_to_be(
    layout: str, values: int, others: int, limit: int, concept: Concept, tmp_path: Path
) -> None:
    backbone = around(meta_pipeline(layout))
    method = build({"name": "perfusion", "sample_beta": 0.675}, WORD)
    shapes = method.state_shapes(backbone)
    numbers = sum(torch.Size(shape).numel() for shape in shapes.values())
    assert shapes["values"] == (values,) and numbers == values + others
    realistic = dataclasses.replace(
        concept,
        tensors={name: torch.randn(shape) for name, shape in shapes.items()},
        superclass="stuffed animal",
        placeholder="<my-stuffed-animal*>",
        fingerprint=dict.fromkeys((*backbone.text_encoders(), "projections"), "0123456789abcdef")
        | {"family": backbone.family, "prompts": "imagenet"},
        fingerprint_bfloat16=dict.fromkeys((*backbone.text_encoders(), "projections"), "0123456789abcdef"),
        settings=concept.settings | {"sample_beta": 0.675, "value_rate": 0.0125, "weight_decay": 0.0001, "steps": 1000},
        covariance="everyday:10000:0.01",
        seed=2**32 - 1,
        versions={"perfusion": "0.10.0", "torch": "2.15.0+cu130", "diffusers": "0.42.1", "transformers": "5.23.0"},
        commit="0123456789ab",
    )
    assert all(len(v) == 16 for part, v in concept.fingerprint.items() if part in ("text_encoder", "projections"))
    save_concept(tmp_path / "x.safetensors", realistic)
    assert 2 * numbers < (tmp_path / "x.safetensors").stat().st_size <= limit
    assert Concept.load(tmp_path / "x.safetensors").versions == realistic.versions


# --- saving -----------------------------------------------------------------------------------------------------------


def test_a_failed_save_leaves_the_old_file(concept: Concept, path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = path.read_bytes()
    other = dataclasses.replace(concept, seed=99)

    def full_disk(source: object, target: object) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", full_disk)
        with pytest.raises(OSError, match="No space left"):
            save_concept(path, other)
    assert path.read_bytes() == before and [file.name for file in path.parent.iterdir()] == [path.name]
    save_concept(path, other)
    assert Concept.load(path).seed == 99


def test_saving_makes_the_folder(concept: Concept, tmp_path: Path) -> None:
    save_concept(tmp_path / "a" / "b" / "x.safetensors", concept)
    assert Concept.load(tmp_path / "a" / "b" / "x.safetensors").hash == concept.rounded(torch.float16).hash


@pytest.mark.parametrize("value", [float("nan"), 1e6])
def test_what_half_precision_cannot_hold_is_not_saved(concept: Concept, tmp_path: Path, value: float) -> None:
    values = concept.tensors["values"].clone()
    values[5] = value
    broken = dataclasses.replace(concept, tensors={**concept.tensors, "values": values})
    with pytest.raises(ConceptFileError, match=r"tensor 'values': found 1 of .* NaN or infinite in float16"):
        save_concept(tmp_path / "x.safetensors", broken)
    assert not list(tmp_path.iterdir())


# --- files that cannot be used ----------------------------------------------------------------------------------------


def rewrite(path: Path, change: Callable[[dict[str, Tensor], dict[str, str]], object]) -> None:
    """`path` again, with its tensors and metadata changed in place by `change`."""
    tensors, metadata = read(path)
    change(tensors, metadata)
    save_file(tensors, path, metadata)


def rewrite_header(path: Path, old: str, new: str) -> None:
    content = path.read_bytes()
    size = int.from_bytes(content[:8], "little")
    header = content[8 : 8 + size].decode()
    assert header.count(old) == 1
    changed = header.replace(old, new).encode()
    path.write_bytes(len(changed).to_bytes(8, "little") + changed + content[8 + size :])


def refused(path: Path, message: str) -> None:
    with pytest.raises(ConceptFileError, match=message) as caught:
        Concept.load(path)
    assert str(path) in str(caught.value)


def test_no_file(tmp_path: Path) -> None:
    refused(tmp_path / "nowhere.safetensors", "found no such file")
    refused(tmp_path, "found a folder, expected a file")


@pytest.mark.parametrize("content", [b"", b"not safetensors at all", b"\x80\x02}q\x00.", b"\xff" * 64])
def test_no_safetensors(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "x.safetensors").write_bytes(content)
    refused(tmp_path / "x.safetensors", "found no readable safetensors file")


@pytest.mark.parametrize("share", [0.01, 0.5, 0.999])
def test_a_truncated_file(path: Path, share: float) -> None:
    content = path.read_bytes()
    path.write_bytes(content[: int(len(content) * share)])
    refused(path, "found no readable safetensors file")


def test_another_safetensors_file(tmp_path: Path) -> None:
    save_file({"weight": torch.zeros(3)}, tmp_path / "x.safetensors")
    refused(tmp_path / "x.safetensors", "without 'format_version'")


def test_an_unknown_version(path: Path) -> None:
    rewrite(path, lambda tensors, metadata: metadata.update(format_version="2"))
    refused(path, "found format version 2, expected 1")


def test_a_tensor_that_stands_twice(path: Path) -> None:
    size = Concept.load(path).tensors["target_input"].numel()
    entry = path.read_bytes()[8:].decode(errors="replace")
    start = entry.index('"target_input":')
    whole = entry[start : entry.index("}", start) + 1]
    assert f"[{size}]" in whole
    rewrite_header(path, whole, f"{whole},{whole}")
    assert "target_input" in load_file(path)  # safetensors itself does not mind
    refused(path, "found 'target_input' twice in the header")


def test_an_entry_that_stands_twice(path: Path) -> None:
    rewrite_header(path, '"seed":"7"', '"seed":"7","seed":"8"')
    load_file(path)
    refused(path, "found 'seed' twice in the header")


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
def test_values_that_are_not_finite(path: Path, bad: float) -> None:
    rewrite(path, lambda tensors, metadata: tensors["direction"][:2].fill_(bad))
    refused(path, "tensor 'direction': found 2 of 32 values NaN or infinite")


FIELDS = ["method", "superclass", "placeholder", "settings", "fingerprint", "covariance", "seed", "versions", "commit"]


@pytest.mark.parametrize("field", FIELDS)
def test_metadata_that_is_not_there(path: Path, field: str) -> None:
    rewrite(path, lambda tensors, metadata: metadata.pop(field))
    refused(path, f"found no metadata '{field}'")


@pytest.mark.parametrize("field", ["settings", "fingerprint", "versions"])
@pytest.mark.parametrize("text", ["{broken", "[1, 2]"])
def test_metadata_that_is_no_object(path: Path, field: str, text: str) -> None:
    rewrite(path, lambda tensors, metadata: metadata.update({field: text}))
    refused(path, f"metadata '{field}': found .* expected a JSON object")


def test_a_seed_that_is_no_number(path: Path) -> None:
    rewrite(path, lambda tensors, metadata: metadata.update(seed="seven"))
    refused(path, "metadata 'seed': found 'seven', expected a whole number")


def replaced(field: str, **changes: Any) -> Callable[[dict[str, Tensor], dict[str, str]], object]:
    return lambda tensors, metadata: metadata.update({field: json.dumps(json.loads(metadata[field]) | changes)})


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (replaced("fingerprint", family="sdxl"), "found family stable_diffusion, expected sdxl"),
        (replaced("fingerprint", text_encoder="0" * 16), r"found text_encoder \w{16}, expected 0{16}"),
        (replaced("fingerprint", projections="0" * 16), r"found projections \w{16}, expected 0{16}"),
        (replaced("fingerprint", prompts="toyland"), "found prompts imagenet, expected toyland"),
        (replaced("fingerprint", text_encoder_2="f" * 16), "found text_encoder_2 none, expected f{16}"),
        (replaced("settings", betta=1.0), "this version of perfusion cannot use it: .*betta"),
        (replaced("settings", tau="warm"), "this version of perfusion cannot use it: .*tau"),
        (lambda tensors, metadata: metadata.update(method="sorcery"), "cannot use it: .*no method 'sorcery'"),
        (lambda tensors, metadata: tensors.pop("values"), r"found no tensor 'values', expected one \(\d+,\)"),
        (lambda tensors, metadata: tensors.pop("embedding.text_encoder"), "found no tensor 'embedding.text_encoder'"),
        (
            lambda tensors, metadata: tensors.update(keys=torch.zeros(3)),
            r"found a tensor 'keys' \(3,\), expected only target_input, direction, values, embedding.text_encoder",
        ),
        (
            lambda tensors, metadata: tensors.update(values=tensors["values"][1:].clone()),
            r"tensor 'values': found shape \(\d+,\), expected \(\d+,\) on this backbone",
        ),
        (
            lambda tensors, metadata: tensors.update(target_input=tensors["target_input"][None].clone()),
            r"tensor 'target_input': found shape \(1, 32\), expected \(32,\)",
        ),
    ],
)
def test_a_concept_that_does_not_fit_is_refused_before_the_pipeline_is_touched(
    backbone: Backbone, path: Path, change: Callable[..., object], message: str
) -> None:
    rewrite(path, change)
    with pytest.raises(ConceptFileError, match=message) as caught:
        Concept.load(path).attach(backbone)
    assert str(path) in str(caught.value)


def test_a_file_of_toyland_s_first_world(tmp_path: Path) -> None:
    """It names no world, and nothing of it is attached to a pipeline of another one."""
    backbone = around(toyland_pipeline())
    method = build({"name": "textual_inversion"}, Word("<cat*>", "cat"))
    method.train().attach(backbone)
    concept = Concept.of(method, backbone, 0)
    method.detach()
    path = tmp_path / "cat.safetensors"
    save_concept(path, concept)
    loaded = Concept.load(path)
    assert loaded.fingerprint["world"] == "2"
    loaded.attach(backbone).detach()

    def first_world(_: dict[str, Tensor], metadata: dict[str, str]) -> None:
        fingerprint = json.loads(metadata["fingerprint"])
        del fingerprint["world"]
        metadata["fingerprint"] = json.dumps(fingerprint | {"text_encoder": "0" * 16, "projections": "1" * 16})

    rewrite(path, first_world)
    before = things_and_hooks(backbone.pipe)
    with pytest.raises(ConceptFileError) as caught:
        Concept.load(path).attach(backbone)
    assert str(caught.value) == f"{path}: made for Toyland's world 1, found world 2: train the concept anew"
    assert things_and_hooks(backbone.pipe) == before


def test_another_backbone_with_the_same_shapes_is_refused(path: Path) -> None:
    pipe = tiny_pipeline()
    with torch.no_grad():
        pipe.unet.mid_block.attentions[0].transformer_blocks[0].attn2.to_v.weight[0, 0] += 1
    with pytest.raises(ConceptFileError, match="made for another backbone: found projections"):
        Concept.load(path).attach(pipe)
