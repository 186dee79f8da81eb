"""Likeness by a timm model, offline: a tiny one with random weights, as a folder and by name."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from eval.dino import DinoScorer
from perfusion.scoring.clip import ScorerError
from tests.scored import noise
from tests.scorers import DINO, DINO_SETTINGS, make_dino

timm = pytest.importorskip("timm")


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    return timm.create_model(DINO, num_classes=0, **DINO_SETTINGS).eval()


@pytest.fixture
def folder(model, tmp_path: Path) -> Path:
    return make_dino(tmp_path / "dino", model)


@pytest.mark.parametrize("prefix", ["", "local-dir:"])
def test_embeddings_are_those_of_the_stock_model(model, folder: Path, prefix: str):
    scorer = DinoScorer(f"{prefix}{folder}")
    images = [noise(k, 80) for k in range(3)]
    found = scorer.image_embeddings(images)
    config = timm.data.resolve_data_config({}, pretrained_cfg={"input_size": (3, 64, 64)})
    preprocess = timm.data.create_transform(**config)
    with torch.no_grad():
        expected = torch.nn.functional.normalize(model(torch.stack([preprocess(i) for i in images])), dim=-1)
    assert found.shape == (3, 24) and not found.requires_grad
    torch.testing.assert_close(found, expected)
    assert scorer.fingerprint() == DinoScorer(str(folder)).fingerprint()


def test_many_are_embedded_in_parts(folder: Path, monkeypatch):
    scorer, images = DinoScorer(str(folder)), [noise(k) for k in range(3)]
    whole = scorer.image_embeddings(images)
    monkeypatch.setattr("eval.dino._AT_ONCE", 2)
    torch.testing.assert_close(scorer.image_embeddings(images), whole)


def test_a_name_with_a_local_file(tmp_path: Path):
    torch.manual_seed(1)
    stock = timm.create_model(DINO, num_classes=0).eval()
    save_file(stock.state_dict(), tmp_path / "w.safetensors")
    scorer = DinoScorer(DINO, str(tmp_path / "w.safetensors"))
    other = DinoScorer(DINO, str(tmp_path / "w.safetensors"))
    assert scorer.fingerprint() == other.fingerprint()
    for name, value in scorer._model.state_dict().items():
        torch.testing.assert_close(value, stock.state_dict()[name])


def test_a_name_takes_safetensors_from_the_hub(tmp_path: Path, monkeypatch):
    save_file(timm.create_model(DINO, num_classes=0).state_dict(), tmp_path / "w.safetensors")
    asked = []

    def from_cache(*what: str, local_files_only: bool) -> str:
        asked.append(what)
        return str(tmp_path / "w.safetensors")

    monkeypatch.setattr("perfusion.scoring.clip.hf_hub_download", from_cache)
    DinoScorer(f"{DINO}.r160_in1k")
    assert asked == [("timm/test_vit.r160_in1k", "model.safetensors")]


def test_models_that_are_not_there(folder: Path, tmp_path: Path, monkeypatch):
    def offline(*what: str) -> str:
        raise OSError("no network")

    monkeypatch.setattr("perfusion.scoring.clip.hf_hub_download", offline)
    with pytest.raises(ScorerError, match=r"looked for model\.safetensors of timm/test_vit.* give dino_pretrained="):
        DinoScorer(f"{DINO}.r160_in1k")
    with pytest.raises(ScorerError, match="dino=vit_unheard_of: expected a folder, local-dir:<folder>, or a name"):
        DinoScorer("vit_unheard_of")
    with pytest.raises(ScorerError, match=r"expected a \.safetensors file \(pickles are not read\)"):
        DinoScorer(DINO, "weights.pth")
    with pytest.raises(ScorerError, match="expected none with a folder"):
        DinoScorer(str(folder), "weights.safetensors")
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
    with pytest.raises(ScorerError, match=r"expected timm's format .* found config\.json, pytorch_model\.bin"):
        DinoScorer(str(folder))
    with pytest.raises(ScorerError, match="found no such folder"):
        DinoScorer(f"local-dir:{tmp_path / 'none'}")
    (folder / "model.safetensors").write_bytes(b"\0" * 20)
    with pytest.raises(ScorerError, match="cannot be loaded"):
        DinoScorer(str(folder))


def test_without_timm(monkeypatch):
    monkeypatch.setitem(sys.modules, "timm", None)
    with pytest.raises(ScorerError, match=r"needs timm, the extra dino of this package; `make setup` installs it"):
        DinoScorer(DINO)
