"""What a training knows of pictures of the superclass: when they are drawn anew, and how its batches hold them."""

import dataclasses
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Trainer
from PIL import Image

from perfusion.backbones.base import Backbone, TokenError
from perfusion.backbones.stable_diffusion import StableDiffusionBackbone
from perfusion.config import BackboneConfig, ConceptConfig, ToylandConcept
from perfusion.data.prior import PriorImages
from perfusion.methods.base import Batch, MethodOptions
from perfusion.methods.prior import PriorOptions
from perfusion.training import prior as training_prior
from perfusion.training.data import ConceptData, examples_of
from perfusion.training.prior import prior_of
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


@pytest.fixture
def drawn(monkeypatch: pytest.MonkeyPatch) -> list[tuple[list[str], int, float]]:
    """Every drawing that was asked for; a colour stands for each picture."""
    asked: list[tuple[list[str], int, float]] = []

    def stream(pipe: Any, prompts: list[str], seeds: list[int], steps: int, guidance: float, *_: Any, **keywords: Any):
        asked.append((prompts, steps, guidance))
        assert keywords["size"] == RESOLUTION
        return (Image.new("RGB", (RESOLUTION, RESOLUTION), (seed % 255, k, 0)) for k, seed in enumerate(seeds))

    monkeypatch.setattr(training_prior, "stream", stream)
    return asked


def folder_of(prior: PriorImages | None) -> Path:
    assert prior is not None
    return prior.paths[0].parent


def test_methods_without_prior_preservation_draw_nothing(
    concept: ConceptConfig, backbone: Backbone, drawn: list[Any]
) -> None:
    for options in (
        MethodOptions(),
        dataclasses.replace(OPTIONS, prior_images=0),
        dataclasses.replace(OPTIONS, prior_weight=0.0),
    ):
        assert prior_of(concept, options)(backbone) is None
    assert not drawn


def test_the_frozen_model_draws_its_superclass_once(
    concept: ConceptConfig, backbone: Backbone, drawn: list[Any]
) -> None:
    prior = prior_of(concept, OPTIONS)(backbone)
    assert prior is not None and len(prior) == 3 and set(prior.prompts) == {"a photo of a cat"}
    assert drawn == [(["a photo of a cat"] * 8, 2, 7.5)]
    assert prior_of(concept, OPTIONS)(backbone_of()) == prior and len(drawn) == 1


@pytest.mark.parametrize(
    "change",
    [{"prior_steps": 3}, {"prior_guidance": 5.0}, {"prior_seed": 1}, {"prior_prompt": "a good photo of a {}"}],
    ids=lambda change: next(iter(change)),
)
def test_other_settings_are_drawn_anew(
    concept: ConceptConfig, backbone: Backbone, drawn: list[Any], change: dict[str, Any]
) -> None:
    first = prior_of(concept, OPTIONS)(backbone)
    other = prior_of(concept, dataclasses.replace(OPTIONS, **change))(backbone)
    assert folder_of(first) != folder_of(other) and len(drawn) == 2


def test_another_model_draws_anew(concept: ConceptConfig, backbone: Backbone, drawn: list[Any]) -> None:
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
