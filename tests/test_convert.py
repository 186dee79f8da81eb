"""Concepts of perfusion-pytorch give the same keys and values here as there."""

from __future__ import annotations

import dataclasses
import os
import shlex
import zipfile
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from perfusion import convert as module
from perfusion import inspect
from perfusion.backbones.base import Backbone
from perfusion.cli import USER_ERROR, run_cli
from perfusion.concept import Concept, ConceptFileError, save_concept
from perfusion.config import CovarianceConfig
from perfusion.convert import ConversionError, ConvertConfig, convert, main, read_package
from perfusion.covariance.matrix import load_matrix
from perfusion.editing.places import EditSite
from perfusion.methods.base import Word, build
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


@pytest.mark.parametrize(("order", "index"), [(None, 0), (original_order, 1)])
def test_every_projection_gives_what_it_gave_there(backbone: Backbone, order: Any, index: int, tmp_path: Path) -> None:
    content = package(backbone, order)
    made = convert(config(written(content, tmp_path), index=index))
    assert torch.equal(made.tensors["embedding.text_encoder"], content["embed_params"][[index]].half())
    assert (made.superclass, made.placeholder) == ("cat", "<cat*>")
    e = torch.randn(2, 77, D, generator=torch.Generator().manual_seed(1))
    sites = backbone.edit_sites()
    weights = {site.name: weight(site).clone() for site in sites}
    sites = sorted(sites, key=order) if order else sites
    with Concept.load(made.source).attach(backbone):
        for pair, site in enumerate(sites):
            got = site.projection(e).double()
            expected = theirs(content, pair, index, weights[site.name], e)
            assert torch.allclose(got, expected, rtol=0, atol=4e-3 * expected.abs().max()), site.name  # float16 file


def test_it_keeps_other_company_out(backbone: Backbone, tmp_path: Path) -> None:
    """Its C is none of ours, and Eq. 4 needs one C for all."""
    made = convert(config(written(package(backbone), tmp_path)))
    other = untrained_concept(backbone, Word("<dog*>", "dog"), 0)
    with other.attach(backbone), pytest.raises(ConceptFileError, match="the covariance perfusion-pytorch:"):
        made.attach(backbone)


def test_what_is_trained_with_its_matrix_is_drawn_beside_it(backbone: Backbone, tmp_path: Path) -> None:
    """By Eq. 4: with both attached, each projection is what it is for two concepts over that C, in float64."""
    content = package(backbone)
    made = convert(config(written(content, tmp_path), matrix=str(tmp_path / "C.safetensors")))
    with pytest.raises(ConversionError, match=r"matrix: .*exists, expected a new file"):
        convert(
            config(tmp_path / "old.pt", out=str(tmp_path / "b.safetensors"), matrix=str(tmp_path / "C.safetensors"))
        )
    C = load_matrix(tmp_path / "C.safetensors").C
    assert torch.allclose(C @ content["C_inv"].double(), torch.eye(D, dtype=C.dtype), atol=1e-4)

    settings = CovarianceConfig(matrix=str(tmp_path / "C.safetensors"), ridge=0.0)
    around = type(backbone).around(backbone.pipe, dataclasses.replace(backbone.config, covariance=settings))
    method = build({"name": "perfusion", "key_lock": "local"}, Word("<dog*>", "dog")).train()
    method.attach(around)
    own = Concept.of(method, around, seed=0)
    method.detach()
    site = next(site for site in backbone.edit_sites() if site.kind == "v")  # whose o* are the first of `values`
    w, P = weight(site).double(), content["C_inv"].double()
    e = torch.randn(2, 7, D, generator=torch.Generator().manual_seed(1))
    for pair in ((made, own), (own, made)):
        i = torch.stack([concept.tensors["target_input"].double() for concept in pair])
        outputs = [concept.tensors["values"][: len(w)].double() for concept in pair]
        with pair[0].attach(backbone) as first, pair[1].attach(backbone) as second:
            found = site.projection(e).double()
            dials = [(each.beta, each.tau) for each in (first, second)]
        inside = e.double() @ P @ i.T @ torch.linalg.inv(i @ P @ i.T) @ i
        expected = (e.double() - inside) @ w.T
        for i_j, o_j, (beta, tau) in zip(i, outputs, dials, strict=True):
            r = e.double() @ P @ i_j / (i_j @ P @ i_j)
            expected = expected + torch.sigmoid((r - beta) / tau)[..., None] * o_j
        assert torch.allclose(found, expected, rtol=0, atol=1e-2 * expected.abs().max())  # float16 files


def test_weights_of_another_model_are_refused(backbone: Backbone, tmp_path: Path) -> None:
    content = package(backbone)
    for pair in content["key_value_params"]:
        pair[1] = torch.randn_like(pair[1])
    with pytest.raises(ConversionError, match="trained on other weights"):
        convert(config(written(content, tmp_path)))
    content["key_value_params"].pop()
    with pytest.raises(ConversionError, match=r"found outputs of widths \["):
        convert(config(written(content, tmp_path)))
    with pytest.raises(ConversionError, match="index: found 2, expected 0 to 1"):
        read_package(written(content, tmp_path), 2)


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
        (lambda c: {**c, "C_inv": c["C_inv"] * 0}, "of length 0, or that make a right angle"),
        (lambda c: {**c, "C_inv": c["C_inv"].to_sparse()}, "unexpected shapes"),
        (lambda c: {**c, "C_inv": c["C_inv"].to(torch.complex64)}, "unexpected shapes"),
        (
            lambda c: {**c, "embed_params": c["embed_params"][:, :1].expand(-1, 2**40)},
            "the concept's word is not in it",
        ),
        (lambda c: {**c, "embed_params": c["embed_params"].to("meta")}, "the concept's word is not in it"),
        (lambda c: {**c, "embed_params": c["embed_params"][:0]}, "the concept's word is not in it"),
        (lambda c: {**c, "key_value_params": []}, "unexpected shapes"),
        (lambda c: {**c, "key_value_params": c["C_inv"]}, "unexpected shapes"),
        (lambda c: {**c, "key_value_params": [torch.zeros(1).expand(10**9, 2, D)]}, "unexpected shapes"),
        (
            lambda c: {**c, "key_value_params": [[k, v[0, 0].expand(2, 2**16)] for k, v in c["key_value_params"]]},
            "unexp",
        ),
        (
            lambda c: dict.fromkeys(range(10**5)),
            "found int, int, int, int, int, int, int, int, …, expected embed_params",
        ),
        (lambda c: {"x" * 10**5: 1, (1, 2): c}, "x…, tuple, expected embed_params"),
        (lambda c: [c], "found list, expected embed_params"),
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


def latent_diffusion_state(*shape: int) -> dict[str, Tensor]:
    module = "model.diffusion_model.input_blocks.1.1.transformer_blocks.0.attn2.to"
    return {f"{module}_k.target_input": torch.zeros(77, D), f"{module}_v.target_output": torch.zeros(shape)}


@pytest.mark.parametrize("nested", [False, True])
def test_concepts_with_a_target_for_each_position_are_refused_with_the_reason(nested: bool, tmp_path: Path) -> None:
    state: Any = latent_diffusion_state(77, 320)
    path = written({"state_dict": state, "global_step": 7} if nested else state, tmp_path)
    with pytest.raises(ConversionError) as caught:
        read_package(path)
    assert "a target for each of 77 positions of a prompt is not a rank-1 edit" in str(caught.value)
    assert str(path) in str(caught.value) and "\n" not in str(caught.value)
    with pytest.raises(ConversionError, match="it has no inverse covariance"):
        read_package(written(latent_diffusion_state(320), tmp_path))
    with pytest.raises(ConversionError, match=r"no pickle of tensors alone .* target_output, .* is not a rank-1 edit"):
        read_package(written({"state_dict": state, "callbacks": Evil()}, tmp_path))


def test_what_is_no_file_is_not_waited_for_and_a_large_one_not_read(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    for path in (tmp_path / "pipe", tmp_path, Path("x" * 5000), Path("a\0b"), tmp_path / "pipe" / "x"):
        with pytest.raises(ConversionError, match="found no such file"):
            read_package(path)
    (tmp_path / "large.pt").touch()
    os.truncate(tmp_path / "large.pt", 2**40)
    with pytest.raises(ConversionError, match=r"found 1,099,511,627,776 bytes, expected at most"):
        read_package(tmp_path / "large.pt")
    with zipfile.ZipFile(tmp_path / "bomb.pt", "w", zipfile.ZIP_DEFLATED, compresslevel=1) as archive:
        archive.writestr("archive/data.pkl", bytes(2**20))
        archive.filelist[0].file_size = 2**31 - 1  # as its directory tells, which is what torch makes room for
    with pytest.raises(ConversionError, match=r"found 2,147,483,647 bytes, expected at most"):
        read_package(tmp_path / "bomb.pt")


@pytest.mark.parametrize("content", [b"", b"PK\x03\x04", b"\x80\x02}q\x00.", b"hello", bytes(1000), b"(" * 10**5])
def test_other_bytes_are_refused(content: bytes, tmp_path: Path) -> None:
    (tmp_path / "x.pt").write_bytes(content)
    with pytest.raises(ConversionError, match=r"x\.pt: found"):
        read_package(tmp_path / "x.pt")


def test_inspect_tells_nothing_of_a_training_that_nobody_knows(backbone: Backbone, tmp_path: Path, capsys: Any) -> None:
    made = convert(config(written(package(backbone), tmp_path)))
    assert made.settings == {"key_lock": "none", "sample_beta": BETA, "sample_tau": TAU, "vectors": 1}
    older = dataclasses.replace(made, settings={**made.settings, "steps": 400, "batch_size": 16, "ema": 0.99})
    save_concept(tmp_path / "older.safetensors", older)
    for file in (made.source, str(tmp_path / "older.safetensors")):
        assert run_cli(inspect.main, [file]) == 0
        lines = capsys.readouterr().out.splitlines()
        told = {line.partition(" ")[0]: line.partition(" ")[2].strip() for line in lines}
        assert told["seed"] == "not known (converted from perfusion-pytorch)"
        assert "sample_beta 0.6, sample_tau 0.2" in told["settings"] and "steps" not in told["settings"]
        assert told["settings"].endswith("those of its training are not known (converted from perfusion-pytorch)")
        assert told["covariance"].endswith("(package:digest)")
        with Concept.load(file).attach(backbone) as attached:
            assert (attached.beta, attached.tau) == (BETA, TAU)


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
