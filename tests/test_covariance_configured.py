"""Where a backbone's C comes from: the positions that count, a ready matrix, an unfinished sum, and what a concept file
says of it."""

import dataclasses
import logging
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from perfusion import backbones
from perfusion.backbones.stable_diffusion import StableDiffusionBackbone
from perfusion.concept import Concept
from perfusion.config import BackboneConfig, ConfigError, CovarianceConfig
from perfusion.covariance import configured
from perfusion.covariance.matrix import save_matrix
from perfusion.covariance.moment import CovarianceError
from perfusion.methods.base import Word
from tests.backbone_kinds import BEYOND, KINDS, config_of, stock
from tests.concepts import untrained_concept
from tests.pipelines import tiny_pipeline, tiny_pipeline_folder

CAPTIONS = ["a cat", "a photo of a dog on the beach", "Red hat, blue house!", "the moon", "a cat and a cat " * 40]
WIDTH = 32


@pytest.fixture(scope="module")
def pipe() -> Any:
    return tiny_pipeline()


@pytest.fixture
def captions(tmp_path: Path) -> Path:
    path = tmp_path / "mine.txt"
    path.write_text("\n".join(CAPTIONS))
    return path


def around(pipe: Any, tmp_path: Path, **settings: Any) -> StableDiffusionBackbone:
    covariance = CovarianceConfig(cache=str(tmp_path / "cache"), **settings)
    config = BackboneConfig(name="stable_diffusion", resolution=64, device="cpu", covariance=covariance)
    return StableDiffusionBackbone.around(pipe, config)


@pytest.mark.parametrize("positions", ["all", "words"])
@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind not in BEYOND])
def test_the_positions_that_count(kind: str, positions: str, captions: Path, tmp_path: Path) -> None:
    name, build = KINDS[kind]
    covariance = CovarianceConfig(str(captions), ridge=0.5, cache=str(tmp_path / "cache"), positions=positions)
    config = config_of(name, build(tmp_path), tmp_path, covariance=covariance)
    backbone: Any = backbones.backbone_class(name).load(config)
    tokenizer = backbone.pipe.tokenizer
    rows: list[Tensor] = []
    for caption in CAPTIONS:
        tokens = tokenizer(caption, truncation=True, max_length=tokenizer.model_max_length).input_ids
        e = stock(backbone, [caption])[0].double()
        assert len(e) == tokenizer.model_max_length and len(tokens) >= 4
        rows.append(e if positions == "all" else e[1 : len(tokens) - 1])  # without beginning, end, and what comes after
        if kind == "sd21" and "!" in caption:
            assert tokenizer.pad_token_id in tokens, "a word that is also the padding is to be told from it"
    e = torch.cat(rows)
    found = backbone.moment(progress=False)
    assert found.count == len(e) and (positions == "words" or len(e) == tokenizer.model_max_length * len(CAPTIONS))
    torch.testing.assert_close(found.C, e.T @ e / len(e), rtol=1e-6, atol=1e-6)
    C = found.C + 0.5 * found.C.diagonal().mean() * torch.eye(e.shape[1], dtype=torch.float64)
    factor = backbone.second_moment(progress=False)
    torch.testing.assert_close(factor @ factor.T, C, rtol=1e-9, atol=1e-9)


def no_encoding(*_: Any) -> Tensor:
    raise AssertionError("the captions were encoded")


def test_other_positions_are_another_cache_entry(pipe: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    everything = around(pipe, tmp_path, count=20).moment(progress=False)
    words = around(pipe, tmp_path, count=20, positions="words").moment(progress=False)
    assert words.count is not None and everything.count is not None and words.count < everything.count
    assert len(list((tmp_path / "cache").iterdir())) == 2
    monkeypatch.setattr(StableDiffusionBackbone, "_encode_captions", no_encoding)
    for positions, C in (("all", everything.C), ("words", words.C)):
        assert torch.equal(around(pipe, tmp_path, count=20, positions=positions).moment(progress=False).C, C)


# --- a ready matrix --------------------------------------------------------------------------------------------------


@pytest.fixture
def measured(pipe: Any, tmp_path: Path) -> Path:
    path = tmp_path / "C.safetensors"
    save_matrix(path, around(pipe, tmp_path, count=20).moment(progress=False))
    return path


def test_a_matrix_stands_for_its_captions(
    pipe: Any, measured: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    direct = around(pipe, tmp_path, count=20)
    expected = direct.second_moment(progress=False)
    monkeypatch.setattr(StableDiffusionBackbone, "_encode_captions", no_encoding)
    backbone = around(pipe, tmp_path / "other", matrix=str(measured), captions="no such captions")
    found = backbone.second_moment()
    assert torch.equal(found, expected) and backbone.moment().count == 20 * 77
    assert backbone.covariance == direct.covariance == "everyday:20:0.01", "it is the same C"
    assert not (tmp_path / "other").exists(), "nothing is cached"


def test_a_foreign_matrix_is_used_as_it_is(pipe: Any, tmp_path: Path) -> None:
    C = np.diag(np.arange(1.0, WIDTH + 1))
    np.save(tmp_path / "C.npy", C)
    backbone = around(pipe, tmp_path, matrix=str(tmp_path / "C.npy"), ridge=0.0)
    factor = backbone.second_moment()
    np.testing.assert_allclose((factor @ factor.T).numpy(), C, rtol=1e-12)
    assert backbone.moment().count is None
    assert backbone.covariance == f"matrix@{backbone.moment().digest}:0"


def test_the_inverse_of_c_is_refused(pipe: Any, tmp_path: Path) -> None:
    """Other implementations save C⁻¹, which is as symmetric and as positive."""
    backbone = around(pipe, tmp_path)
    own = backbone.moment(progress=False).C
    ridge = 1e-3 * own.diagonal().mean() * torch.eye(len(own), dtype=own.dtype)
    np.save(tmp_path / "C.npy", own.numpy())
    np.save(tmp_path / "inverse.npy", torch.linalg.inv(own + ridge).numpy())
    around(pipe, tmp_path, matrix=str(tmp_path / "C.npy")).moment(progress=False)
    with pytest.raises(CovarianceError, match=r"inverse.npy: found the inverse of a second moment .*expected C itself"):
        around(pipe, tmp_path, matrix=str(tmp_path / "inverse.npy")).moment(progress=False)


def test_a_matrix_of_another_text_encoder_is_warned_of(
    pipe: Any, measured: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    other = tiny_pipeline()
    with torch.no_grad():
        next(iter(other.text_encoder.parameters())).mul_(2)
    backbone = around(other, tmp_path, matrix=str(measured))
    with caplog.at_level(logging.WARNING):
        backbone.second_moment()
    assert "C.safetensors was measured on another model: found text_encoder" in caplog.text
    assert backbone.covariance.startswith("matrix@"), "these are not the captions' encodings by this model"


def spoilt(row: int, column: int, value: float) -> np.ndarray:
    C = np.eye(WIDTH)
    C[row, column] = value
    return C


@pytest.mark.parametrize(
    ("C", "message"),
    [
        (None, "found No such file"),
        (np.eye(WIDTH + 1), f"found width {WIDTH + 1}, expected {WIDTH} as the projections read"),
        (spoilt(0, 1, 0.5), "found an asymmetry of .* expected a symmetric matrix"),
        (spoilt(0, 0, 1e-12), r"found condition number 1.0e\+12 .* expected at most"),
        (spoilt(0, 0, -1.0), "found smallest eigenvalue -1.0e.00 .* expected a positive definite matrix"),
    ],
)
def test_a_matrix_that_cannot_be_used_is_refused_before_a_model_is_loaded(
    C: np.ndarray | None, message: str, pipe: Any, tmp_path: Path
) -> None:
    path = tmp_path / "C.npy"
    if C is not None:
        np.save(path, C)
    message = rf"^backbone\.covariance\.matrix: {path}: .*{message}"
    settings = CovarianceConfig(matrix=str(path), ridge=0.0)
    folder = tiny_pipeline_folder(tmp_path)
    for weights in folder.rglob("*.safetensors"):
        weights.unlink()
    config = BackboneConfig(name="stable_diffusion", path=str(folder), covariance=settings)
    with pytest.raises(CovarianceError, match=message):
        backbones.backbone_class(config.name).check_covariance(config)
    with pytest.raises(CovarianceError, match=message):
        around(pipe, tmp_path, matrix=str(path), ridge=0.0).second_moment()


def test_captions_and_positions_are_checked_before_a_model_is_loaded(pipe: Any, tmp_path: Path) -> None:
    def check(**settings: Any) -> None:
        for name in ("stable_diffusion", "toyland"):
            config = BackboneConfig(name=name, path="no/such/folder", covariance=CovarianceConfig(**settings))
            backbones.backbone_class(config.name).check_covariance(config)

    check()
    with pytest.raises(ConfigError, match=r"backbone\.covariance\.positions: found 'word', expected all or words"):
        check(positions="word")
    with pytest.raises(ConfigError, match=r"backbone\.covariance\.captions: found no file 'no/such', expected"):
        check(captions="no/such")
    for captions in ("everyday", "toyland"):
        with pytest.raises(ConfigError, match=r"backbone\.covariance\.count: found 0, expected at least 1"):
            check(captions=captions, count=0)
    with pytest.raises(ConfigError, match="positions: found 'none'"):
        around(pipe, tmp_path, positions="none").second_moment()


# --- what a concept file says ----------------------------------------------------------------------------------------


def test_a_concept_says_which_c_it_was_trained_with(pipe: Any, captions: Path, measured: Path, tmp_path: Path) -> None:
    def said(**settings: Any) -> str:
        backbone = around(pipe, tmp_path, **{"count": 20, "ridge": 0.5, **settings})
        concept = untrained_concept(backbone, Word("<cat*>", "cat"), 0)
        assert isinstance(concept, Concept)
        return concept.covariance

    assert said() == said(matrix=str(measured)) == "everyday:20:0.5"
    assert said(positions="words") == "everyday:20:0.5:words"
    first = said(captions=str(captions))
    name, digest = first.split(":")[0].split("@")
    assert name == "mine.txt" and len(digest) == 8 and first.endswith(":20:0.5")
    captions.write_text("\n".join([*CAPTIONS[:-1], "a car"]))
    assert said(captions=str(captions)) != first, "another file of the same name is another C"
    np.save(tmp_path / "C.npy", np.eye(WIDTH))
    assert said(matrix=str(tmp_path / "C.npy")).startswith("matrix@")


def test_without_a_c_the_config_is_what_can_be_said(captions: Path) -> None:
    settings = CovarianceConfig(captions=str(captions), count=7, ridge=0.01)
    assert configured.described(settings, None) == "mine.txt:7:0.01"
    assert configured.described(dataclasses.replace(settings, positions="words"), None) == "mine.txt:7:0.01:words"
    assert configured.described(dataclasses.replace(settings, matrix="C.npy"), None) == "matrix@?:0.01"


@pytest.mark.parametrize(
    ("covariance", "parts"),
    [
        ("everyday:10000:0.01", "captions:count:ridge"),
        ("mine.txt@1a2b3c4d:800:0.01:words", "captions:count:ridge:positions"),
        ("matrix@0123456789ab:0.01", "matrix@digest:ridge"),
    ],
)
def test_the_parts_of_a_description_have_names(covariance: str, parts: str) -> None:
    assert configured.spelled_out(covariance) == f"{covariance} ({parts})"
