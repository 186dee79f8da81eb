"""The scorer gives what stock open_clip gives, and says what is missing when it cannot be loaded."""

from __future__ import annotations

import json
from pathlib import Path

import open_clip
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from perfusion.scoring import clip
from perfusion.scoring.clip import ClipScorer, ScorerError
from tests.scorers import DIMENSION, make_scorer

TEXTS = ["a cat on the beach", "a photo of the dog", "unheard of, in snow"]


@pytest.fixture(scope="module")
def name(tmp_path_factory: pytest.TempPathFactory) -> str:
    return make_scorer(tmp_path_factory.mktemp("scorer") / "model")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A folder of its own, to be damaged."""
    make_scorer(tmp_path / "model")
    return tmp_path / "model"


def images() -> list[Image.Image]:
    draw = torch.Generator().manual_seed(0)
    sizes = [(64, 64), (90, 70), (20, 33)]
    noise = [torch.randint(256, (h, w, 3), generator=draw, dtype=torch.uint8) for w, h in sizes]
    return [Image.fromarray(pixels.numpy()) for pixels in noise]


def test_embeddings_are_those_of_stock_open_clip(name: str) -> None:
    scorer = ClipScorer(name)
    model, _, preprocess = open_clip.create_model_and_transforms(name)
    model.eval()
    with torch.no_grad():
        seen = model.encode_image(torch.stack([preprocess(image) for image in images()]), normalize=True)
        read = model.encode_text(open_clip.get_tokenizer(name)(TEXTS), normalize=True)
    assert seen.shape == read.shape == (3, DIMENSION)
    torch.testing.assert_close(scorer.image_embeddings(images()), seen)
    torch.testing.assert_close(scorer.image_embeddings([image.convert("RGBA") for image in images()]), seen)
    assert not scorer.image_embeddings(images()).requires_grad
    torch.testing.assert_close(scorer.text_embeddings(TEXTS), read)
    torch.testing.assert_close(scorer.text_embeddings(TEXTS).norm(dim=-1), torch.ones(3))
    assert torch.linalg.matrix_rank(read - read.mean(0)) == 2, "different texts must differ"


def test_many_are_embedded_in_parts(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    scorer = ClipScorer(name)
    whole = scorer.image_embeddings(images()), scorer.text_embeddings(TEXTS)
    monkeypatch.setattr(clip, "_AT_ONCE", 2)
    torch.testing.assert_close((scorer.image_embeddings(images()), scorer.text_embeddings(TEXTS)), whole)


# --- models that open_clip knows by name ------------------------------------------------------------------------------


@pytest.fixture
def tiny_name(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """The same model under a name, as open_clip's own models have one; with the folder's tokenizer."""
    config = json.loads((folder / "open_clip_config.json").read_text())["model_cfg"]
    config["text_cfg"]["hf_tokenizer_name"] = str(folder)
    (tmp_path / "configs").mkdir()
    (tmp_path / "configs" / "Tiny-8.json").write_text(json.dumps(config))
    monkeypatch.setattr(open_clip.factory, "_MODEL_CONFIG_PATHS", [tmp_path / "configs"])
    monkeypatch.setattr(open_clip.factory, "_MODEL_CONFIGS", {})
    open_clip.factory._rescan_model_configs()
    return "Tiny-8"


def test_a_name_with_a_local_file(tiny_name: str, folder: Path) -> None:
    scorer = ClipScorer(tiny_name, str(folder / "open_clip_model.safetensors"))
    expected = ClipScorer(f"local-dir:{folder}").text_embeddings(TEXTS)
    torch.testing.assert_close(scorer.text_embeddings(TEXTS), expected)


def test_a_tag_takes_safetensors_from_the_hub_and_its_own_preprocessing(
    tiny_name: str, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[tuple[str, ...]] = []

    def from_cache(*what: str, local_files_only: bool) -> str:
        asked.append(what)
        return str(folder / "open_clip_model.safetensors")

    half = (0.5, 0.5, 0.5)
    tag = {"hf_hub": "someone/tiny/", "url": "https://x.invalid/x.pt", "mean": half, "std": half, "quick_gelu": True}
    monkeypatch.setattr(clip, "hf_hub_download", from_cache)
    monkeypatch.setattr(open_clip, "get_pretrained_cfg", lambda model, name: tag if name == "published" else {})
    scorer = ClipScorer(tiny_name, "published")
    assert asked == [("someone/tiny", "open_clip_model.safetensors")]
    model = open_clip.create_model(f"local-dir:{folder}", force_quick_gelu=True)
    preprocess = open_clip.image_transform(64, is_train=False, mean=half, std=half)
    with torch.no_grad():
        expected = model.eval().encode_image(torch.stack([preprocess(image) for image in images()]), normalize=True)
    torch.testing.assert_close(scorer.image_embeddings(images()), expected)

    tag["hf_hub"] = "someone/tiny/pytorch_model.bin"
    ClipScorer(tiny_name, "published")
    assert asked[-1] == ("someone/tiny", "pytorch_model.safetensors")
    tag["hf_hub"] = ""
    with pytest.raises(ScorerError, match=r"published as a pickle only.*give pretrained=<safetensors file>"):
        ClipScorer(tiny_name, "published")


# --- what cannot be loaded --------------------------------------------------------------------------------------------


def test_without_network_the_message_says_what_was_looked_for_and_what_helps(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(
        ScorerError,
        match=r"ViT-B-32/laion2b_s34b_b79k: looked for open_clip_model.safetensors of laion/CLIP-ViT-B-32-laion2B-s34B-"
        r"b79K in the hub's cache and on the hub.*Without network give pretrained=<safetensors file>, or local-dir:",
    ):
        ClipScorer("ViT-B-32", "laion2b_s34b_b79k")
    with pytest.raises(ScorerError, match="scorer ViT-B-32/openai: looked for"):
        ClipScorer("ViT-B-32")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("ViT-B-33",), "scorer 'ViT-B-33': expected toyland, local-dir:<folder>, or a name"),
        (("hf-hub:owner/model",), "scorer 'hf-hub:owner/model': expected"),
        (("ViT-B-32-256",), r"expected pretrained=<safetensors file or tag>; its tags are: datacomp"),
        (("ViT-B-32", "opnai"), "pretrained=opnai: neither a file nor a tag of ViT-B-32"),
        (("ViT-B-32", "weights.safetensors"), "pretrained=weights.safetensors: neither a file"),
        (("ViT-B-32", "weights.pt"), r"pretrained=weights.pt: expected a .safetensors file \(pickles are not read\)"),
        (("local-dir:nowhere",), "local-dir:nowhere: no such folder"),
        (("toyland", "openai"), "pretrained='openai': expected none with a folder"),
    ],
)
def test_models_that_are_not_there(arguments: tuple[str, ...], message: str) -> None:
    with pytest.raises(ScorerError, match=message):
        ClipScorer(*arguments)


def test_a_folder_with_pickled_weights_is_refused(folder: Path) -> None:
    weights = folder / "open_clip_model.safetensors"
    torch.save(load_file(weights), folder / "open_clip_pytorch_model.bin")
    ClipScorer(f"local-dir:{folder}")  # beside safetensors it is not looked at
    weights.unlink()
    with pytest.raises(ScorerError, match=r"expected weights in open_clip_model.safetensors.*pickles are not read"):
        ClipScorer(f"local-dir:{folder}")


def test_a_damaged_folder(folder: Path) -> None:
    name = f"local-dir:{folder}"
    (folder / "tokenizer_config.json").unlink()
    with pytest.raises(ScorerError, match=r"no tokenizer_config\.json"):
        ClipScorer(name)
    (folder / "open_clip_model.safetensors").write_bytes(b"\0" * 40)
    (folder / "tokenizer_config.json").write_text("{}")
    with pytest.raises(ScorerError, match=f"the scorer {name} cannot be loaded: "):
        ClipScorer(name)
    (folder / "open_clip_config.json").write_text('{"model_cfg": {}}')
    with pytest.raises(ScorerError, match="expected open_clip's config with model_cfg"):
        ClipScorer(name)
