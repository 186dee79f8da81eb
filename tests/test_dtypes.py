"""A concept that was trained in one dtype, on weights in another: drawn where these can be told to be the same."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from perfusion.backbones import around
from perfusion.backbones.base import Backbone
from perfusion.concept import Concept, ConceptFileError, read, save_concept
from perfusion.methods.base import Word, available
from tests.concepts import random_concept, tiny_backbone, untrained_concept
from tests.drawing import PLAIN, PROMPT, call
from tests.pipelines import tiny_pipeline

DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}
ALL = [(trained_in, drawn_in) for trained_in in DTYPES for drawn_in in DTYPES]
ROUNDED_IN_TWO_WAYS = [("float16", "bfloat16"), ("bfloat16", "float16")]  # which leaves nothing to compare
WORD = Word("<cat*>", "cat")


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("covariance")


@pytest.fixture(scope="module")
def loaded(cache: Path) -> dict[str, Backbone]:
    """The same weights, which no half precision holds exactly, in every dtype."""
    backbones = {name: tiny_backbone(cache) for name in DTYPES}
    for name, dtype in DTYPES.items():
        pipe_of(backbones[name]).to(dtype)
    return backbones


@pytest.fixture(scope="module")
def trained(loaded: dict[str, Backbone], cache: Path) -> dict[str, Path]:
    """A concept file of each dtype; its pictures are far from the base model's."""
    files = {name: cache / f"{name}.safetensors" for name in DTYPES}
    for name, file in files.items():
        concept = untrained_concept(loaded[name], WORD, 0)
        tensors = {**concept.tensors, "values": concept.tensors["values"] * 20}
        save_concept(file, dataclasses.replace(concept, tensors=tensors))
    return files


@pytest.fixture(scope="module")
def exact(loaded: dict[str, Backbone], trained: dict[str, Path]) -> Tensor:
    """What is drawn where all is float32."""
    with Concept.load(trained["float32"]).attach(loaded["float32"]) as attached:
        return call(pipe_of(attached.backbone), PROMPT)


def pipe_of(backbone: Backbone) -> Any:
    return backbone.pipe  # type: ignore[attr-defined]


def a_value_projection(pipe: Any) -> torch.nn.Parameter:
    return pipe.unet.mid_block.attentions[0].transformer_blocks[0].attn2.to_v.weight


def refusal(concept: Concept, backbone: Any) -> str:
    with pytest.raises(ConceptFileError, match="made for another backbone") as caught:
        concept.attach(backbone)
    return str(caught.value)


@pytest.mark.parametrize(("trained_in", "drawn_in"), [pair for pair in ALL if pair not in ROUNDED_IN_TWO_WAYS])
def test_what_was_trained_in_one_dtype_is_drawn_in_another(
    trained_in: str, drawn_in: str, trained: dict[str, Path], loaded: dict[str, Backbone], exact: Tensor
) -> None:
    concept, pipe = Concept.load(trained[trained_in]), pipe_of(loaded[drawn_in])
    plain = call(pipe, PLAIN)
    with concept.attach(loaded[drawn_in]):
        found = call(pipe, PROMPT)
    assert found.dtype == DTYPES[drawn_in] and torch.equal(call(pipe, PLAIN), plain)
    # 5 times what was seen of rounding; what the concept does is 2.6.
    assert (found - exact).abs().max() < {"float32": 0.03, "float16": 0.07, "bfloat16": 0.5}[drawn_in]
    assert (found - plain).abs().max() > 2


@pytest.mark.parametrize(("trained_in", "drawn_in"), ROUNDED_IN_TWO_WAYS)
def test_weights_that_were_rounded_in_two_ways_are_refused_with_a_way_out(
    trained_in: str, drawn_in: str, trained: dict[str, Path], loaded: dict[str, Backbone]
) -> None:
    said = refusal(Concept.load(trained[trained_in]), loaded[drawn_in])
    assert said.endswith(f"in {drawn_in} the same weights may differ by rounding, dtype=float32 tells")


@pytest.mark.parametrize(("trained_in", "drawn_in"), ALL)
def test_other_weights_are_refused_in_every_dtype(trained_in: str, drawn_in: str, trained: dict[str, Path]) -> None:
    """One weight that is 2 % larger than it was, which is more than any rounding here."""
    pipe = tiny_pipeline()
    part = "text_encoder" if trained_in == "float16" else "projections"
    weight = a_value_projection(pipe) if part == "projections" else next(pipe.text_encoder.parameters())
    with torch.no_grad():
        weight[0, 0] *= 1.02
    said = refusal(Concept.load(trained[trained_in]), pipe.to(DTYPES[drawn_in]))
    if (trained_in, drawn_in) not in ROUNDED_IN_TWO_WAYS:
        assert f"found {part} " in said
    assert ("dtype=float32 tells" in said) == (drawn_in != "float32")


def test_weights_that_only_bfloat16_takes_for_the_same_are_others(
    trained: dict[str, Path], loaded: dict[str, Backbone]
) -> None:
    pipe = tiny_pipeline()
    weight = a_value_projection(pipe)
    with torch.no_grad():
        middle = weight[0, 0].bfloat16().float()
        assert weight[0, 0] != middle
        weight[0, 0] = middle
    assert around(pipe).fingerprint(torch.bfloat16) == loaded["float32"].fingerprint(torch.bfloat16)
    assert "found projections" in refusal(Concept.load(trained["float32"]), pipe)


def test_files_that_do_not_tell_their_fingerprint_in_bfloat16(
    trained: dict[str, Path], loaded: dict[str, Backbone], tmp_path: Path
) -> None:
    """As they were written before: where float32 shows the weights, it says enough."""
    old = {}
    for name, file in trained.items():
        tensors, metadata = read(file)
        assert metadata.pop("fingerprint_bfloat16")
        save_file(tensors, tmp_path / file.name, metadata)
        old[name] = Concept.load(tmp_path / file.name)
    for name in DTYPES:
        old[name].attach(loaded["float32"]).detach()
        old[name].attach(loaded[name]).detach()
    assert "dtype=float32 tells" in refusal(old["float32"], loaded["bfloat16"])


@pytest.mark.parametrize("method", available())
def test_every_method_tells_the_fingerprint_in_bfloat16_of_the_frozen_weights(
    method: str, loaded: dict[str, Backbone], cache: Path
) -> None:
    fresh = tiny_backbone(cache)
    concept = random_concept(fresh, WORD, 0, name=method)
    parts = loaded["bfloat16"].fingerprint()
    assert concept.fingerprint_bfloat16 == {part: parts[part] for part in ("text_encoder", "projections")}
