"""Concepts: their files, and in a stock pipeline, attached, set, drawn and taken out again.

test_hostile_files.py has the files that cannot be used.
"""

import dataclasses
import json
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from perfusion import provenance
from perfusion.backbones import around
from perfusion.backbones.base import Backbone, TokenError
from perfusion.backbones.layouts import meta_pipeline
from perfusion.concept import Concept, ConceptFileError, read, save_concept
from perfusion.editing import EditError
from perfusion.methods.base import Word, build
from tests.concepts import Snapshot, untrained_concept
from tests.drawing import BEAR, call
from tests.pipelines import toyland_pipeline

WORD = Word("<bear*>", "teddy bear")
pytestmark = pytest.mark.usefixtures("untouched")


@pytest.fixture(scope="module")
def concept(backbone: Backbone) -> Concept:
    return untrained_concept(backbone, WORD, seed=7)


@pytest.fixture
def path(concept: Concept, tmp_path: Path) -> Path:
    save_concept(tmp_path / "bear.safetensors", concept)
    return tmp_path / "bear.safetensors"


# --- files ------------------------------------------------------------------------------------------------------------


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


def test_saving_makes_the_folder(concept: Concept, tmp_path: Path) -> None:
    save_concept(tmp_path / "a" / "b" / "x.safetensors", concept)
    assert Concept.load(tmp_path / "a" / "b" / "x.safetensors").hash == concept.rounded(torch.float16).hash


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


@pytest.mark.parametrize("value", [float("nan"), 1e6])
def test_what_half_precision_cannot_hold_is_not_saved(concept: Concept, tmp_path: Path, value: float) -> None:
    values = concept.tensors["values"].clone()
    values[5] = value
    broken = dataclasses.replace(concept, tensors={**concept.tensors, "values": values})
    with pytest.raises(ConceptFileError, match=r"tensor 'values': found 1 of .* NaN or infinite in float16"):
        save_concept(tmp_path / "x.safetensors", broken)
    assert not list(tmp_path.iterdir())


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
    tensors, metadata = read(path)
    first_world = {**loaded.fingerprint, "text_encoder": "0" * 16, "projections": "1" * 16}
    del first_world["world"]
    save_file(tensors, path, metadata | {"fingerprint": json.dumps(first_world)})
    before = Snapshot(backbone.pipe)
    with pytest.raises(ConceptFileError) as caught:
        Concept.load(path).attach(backbone)
    assert str(caught.value) == f"{path}: made for Toyland's world 1, found world 2: train the concept anew"
    assert before.differences() == []


# --- in a pipeline ----------------------------------------------------------------------------------------------------


@torch.no_grad()
def test_a_stock_pipeline_draws_the_concept_in_three_lines(backbone: Backbone, path: Path) -> None:
    pipe: Any = backbone.pipe
    base = call(backbone.pipe, "a photo of a teddy bear on the beach")
    attached = Concept.load(path).attach(pipe)
    drawn = call(backbone.pipe, BEAR)
    assert attached.backbone.pipe is pipe and attached.concept.placeholder == "<bear*>"
    assert not attached.method.training and not any(p.requires_grad for p in attached.method.parameters())
    assert (attached.beta, attached.tau) == (0.4, 0.15)
    attached.detach()
    attached.detach()
    assert (drawn - base).abs().max() > 1e-3
    assert torch.equal(call(backbone.pipe, "a photo of a teddy bear on the beach"), base)


def test_the_concept_stays_when_the_handle_is_dropped(backbone: Backbone, path: Path) -> None:
    attached = Concept.load(path).attach(backbone)
    detach, expected = attached.detach, call(backbone.pipe, BEAR)
    del attached
    assert torch.equal(call(backbone.pipe, BEAR), expected)
    detach()


def test_strength_can_be_given_and_changed(backbone: Backbone, path: Path) -> None:
    concept = Concept.load(path)

    def drawn(prompts: list[str]) -> torch.Tensor:
        pipe: Any = backbone.pipe
        seeds = [torch.Generator().manual_seed(0) for _ in prompts]
        return pipe(prompts, generator=seeds, num_inference_steps=2, output_type="latent").images

    with concept.attach(backbone, beta=0.9, tau=0.3) as attached:
        assert (attached.beta, attached.tau) == (0.9, 0.3)
        weak = drawn([BEAR])
        attached.beta = 0.1
        strong = drawn([BEAR])
        attached.beta = torch.tensor([0.9, 0.1])
        both = drawn([BEAR, BEAR])
        assert (weak - strong).abs().max() > 1e-3
        torch.testing.assert_close(both, torch.cat((weak, strong)), rtol=1e-3, atol=1e-3)
        attached.tau = 3.0
        assert not torch.equal(drawn([BEAR, BEAR]), both)
        with pytest.raises(EditError, match="tau: found 0"):
            attached.tau = 0.0


def test_an_exception_inside_the_block_detaches(backbone: Backbone, path: Path) -> None:
    with pytest.raises(KeyError), Concept.load(path).attach(backbone):
        raise KeyError


def test_the_same_word_is_refused_and_the_first_stays(backbone: Backbone, path: Path) -> None:
    concept = Concept.load(path)
    with concept.attach(backbone):
        expected, before = call(backbone.pipe, BEAR), Snapshot(backbone.pipe)
        with pytest.raises(TokenError, match=r"'<bear\*>' is already a word"):
            concept.attach(backbone.pipe)
        assert before.differences() == []
        assert torch.equal(call(backbone.pipe, BEAR), expected)
