"""What a run reads beside its config: which files that are, and when they are others."""

import os
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from perfusion.config import BackboneConfig, ConceptConfig, CovarianceConfig, TrainConfig
from perfusion.methods.base import Word, build
from perfusion.training import inputs
from perfusion.training.inputs import inputs_of


@pytest.fixture(autouse=True)
def files(here: Path) -> None:
    for name in ("photos/a.png", "photos/mask/a.png", "more/b.png", "prior/1.png", "prior/2.png"):
        Path(name).parent.mkdir(exist_ok=True)
        Image.new("RGB", (4, 4)).save(name)
    for name in (
        "prior/1.txt",
        "captions.txt",
        "model/unet/w.safetensors",
        "model/index.json",
        "model/README.md",
        "C.npy",
    ):
        Path(name).parent.mkdir(parents=True, exist_ok=True)
        Path(name).write_text(name)
    Path("everyday").mkdir()
    Path("everyday/x.txt").touch()


def found(method: str = "perfusion", covariance: Any = None, path: str | None = "hub/id", **changes: Any) -> Any:
    concept = ConceptConfig("cat", "cat", "<cat*>", **{"images": ["photos", "more"], **changes})
    backbone = BackboneConfig("stable_diffusion", path, covariance=CovarianceConfig(**covariance or {}))
    config = TrainConfig(backbone=backbone, concept=concept, callbacks={"select": {"scorer": "model"}, "other": None})
    made = inputs_of(config, build({"name": method}, Word("<cat*>", "cat")))
    return {key: sorted(names) for key, names in made.items()}


def test_every_file_that_the_config_names() -> None:
    scorer = {"callbacks.select.scorer": ["index.json", "unet/w.safetensors"]}
    pictures = {"concept.images": ["more/b.png", "photos/a.png"]}
    assert found() == scorer | pictures, "neither the hub, nor captions that are built in"
    assert found(images=None) == scorer
    assert found(path="model")["backbone.path"] == ["index.json", "unet/w.safetensors"]
    assert found(images="photos", masks="photos/mask")["concept.masks"] == ["a.png"]
    assert found(masks="clipseg", clipseg="model")["concept.clipseg"] == ["index.json", "unet/w.safetensors"]
    captions, matrix = {"captions": "captions.txt"}, {"captions": "captions.txt", "matrix": "C.npy"}
    assert found(covariance=captions)["backbone.covariance.captions"] == ["captions.txt"]
    assert found(covariance=matrix)["backbone.covariance.matrix"] == ["C.npy"]
    assert found("lora", covariance=matrix) == scorer | pictures, "which needs no matrix"
    assert found(prior="prior") == scorer | pictures, "which holds on to no prior"
    assert found("dreambooth", prior="prior")["concept.prior"] == ["1.png", "1.txt", "2.png"]


def test_names_do_not_depend_on_where_one_works(monkeypatch: pytest.MonkeyPatch) -> None:
    photos = os.path.abspath("photos/a.png")
    names = found(images=["photos/a.png"])
    monkeypatch.chdir("prior")
    assert found(images=[photos])["concept.images"] == names["concept.images"] == ["a.png"]


def test_of_large_files_size_and_samples_count(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(inputs, "_WHOLE", 1000)
    monkeypatch.setattr(inputs, "_SAMPLE", 10)
    file, content = Path("large.safetensors"), bytearray(100_000)
    digests = []
    for change in (None, 0, -1, 100_000 * 128 // 255):
        if change is not None:
            content[change] ^= 1
        file.write_bytes(content)
        digests.append(inputs._digest(file))
    file.write_bytes(content + b"\0")
    assert len({*digests, inputs._digest(file)}) == 5
