"""Everything that a concept file holds, and everything that there is to edit, can be read off the terminal."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from perfusion.backbones.base import Backbone
from perfusion.cli import run_cli
from perfusion.concept import Concept, save_concept
from perfusion.inspect import main
from perfusion.methods.base import Word, build
from tests.concepts import random_concept, toyland_backbone
from tests.pipelines import toyland_folder
from tests.references import inner_product


@pytest.fixture(scope="module")
def pipeline(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return toyland_folder(tmp_path_factory.mktemp("pipeline"))


@pytest.fixture(scope="module")
def backbone(pipeline: Path, tmp_path_factory: pytest.TempPathFactory) -> Backbone:
    return toyland_backbone(pipeline, tmp_path_factory.mktemp("covariance"))


@pytest.fixture(scope="module")
def file(backbone: Backbone, tmp_path_factory: pytest.TempPathFactory) -> Path:
    method = build({"name": "perfusion", "beta": 0.625}, Word("<toy*>", "cat"))
    method.attach(backbone)
    path = tmp_path_factory.mktemp("concept") / "toy.safetensors"
    save_concept(path, Concept.of(method, backbone, seed=41))
    method.detach()
    return path


def inspect(*words: object, capsys: pytest.CaptureFixture[str]) -> list[str]:
    assert run_cli(main, [str(word) for word in words]) == 0
    return capsys.readouterr().out.splitlines()


def fact(lines: list[str], name: str) -> str:
    (line,) = [line for line in lines if line.startswith(f"{name}  ")]
    return line.removeprefix(name).strip()


def test_a_concept_file_without_any_model(file: Path, capsys, monkeypatch) -> None:
    monkeypatch.setattr("perfusion.backbones.backbone_class", None)  # no model can be loaded
    lines = inspect(file, capsys=capsys)
    concept, tensors = Concept.load(file), load_file(file)
    assert fact(lines, "file") == f"{file} ({file.stat().st_size:,} bytes)"
    assert fact(lines, "format") == "version 1"
    assert (fact(lines, "method"), fact(lines, "superclass")) == ("perfusion", "cat")
    assert fact(lines, "placeholder") == "<toy*>"
    assert "beta 0.625" in fact(lines, "settings") and "key_lock local" in fact(lines, "settings")
    assert fact(lines, "seed") == "41"
    for value in concept.fingerprint.values():
        assert value in fact(lines, "backbone")
    assert f"torch {torch.__version__.split('+')[0]}" in fact(lines, "versions")
    assert fact(lines, "hash") == concept.hash and fact(lines, "commit").startswith(concept.commit or "none")
    assert fact(lines, "numbers") == f"{sum(t.numel() for t in tensors.values()):,}"
    assert fact(lines, "covariance").startswith(concept.covariance)
    for name, tensor in tensors.items():
        shape, dtype, size, mean, std, largest = fact(lines, name).split()
        assert shape == "×".join(map(str, tensor.shape)) and dtype == "float16"
        assert int(size.replace(",", "")) == 2 * tensor.numel()
        values = tensor.double()
        expected = [v.item() for v in (values.mean(), values.std(correction=0), values.abs().max())]
        assert [float(mean), float(std), float(largest)] == pytest.approx(expected, rel=1e-3)


@pytest.mark.parametrize(
    ("layout", "sites", "outputs", "width", "limit"),
    [
        ("sd15", 32, "12,480", "768", 30_720),
        ("sdxl", 140, "83,200", "2048", 180_000),
    ],
)
def test_the_public_layouts(layout: str, sites: int, outputs: str, width: str, limit: int, capsys) -> None:
    lines = inspect(f"backbone={layout}", capsys=capsys)
    rows = [line.split() for line in lines if re.search(r"attn2\.to_[kv] ", line)]
    assert len(rows) == len({name for name, *_ in rows}) == sites and {width} == {context for _, _, context, _ in rows}
    first = ["down_blocks.0.attentions.0.transformer_blocks.0.attn2.to_k", "k", "768", "320"]
    assert rows[0] == first or layout != "sd15"
    assert fact(lines, "sites") == f"{sites}, with {outputs} outputs of K and {outputs} of V"
    numbers = int(fact(lines, "numbers").replace(",", ""))
    size = int(fact(lines, "file").split()[0].replace(",", ""))
    assert numbers >= int(outputs.replace(",", "")) + 2 * int(width) and 2 * numbers < size <= limit
    assert f"values {outputs.replace(',', '')}" in fact(lines, "concept of perfusion")
    assert ("embedding.text_encoder_2 1×1280" in fact(lines, "concept of perfusion")) == (layout == "sdxl")


def test_a_folder_is_measured_without_its_weights(file: Path, pipeline: Path, tmp_path: Path, capsys) -> None:
    for path in pipeline.rglob("*.json"):
        target = tmp_path / path.relative_to(pipeline)
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_bytes(path.read_bytes())
    lines = inspect("backbone=toyland", f"backbone.path={tmp_path}", capsys=capsys)
    tensors = load_file(file)
    assert fact(lines, "numbers") == f"{sum(t.numel() for t in tensors.values()):,}"
    size = int(fact(lines, "file").split()[0].replace(",", ""))
    assert abs(size - file.stat().st_size) < 64, "the words and settings of a concept differ by some letters"


def test_similarity_and_gate_of_each_token(file: Path, pipeline: Path, backbone: Backbone, capsys) -> None:
    prompt = "a photo of <toy*> and a mug"
    lines = inspect(file, f"prompt={prompt}", f"path={pipeline}", "beta=0.5", "tau=0.25", "device=cpu", capsys=capsys)
    start = lines.index(f"{prompt!r}, β 0.5, τ 0.25")
    rows = [line.split(maxsplit=2) for line in lines[start + 2 :]]
    words = [token for _, token, _ in rows]
    assert words == ["<|startoftext|>", *prompt.split(), "<|endoftext|>", "padding"]

    concept = Concept.load(file)
    with concept.attach(backbone), torch.no_grad():
        e = backbone.encode([prompt], "<toy*>").context[0].double()
    # From i* and the second moment itself, not from the file's direction.
    factor, i = backbone.second_moment(progress=False).double(), concept.tensors["target_input"].double()
    r = inner_product(factor, i, e) / inner_product(factor, i, i)
    g = torch.sigmoid((r - 0.5) / 0.25)
    for k, (position, _, values) in enumerate(rows[:-1]):
        assert int(position) == k
        assert [float(v) for v in values.split()] == pytest.approx([r[k].item(), g[k].item()], abs=4e-3)
    position, _, values = rows[-1]
    assert position == f"9–{len(e) - 1}"
    low, high, g_low, g_high = (float(v) for v in values.replace("to", " ").split())
    expected = [r[9:].min().item(), r[9:].max().item(), g[9:].min().item(), g[9:].max().item()]
    assert [low, high, g_low, g_high] == pytest.approx(expected, abs=4e-3)


@pytest.mark.parametrize("name", ["textual_inversion", "lora"])
def test_a_concept_of_a_method_without_a_gate(
    backbone: Backbone, name: str, tmp_path: Path, capsys, monkeypatch
) -> None:
    path = tmp_path / "toy.safetensors"
    save_concept(path, random_concept(backbone, Word("<toy*>", "cat"), 0, name=name))
    monkeypatch.setattr("perfusion.backbones.backbone_class", None)  # no model can be loaded
    lines = inspect(path, capsys=capsys)
    assert fact(lines, "method") == name and fact(lines, "covariance") == "none needed"
    for tensor, value in load_file(path).items():
        assert fact(lines, tensor).split()[0] == "×".join(map(str, value.shape))


def test_the_size_of_other_methods(capsys) -> None:
    lines = inspect("backbone=sd15", "method=lora", capsys=capsys)
    assert fact(lines, "numbers") == "797,184", "as diffusers' script counts them at rank 4"
    assert fact(lines, "concept of lora").startswith("256 tensors, from down_blocks.0.attentions.0")
    assert int(fact(lines, "file").split()[0].replace(",", "")) > 2 * 797_184
    lines = inspect("backbone=sdxl", "method=textual_inversion", capsys=capsys)
    embeddings = "embedding.text_encoder 1×768, embedding.text_encoder_2 1×1280"
    assert fact(lines, "concept of textual_inversion") == embeddings
