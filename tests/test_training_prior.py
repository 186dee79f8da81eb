"""Pictures of the superclass: drawn once, the same after a stop, or a person's own; and how batches hold them."""

import dataclasses
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from lightning.pytorch import Trainer
from PIL import Image

from perfusion.backbones.base import Backbone, TokenError
from perfusion.backbones.stable_diffusion import StableDiffusionBackbone
from perfusion.config import BackboneConfig, ConceptConfig, ToylandConcept
from perfusion.data.images import ConceptImageError
from perfusion.methods.base import Batch, MethodOptions
from perfusion.methods.prior import PriorOptions
from perfusion.training import prior as training_prior
from perfusion.training.module import ConceptData, examples_of
from perfusion.training.prior import PriorImages, prior_of, real_images
from tests.pipelines import RESOLUTION, tiny_pipeline

OPTIONS = PriorOptions(name="any", steps=4, batch_size=2, prior_images=3, prior_steps=2)


def backbone_of(**overrides: dict[str, Any]) -> Backbone:
    config = BackboneConfig(name="stable_diffusion", device="cpu", resolution=RESOLUTION)
    return StableDiffusionBackbone.around(tiny_pipeline(**overrides), config)


@pytest.fixture(scope="module")
def backbone() -> Backbone:
    return backbone_of()


@pytest.fixture
def concept(tmp_path: Path) -> ConceptConfig:
    return ConceptConfig(
        name="cat", superclass="cat", placeholder="<cat*>", prior_cache=str(tmp_path), toyland=ToylandConcept(count=2)
    )


class Painter:
    """Stands for `stream`: pictures that depend on prompt and seed, and on the place in a batch as kernels do."""

    def __init__(self) -> None:
        self.asked: list[tuple[list[str], int, float]] = []
        self.seeds: list[int] = []
        self.stop_after: int | None = None

    def __call__(
        self, pipe: Any, prompts: list[str], seeds: list[int], steps: int, guidance: float, *_: Any, **more: Any
    ) -> Iterator[Image.Image]:
        self.asked.append((prompts, steps, guidance))
        assert more["size"] == RESOLUTION
        for k, seed in enumerate(seeds):
            if k == self.stop_after:
                raise KeyboardInterrupt
            self.seeds.append(seed)
            values = np.random.default_rng([seed, len(prompts[k]), k % 8]).integers(0, 255, (RESOLUTION, RESOLUTION, 3))
            yield Image.fromarray(values.astype(np.uint8))


@pytest.fixture
def painter(monkeypatch: pytest.MonkeyPatch) -> Painter:
    made = Painter()
    monkeypatch.setattr(training_prior, "stream", made)
    return made


def contents(images: PriorImages | None) -> list[bytes]:
    assert images is not None
    return [path.read_bytes() for path in images.paths]


def folder_of(prior: PriorImages | None) -> Path:
    assert prior is not None
    return prior.paths[0].parent


def test_methods_without_prior_preservation_draw_nothing(
    concept: ConceptConfig, backbone: Backbone, painter: Painter
) -> None:
    for options in (
        MethodOptions(),
        dataclasses.replace(OPTIONS, prior_images=0),
        dataclasses.replace(OPTIONS, prior_weight=0.0),
    ):
        assert prior_of(concept, options)(backbone) is None
    assert not painter.asked


def test_the_frozen_model_draws_its_superclass_once(
    concept: ConceptConfig, backbone: Backbone, painter: Painter
) -> None:
    prior = prior_of(concept, OPTIONS)(backbone)
    assert prior is not None and len(prior) == 3 and set(prior.prompts) == {"a photo of a cat"}
    assert painter.asked == [(["a photo of a cat"] * 8, 2, 7.5)]
    assert prior_of(concept, OPTIONS)(backbone_of()) == prior and len(painter.asked) == 1


def test_their_number_is_no_part_of_the_key(concept: ConceptConfig, backbone: Backbone, painter: Painter) -> None:
    first = prior_of(concept, OPTIONS)(backbone)
    more = prior_of(concept, dataclasses.replace(OPTIONS, prior_images=9))(backbone)
    assert first is not None and more is not None and more.paths[:3] == first.paths
    assert len({*painter.seeds}) == 16 and len({*contents(more)}) == 9, "whole batches, a seed for each picture"
    inputs = json.loads((folder_of(first) / "inputs.json").read_text())
    assert (inputs["prompt"], inputs["batch_size"], inputs["steps"], inputs["resolution"]) == (
        "a photo of a cat", 8, 2, RESOLUTION,
    )  # fmt: skip
    pixels = more.pixels(2, 5, RESOLUTION)
    expected = torch.from_numpy(np.asarray(Image.open(more.paths[3]), dtype=np.float32) / 127.5 - 1).permute(2, 0, 1)
    torch.testing.assert_close(pixels[1], expected)


@pytest.mark.parametrize("stop_after", [1, 9])
def test_an_interrupted_drawing_goes_on_to_the_same_pictures(
    concept: ConceptConfig, backbone: Backbone, painter: Painter, tmp_path: Path, stop_after: int
) -> None:
    options = dataclasses.replace(OPTIONS, prior_images=10)
    whole = prior_of(dataclasses.replace(concept, prior_cache=str(tmp_path / "whole")), options)(backbone)
    painter.stop_after = stop_after
    with pytest.raises(KeyboardInterrupt):
        prior_of(concept, options)(backbone)
    painter.stop_after = None
    painter.seeds.clear()
    assert contents(prior_of(concept, options)(backbone)) == contents(whole)
    assert len(painter.seeds) == (16 if stop_after == 1 else 8), "only batches in which a picture is missing"


@pytest.mark.parametrize(
    "change",
    [{"prior_steps": 3}, {"prior_guidance": 5.0}, {"prior_seed": 1}, {"prior_prompt": "a good photo of a {}"}],
    ids=lambda change: next(iter(change)),
)
def test_other_settings_are_drawn_anew(
    concept: ConceptConfig, backbone: Backbone, painter: Painter, change: dict[str, Any]
) -> None:
    first = prior_of(concept, OPTIONS)(backbone)
    other = prior_of(concept, dataclasses.replace(OPTIONS, **change))(backbone)
    assert folder_of(first) != folder_of(other) and len(painter.asked) == 2


def test_another_model_draws_anew(concept: ConceptConfig, backbone: Backbone, painter: Painter) -> None:
    folders = {folder_of(prior_of(concept, OPTIONS)(backbone))}
    for part, name in (("unet", "conv_out.bias"), ("vae", "decoder.conv_out.bias")):
        other: Any = backbone_of()
        with torch.no_grad():
            other.pipe.components[part].get_parameter(name).add_(1)
        folders.add(folder_of(prior_of(concept, OPTIONS)(other)))
    other = backbone_of(scheduler={"beta_end": 0.02})
    folders.add(folder_of(prior_of(concept, OPTIONS)(other)))
    assert len(folders) == 4


def batches(data: ConceptData, step: int = 0) -> Iterator[Batch]:
    trainer = Trainer(accelerator="cpu", logger=False, enable_checkpointing=False)
    trainer.fit_loop.epoch_loop.automatic_optimization.optim_progress.optimizer.step.total.completed = step
    assert trainer.global_step == step
    data.trainer = trainer
    for batch, _ in data.train_dataloader():
        yield batch


def test_batches_hold_pictures_with_their_prompts(concept: ConceptConfig, backbone: Backbone, tmp_path: Path) -> None:
    for k, caption in enumerate(["a red cat", "a green cat", ""]):
        Image.new("RGB", (80, 80), ("red", "green", "blue")[k]).save(tmp_path / f"{k}.png")
        (tmp_path / f"{k}.txt").write_text(caption)
    real = dataclasses.replace(concept, prior=str(tmp_path))
    prior = prior_of(real, OPTIONS)(backbone)
    examples = examples_of(concept, RESOLUTION)
    data = ConceptData(examples, backbone, OPTIONS, "<cat*>", 0, prior)
    plain = ConceptData(examples, backbone, OPTIONS, "<cat*>", 0)
    data.setup("fit")
    plain.setup("fit")
    seen: list[str] = []
    for batch, other in zip(batches(data), batches(plain), strict=True):
        assert batch.prior is not None and other.prior is None and batch.prior.masks is None
        assert torch.equal(batch.noise, other.noise) and torch.equal(batch.timesteps, other.timesteps)
        assert torch.equal(batch.latents, other.latents) and batch.prompts == other.prompts
        assert not torch.equal(batch.prior.noise, batch.noise) and batch.prior.noise.shape == batch.noise.shape
        for latent, prompt in zip(batch.prior.latents, batch.prior.prompts, strict=True):
            shown = ["a red cat", "a green cat", "a photo of a cat"].index(prompt)
            assert torch.equal(latent, data.prior_latents[shown])
        seen += batch.prior.prompts
    assert {*seen[:3]} == {*seen[3:6]} and len({*seen}) == 3, "in blocks, like the concept's pictures"

    rest, whole = list(batches(data, step=2)), list(batches(data))[2:]
    assert len(rest) == 2
    for one, other in zip(rest, whole, strict=True):
        assert one.prior is not None and other.prior is not None
        assert torch.equal(one.prior.noise, other.prior.noise) and one.prior.prompts == other.prior.prompts
        assert torch.equal(one.prior.latents, other.prior.latents)
        assert torch.equal(one.prior.timesteps, other.prior.timesteps)


def test_a_caption_that_is_too_long_is_found_before_training(
    concept: ConceptConfig, backbone: Backbone, tmp_path: Path
) -> None:
    Image.new("RGB", (80, 80)).save(tmp_path / "a.png")
    (tmp_path / "a.txt").write_text("cat " * 100)
    prior = prior_of(dataclasses.replace(concept, prior=str(tmp_path)), OPTIONS)(backbone)
    data = ConceptData(examples_of(concept, RESOLUTION), backbone, OPTIONS, "<cat*>", 0, prior)
    with pytest.raises(TokenError, match="102 tokens"):
        data.setup("fit")


def test_real_pictures_have_captions_beside_them(tmp_path: Path) -> None:
    for name in ("10.png", "2.jpg", "1.png"):
        Image.new("RGB", (20, 30), "red").save(tmp_path / name)
    (tmp_path / "2.txt").write_text("a tabby\n asleep ")
    images = real_images(str(tmp_path), 5, "a photo of a cat")
    assert [path.name for path in images.paths] == ["1.png", "2.jpg", "10.png"]
    assert images.prompts == ("a photo of a cat", "a tabby asleep", "a photo of a cat")
    assert len(real_images(str(tmp_path), 2, "a cat")) == 2
    assert images.pixels(0, 3, 16).shape == (3, 3, 16, 16)


def test_what_is_wrong_with_real_pictures_is_said(tmp_path: Path) -> None:
    Image.new("RGB", (200, 300), "red").save(tmp_path / "a.jpg")
    data = (tmp_path / "a.jpg").read_bytes()
    (tmp_path / "a.jpg").write_bytes(data[: len(data) // 2])
    with pytest.raises(ConceptImageError, match=r"a\.jpg.*truncated"):
        real_images(str(tmp_path), 5, "a cat")
    Image.new("RGB", (20, 30), "red").save(tmp_path / "a.jpg")
    (tmp_path / "a.txt").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(ConceptImageError, match=r"concept\.prior: .*a\.txt"):
        real_images(str(tmp_path), 5, "a cat")
