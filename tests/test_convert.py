"""Concepts of perfusion-pytorch give the same keys and values here as there."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from perfusion import convert as module
from perfusion.backbones.base import Backbone
from perfusion.cli import USER_ERROR, run_cli
from perfusion.concept import Concept, ConceptFileError
from perfusion.convert import ConversionError, ConvertConfig, convert, main, read_package
from perfusion.editing.places import EditSite
from perfusion.methods.base import Word
from tests.concepts import untrained_concept

BETA, TAU = 0.6, 0.2
D = 32  # width of the tiny backbone's encodings


@pytest.fixture(autouse=True)
def loaded(backbone: Backbone, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(type(backbone), "load", classmethod(lambda cls, config: backbone))
    monkeypatch.setattr(type(backbone), "check_words", lambda *_: None)


def weight(site: EditSite) -> Tensor:
    return site.projection.weight.detach()  # type: ignore[union-attr,operator,return-value]


def package(backbone: Backbone, order: Any = None, concepts: int = 2) -> dict[str, Any]:
    """What perfusion_pytorch.save writes of concepts with random values and locked keys, in the order of `order`."""
    draw = torch.Generator().manual_seed(0)
    i, s = torch.randn(2, concepts, D, generator=draw)
    root = torch.randn(D, D, generator=draw)
    pairs = []
    for site in sorted(backbone.edit_sites(), key=order) if order else backbone.edit_sites():
        w = weight(site)
        pairs.append([i, s @ w.T if site.kind == "k" else torch.randn(concepts, len(w), generator=draw)])
    embeddings = torch.randn(concepts, D, generator=draw)
    return {"embed_params": embeddings, "key_value_params": pairs, "C_inv": torch.inverse(root @ root.T + torch.eye(D))}


def original_order(site: EditSite) -> int:
    return ("down", "mid_", "up_b").index(site.name[:4])


def written(content: Any, folder: Path) -> Path:
    path = folder / "old.pt"
    torch.save(content, path)
    return path


def config(file: Path, **changes: Any) -> ConvertConfig:
    return ConvertConfig(
        **{"file": str(file), "superclass": "cat", "placeholder": "<cat*>", "beta": BETA, "tau": TAU, **changes}
    )


def theirs(content: dict[str, Any], pair: int, index: int, w: Tensor, e: Tensor) -> Tensor:
    """Eq. 3 as that package computes it from its file, float64."""
    i, o = (part[index].double() for part in content["key_value_params"][pair])
    Ci, w, e = content["C_inv"].double(), w.double(), e.double()
    similarity, energy = e @ Ci @ i, i @ Ci @ i
    gate = torch.sigmoid((similarity / energy - BETA) / TAU)
    return e @ w.T - (similarity / energy)[..., None] * (w @ i) + gate[..., None] * o


@pytest.mark.parametrize("order", [None, original_order])
@pytest.mark.parametrize("index", [0, 1])
def test_every_projection_gives_what_it_gave_there(backbone: Backbone, order: Any, index: int, tmp_path: Path) -> None:
    content = package(backbone, order)
    made = convert(config(written(content, tmp_path), index=index))
    e = torch.randn(2, 77, D, generator=torch.Generator().manual_seed(1))
    sites = backbone.edit_sites()
    weights = {site.name: weight(site).clone() for site in sites}
    sites = sorted(sites, key=order) if order else sites
    with Concept.load(made.source).attach(backbone):
        for pair, site in enumerate(sites):
            got = site.projection(e).double()
            expected = theirs(content, pair, index, weights[site.name], e)
            assert torch.allclose(got, expected, rtol=0, atol=4e-3 * expected.abs().max()), site.name  # float16 file


def test_the_word_is_the_one_that_was_learned(backbone: Backbone, tmp_path: Path) -> None:
    content = package(backbone)
    made = convert(config(written(content, tmp_path)))
    assert torch.equal(made.tensors["embedding.text_encoder"], content["embed_params"][:1].half())
    assert (made.superclass, made.placeholder) == ("cat", "<cat*>")


def test_it_keeps_other_company_out(backbone: Backbone, tmp_path: Path) -> None:
    """Its C is none of ours, and Eq. 4 needs one C for all."""
    made = convert(config(written(package(backbone), tmp_path)))
    other = untrained_concept(backbone, Word("<dog*>", "dog"), 0)
    with other.attach(backbone), pytest.raises(ConceptFileError, match="the covariance perfusion-pytorch:"):
        made.attach(backbone)


def test_weights_of_another_model_are_refused(backbone: Backbone, tmp_path: Path) -> None:
    content = package(backbone)
    for pair in content["key_value_params"]:
        pair[1] = torch.randn_like(pair[1])
    with pytest.raises(ConversionError, match="trained on other weights"):
        convert(config(written(content, tmp_path)))
    content["key_value_params"].pop()
    with pytest.raises(ConversionError, match=r"found outputs of widths \["):
        convert(config(written(content, tmp_path)))


class Evil:
    def __reduce__(self) -> Any:
        return (print, ("code that a file brought along",))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda c: {**c, "extra": Evil()}, "no pickle of tensors alone"),
        (lambda c: {"weights": c["C_inv"]}, "found weights, expected embed_params"),
        (lambda c: {**c, "embed_params": None}, "the concept's word is not in it"),
        (lambda c: {**c, "C_inv": c["C_inv"][:5]}, "unexpected shapes"),
        (lambda c: {**c, "C_inv": c["C_inv"] * float("nan")}, "NaN or infinity in C_inv"),
        (
            lambda c: {**c, "key_value_params": [[k * (1 + n), v] for n, (k, v) in enumerate(c["key_value_params"])]},
            "i*",
        ),
    ],
)
def test_files_that_are_none_are_refused(
    backbone: Backbone, change: Any, message: str, tmp_path: Path, capsys: Any
) -> None:
    path = written(change(package(backbone)), tmp_path)
    with pytest.raises(ConversionError) as caught:
        read_package(path)
    assert message in str(caught.value) and str(path) in str(caught.value)
    assert "code that a file brought along" not in capsys.readouterr().out


def test_indices_and_files_that_are_not_there(backbone: Backbone, tmp_path: Path) -> None:
    path = written(package(backbone), tmp_path)
    with pytest.raises(ConversionError, match="index: found 2, expected 0 to 1"):
        read_package(path, 2)
    with pytest.raises(ConversionError, match="found no such file"):
        read_package(tmp_path / "no.pt")


def test_the_command_says_what_to_do_next_and_overwrites_nothing(
    backbone: Backbone, tmp_path: Path, capsys: Any
) -> None:
    folder = tmp_path / "my concepts"
    folder.mkdir()
    path = written(package(backbone), folder)
    words = [f"file={path}", "superclass=cat", "placeholder=<cat*>", "backbone=sd15", "layout=sd15"]
    main(words)
    concept = folder / "old.safetensors"
    assert concept.is_file()
    told = shlex.split(capsys.readouterr().out.split("next: ")[1])
    assert told[:4] == ["python", "-m", "perfusion.generate", f"concept={concept}"]
    assert told[4:] == ["backbone=sd15", "layout=sd15", "prompt=a photo of <cat*> on the beach"]
    assert run_cli(module.main, words) == USER_ERROR
    assert "exists, expected a new file" in capsys.readouterr().err


def test_the_layout_of_a_checkpoint_reaches_the_backbone(
    backbone: Backbone, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def load(cls: type[Backbone], config: Any) -> Backbone:
        raise RuntimeError(f"layout {config.layout}")

    monkeypatch.setattr(type(backbone), "load", classmethod(load))
    with pytest.raises(RuntimeError, match="layout sd21_base"):
        convert(config(written(package(backbone), tmp_path), layout="sd21_base"))
