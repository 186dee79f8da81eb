"""The training loop on a tiny Stable Diffusion: data, exact resume, NaN, what is trained and what is not."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from lightning.pytorch import Trainer
from torch import Tensor
from torch.nn import functional

from perfusion.config import ConceptConfig, ConfigError, ToylandConcept
from perfusion.data.dataset import seed_of
from perfusion.data.images import Examples
from perfusion.methods.base import Batch, Method, Word, build
from perfusion.toyland.draw import render
from perfusion.toyland.world import concept_scene, sample_instance
from perfusion.training.checkpoint import SafetensorsCheckpointIO
from perfusion.training.drawn import PLACES
from perfusion.training.module import (
    ConceptData,
    StepBatches,
    TrainingError,
    examples_of,
    part_size,
)
from tests.pipelines import RESOLUTION
from tests.training import Stop, fit, same

STEPS = 6
OPTIONS = {"steps": STEPS, "batch_size": 4}
CONCEPT = ConceptConfig(name="cat", superclass="cat", placeholder="<cat*>", toyland=ToylandConcept(count=3))


@pytest.fixture(scope="module")
def examples() -> Examples:
    return examples_of(CONCEPT, RESOLUTION)


@pytest.fixture
def method(backbone: Any) -> Iterator[Method]:
    made = build({"name": "perfusion", **OPTIONS}, Word("<cat*>", "cat"))
    made.attach(backbone)
    yield made
    made.detach()


@pytest.fixture(scope="module")
def whole(
    tmp_path_factory: pytest.TempPathFactory, backbone: Any, examples: Examples
) -> tuple[Path, dict[str, Tensor]]:
    """A training that was never stopped."""
    folder = tmp_path_factory.mktemp("whole")
    return folder, fit(folder, backbone, examples, OPTIONS)


def test_another_seed_gives_another_concept_and_the_backbone_stays(
    tmp_path: Path, whole: tuple[Path, dict[str, Tensor]], backbone: Any, examples: Examples
) -> None:
    parts = (backbone.pipe.unet, backbone.pipe.text_encoder, backbone.pipe.vae)
    before = [{name: value.clone() for name, value in part.state_dict().items()} for part in parts]
    assert not same(fit(tmp_path, backbone, examples, OPTIONS, seed=1), whole[1])
    assert all(same(dict(part.state_dict()), old) for part, old in zip(parts, before, strict=True))


def test_a_stopped_run_goes_on_bit_for_bit_also_from_the_one_before_a_damaged_last(
    tmp_path: Path, whole: tuple[Path, dict[str, Tensor]], backbone: Any, examples: Examples
) -> None:
    with pytest.raises(RuntimeError, match="crash"):
        fit(tmp_path, backbone, examples, OPTIONS, Stop(5), every=2)
    names = sorted(path.name for path in (tmp_path / "checkpoints").iterdir())
    assert names == ["step-000002.safetensors", "step-000004.safetensors"], "the last and the one before"
    last = tmp_path / "checkpoints" / names[-1]
    last.write_bytes(last.read_bytes()[:-100])
    torch.manual_seed(99)  # the global generator has no part in it
    assert same(fit(tmp_path, backbone, examples, OPTIONS, every=2), whole[1])
    assert (tmp_path / "metrics.csv").read_text() == (whole[0] / "metrics.csv").read_text()
    assert (tmp_path / "checkpoints" / "step-000006.safetensors").exists()


def test_the_backbone_is_in_no_checkpoint(whole: tuple[Path, dict[str, Tensor]]) -> None:
    checkpoint = SafetensorsCheckpointIO().load_checkpoint(whole[0] / "checkpoints/step-000006.safetensors")
    assert all(name.startswith("method.") for name in checkpoint["state_dict"])
    numbers = sum(value.numel() for value in checkpoint["state_dict"].values())
    assert numbers < 2 * sum(value.numel() for value in whole[1].values())


def test_parts_of_a_batch_are_the_batch(
    tmp_path: Path, whole: tuple[Path, dict[str, Tensor]], backbone: Any, examples: Examples
) -> None:
    state = fit(tmp_path, backbone, examples, OPTIONS, keywords={"accumulate_grad_batches": 2})
    for name, value in whole[1].items():
        assert (state[name] - value).norm() < 1e-5 * value.norm(), name


def test_processes_and_parts_divide_every_step(method: Method, backbone: Any, examples: Examples) -> None:
    data = ConceptData(examples, backbone, method.options, "<cat*>", seed=0)
    data.setup("fit")
    whole = list(StepBatches(data, 0, 1, 1))
    shared = [list(StepBatches(data, rank, 2, 2)) for rank in range(2)]
    for step in range(STEPS):
        expected, names = whole[step]
        assert expected.step_prompts is None and len(names) == 4
        seen = [process[2 * step + part] for process in shared for part in range(2)]
        assert torch.equal(torch.cat([batch.noise for batch, _ in seen]), expected.noise)
        assert [prompt for batch, _ in seen for prompt in batch.prompts] == expected.prompts
        assert [name for _, part in seen for name in part] == names
        prompts = [batch.step_prompts for batch, _ in seen]
        assert prompts == [expected.prompts, [], expected.prompts, []], "i* moves once a step, in every process"
    for devices, parts, message in (
        (3, 1, "devices=3: expected a divisor of method.batch_size=4"),
        (1, 8, "accumulate_grad_batches=8"),
        (2, 4, "multiple of 8"),
    ):
        with pytest.raises(ConfigError, match=message):
            part_size(4, devices, parts)


def test_a_loss_that_is_not_finite_names_step_and_pictures(
    tmp_path: Path, backbone: Any, examples: Examples, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls = 0

    def loss(self: Method, backbone: Any, batch: Batch) -> dict[str, Tensor]:
        nonlocal calls
        calls += 1
        total = sum(parameter.square().sum() for parameter in self.parameters())
        assert isinstance(total, Tensor)
        return {"denoising": total, "prior": total * (float("nan") if calls == 3 else 1.0)}

    monkeypatch.setattr(Method, "loss", loss)
    with pytest.raises(TrainingError, match=r"step 3: the loss is not finite .*prior nan.*cat-0-\d"):
        fit(tmp_path, backbone, examples, OPTIONS)
    header = (tmp_path / "metrics.csv").read_text().splitlines()[0]
    assert header == "step,loss,loss/denoising,loss/prior", "several terms are logged apart"


def test_pictures_are_encoded_once(
    method: Method, backbone: Any, examples: Examples, monkeypatch: pytest.MonkeyPatch
) -> None:
    encoded = 0
    latents = backbone.latents

    def counting(pixels: Tensor) -> Tensor:
        nonlocal encoded
        encoded += len(pixels)
        return latents(pixels)

    monkeypatch.setattr(backbone, "latents", counting)
    data = ConceptData(examples, backbone, method.options, "<cat*>", seed=0)
    data.trainer = Trainer(logger=False, enable_progress_bar=False, accelerator="cpu")
    data.setup("fit")
    batches = list(data.train_dataloader())
    assert encoded == len(examples) and len(batches) == STEPS
    batch, names = batches[0]
    assert batch.latents.shape == batch.noise.shape == (4, *backbone.latent_shape())
    assert batch.masks is not None and batch.masks.shape == (4, 1, *backbone.latent_shape()[1:])
    assert torch.equal(batch.masks.amax((1, 2, 3)), torch.ones(4))
    assert all("<cat*>" in prompt for prompt in batch.prompts) and len(names) == 4
    for row, name in enumerate(names):
        expected = data.latents[examples.names.index(name)]
        assert torch.equal(batch.latents[row], expected)


def test_toyland_draws_one_toy(examples: Examples) -> None:
    again = examples_of(CONCEPT, RESOLUTION)
    assert torch.equal(again.pixels, examples.pixels)
    one = examples_of(ConceptConfig("cat", "cat", "<x>", toyland=ToylandConcept(count=1)), RESOLUTION)
    assert torch.equal(one.pixels[0], examples.pixels[0]), "picture k does not depend on how many there are"
    other = examples_of(ConceptConfig("cat", "cat", "<x>", toyland=ToylandConcept(instance=1)), RESOLUTION)
    assert not torch.equal(other.pixels, one.pixels)
    large = examples_of(CONCEPT, 2 * RESOLUTION)
    assert large.pixels.shape == (3, 3, 2 * RESOLUTION, 2 * RESOLUTION)
    assert examples.masks is not None and large.masks is not None
    toy = sample_instance(np.random.default_rng(CONCEPT.toyland.instance), CONCEPT.superclass)
    for k in range(CONCEPT.toyland.count):
        seed = seed_of("toyland concept", CONCEPT.toyland.instance, k)
        drawn = render(concept_scene(toy, seed, place=PLACES[k % len(PLACES)]))
        exact = torch.from_numpy(drawn.masks[0]).float() / 255
        assert 0.05 < exact.mean() < 0.6 and exact.max() == 1
        image = torch.from_numpy(drawn.image).permute(2, 0, 1).float() / 127.5 - 1
        torch.testing.assert_close(examples.pixels[k], image, rtol=0, atol=1e-6)
        torch.testing.assert_close(examples.masks[k, 0], exact, rtol=0, atol=1e-6)
        halved = functional.avg_pool2d(large.masks[k], 2)[0]
        assert (halved - exact).abs().mean() < 0.015, "enlarged, where the picture is"
