"""What people bring to a training beside pictures: captions and templates of their own, mirroring, rate schedules and
min-SNR weighting. Each is seen in what is trained, and a resumed run is one that was never stopped."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from perfusion.backbones.base import Backbone, TokenError
from perfusion.concept import Concept
from perfusion.config import ConceptConfig, TrainConfig
from perfusion.data.captions import TrainingPrompts, own_prompts, read_templates
from perfusion.data.dataset import StepDataset
from perfusion.data.images import ConceptImageError, Examples
from perfusion.methods.base import Batch, Method, Word, build, squared_error
from perfusion.training.inputs import inputs_of
from perfusion.training.module import ConceptData, StepBatches, examples_of
from perfusion.training.run_folder import config_hash
from tests.backbone_kinds import loaded
from tests.pipelines import RESOLUTION
from tests.training import Stop, fit, run, same

SMALL = {"steps": 4, "batch_size": 2}
WORD = Word("<cat*>", "cat")
ALL = {**SMALL, "rate_schedule": "cosine", "warmup_steps": 2, "min_snr_gamma": 0.5}


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three pictures with masks, of which two have captions."""
    folder = tmp_path_factory.mktemp("photos")
    (folder / "mask").mkdir()
    draw = np.random.default_rng(0)
    for name in ("a", "b", "c"):
        Image.fromarray(draw.integers(0, 256, (64, 64, 3), dtype=np.uint8)).save(folder / f"{name}.png")
        mask = np.zeros((64, 64), np.uint8)
        mask[:, :20] = 255
        Image.fromarray(mask).save(folder / "mask" / f"{name}.png")
    (folder / "a.txt").write_text("a {} on the\nbeach\n")
    (folder / "b.txt").write_text("the <cat*>, asleep")
    (folder / "c.txt").write_text(" \n")
    return folder


def concept(photos: Path, **more: Any) -> ConceptConfig:
    return ConceptConfig("cat", "cat", "<cat*>", images=str(photos), masks=str(photos / "mask"), **more)


@pytest.fixture(scope="module")
def examples(photos: Path) -> Examples:
    return examples_of(concept(photos), RESOLUTION)


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory, backbone: Backbone, examples: Examples) -> dict[str, Tensor]:
    return fit(tmp_path_factory.mktemp("plain"), backbone, examples, SMALL)


CHANGES: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "linear": ({"rate_schedule": "linear"}, {}),
    "warm-up": ({"warmup_steps": 3}, {}),
    "min-SNR": ({"min_snr_gamma": 0.05}, {}),
    "mirror": ({}, {"mirror": True}),
    "captions": ({}, {"prompts": TrainingPrompts(["a photo of a <cat*>"], ["a <cat*> on the beach"] * 3)}),
    "templates": ({}, {"prompts": TrainingPrompts(["a drawing of a <cat*>"])}),
}


@pytest.mark.parametrize("change", list(CHANGES))
def test_each_is_seen_in_what_is_trained(
    change: str, tmp_path: Path, backbone: Backbone, examples: Examples, plain: dict[str, Tensor]
) -> None:
    options, data = CHANGES[change]
    found = fit(tmp_path, backbone, examples, {**SMALL, **options}, **data)
    assert not same(found, plain)
    assert not torch.equal(found["values"], plain["values"])


def test_all_of_them_resumed_and_in_parts(tmp_path: Path, backbone: Backbone, examples: Examples) -> None:
    data = {"mirror": True, "prompts": TrainingPrompts(["a drawing of a <cat*>"], ["a <cat*>, asleep", None, None])}
    seen, again = Stop(), Stop()
    whole = fit(tmp_path / "whole", backbone, examples, ALL, seen, **data)
    with pytest.raises(RuntimeError, match="crash"):
        fit(tmp_path / "stopped", backbone, examples, ALL, Stop(3), **data)
    assert same(fit(tmp_path / "stopped", backbone, examples, ALL, again, **data), whole)
    factors = [round(rates[0] / 0.03, 6) for rates in seen.rates]
    assert factors == [0.5, 1.0, 1.0, 0.5], "half, all, then along the cosine"
    assert again.rates == seen.rates[-len(again.rates) :]
    parts = fit(tmp_path / "parts", backbone, examples, ALL, keywords={"accumulate_grad_batches": 2}, **data)
    for name, value in whole.items():
        assert (parts[name] - value).norm() < 1e-4 * value.norm(), name


def test_rates_over_a_training() -> None:
    def factors(**options: Any) -> list[float]:
        made = build({"name": "lora", "steps": 10, **options}, WORD).options
        return [made.rate_factor(step) for step in range(10)]

    assert factors() == [1.0] * 10
    assert factors(warmup_steps=4) == [0.25, 0.5, 0.75, *[1.0] * 7]
    assert factors(rate_schedule="linear", warmup_steps=5) == pytest.approx(
        [0.2, 0.4, 0.6, 0.8, 1, 1, 0.8, 0.6, 0.4, 0.2]
    )
    cosine = factors(rate_schedule="cosine")
    assert cosine[0] == 1.0 and cosine[5] == pytest.approx(0.5) and cosine[9] == pytest.approx(0.0245, abs=1e-4)
    assert cosine == sorted(cosine, reverse=True)


@pytest.mark.parametrize("kind", ["sd15", "sd21"])
def test_min_snr_weighs_the_clean_latents_error_by_a_bounded_snr(kind: str, tmp_path: Path) -> None:
    """Of noise and of velocity, both turned into the error of the clean latents that they stand for."""
    backbone = loaded(kind, tmp_path, resolution=RESOLUTION)
    timesteps = torch.tensor([1, 400, 999])
    draw = torch.Generator().manual_seed(0)
    latents, noise = (torch.randn(3, *backbone.latent_shape(), generator=draw) for _ in range(2))
    batch = Batch(latents, None, ["a photo of a cat"] * 3, noise, timesteps)
    encoding = backbone.encode(batch.prompts, "cat")
    gamma = 5.0
    methods = [build({"name": "lora", "min_snr_gamma": value}, WORD) for value in (gamma, None)]
    with torch.no_grad():
        weighted, error = (method.error(backbone, batch, encoding) for method in methods)
        assert torch.equal(error, squared_error(backbone, batch, encoding))
        noisy = backbone.add_noise(latents, noise, timesteps)
        said = backbone.predict(noisy, timesteps, encoding)
    schedule: Any = backbone.pipe.scheduler  # type: ignore[attr-defined]
    kept = schedule.alphas_cumprod[timesteps].view(-1, 1, 1, 1)
    if kind == "sd15":
        clean = (noisy - (1 - kept).sqrt() * said) / kept.sqrt()
    else:
        clean = kept.sqrt() * noisy - (1 - kept).sqrt() * said
    snr = kept / (1 - kept)
    assert snr[0] > gamma > snr[1]
    torch.testing.assert_close(weighted, snr.clamp(max=gamma) * (clean - latents).square(), rtol=2e-3, atol=1e-5)


@pytest.fixture
def attached(backbone: Backbone) -> Iterator[Method]:
    made = build({"name": "perfusion", "steps": 40, "batch_size": 4}, WORD)
    made.attach(backbone)
    yield made
    made.detach()


def test_pictures_and_masks_are_mirrored_together_and_nothing_else_changes(
    backbone: Backbone, examples: Examples, attached: Method
) -> None:
    made = [ConceptData(examples, backbone, attached.options, "<cat*>", 0, mirror=mirror) for mirror in (False, True)]
    for data in made:
        data.setup("fit")
    draws = [made[1].dataset[k] for k in range(len(made[1].dataset))]
    assert 0.3 < np.mean([draw["mirrored"] for draw in draws]) < 0.7
    turned = backbone.latents(examples.pixels.flip(-1))
    k = 0
    for (one, names), (other, again) in zip(*(StepBatches(data, 0, 1, 1) for data in made), strict=True):
        assert names == again and one.prompts == other.prompts
        assert torch.equal(one.noise, other.noise) and torch.equal(one.timesteps, other.timesteps)
        assert one.masks is not None and other.masks is not None
        for row, name in enumerate(names):
            number = examples.names.index(name)
            mask = one.masks[row]
            expected = (turned[number], mask.flip(-1)) if draws[k]["mirrored"] else (one.latents[row], mask)
            torch.testing.assert_close(other.latents[row], expected[0], rtol=1e-4, atol=1e-5)
            assert torch.equal(other.masks[row], expected[1])
            k += 1


def test_captions_go_with_their_pictures(
    photos: Path, backbone: Backbone, examples: Examples, attached: Method
) -> None:
    asked = concept(photos, captions="files", templates=["a drawing of {}"])
    prompts = own_prompts(asked, "imagenet", None)
    assert prompts is not None and prompts.drawn == ["a drawing of <cat*>"]
    assert prompts.captions == ["a <cat*> on the beach", "the <cat*>, asleep", None]
    data = ConceptData(examples, backbone, attached.options, "<cat*>", 0, prompts=prompts)
    data.setup("fit")
    expected = {"a.png": "a <cat*> on the beach", "b.png": "the <cat*>, asleep", "c.png": "a drawing of <cat*>"}
    seen = set()
    for batch, names in StepBatches(data, 0, 1, 1):
        assert batch.prompts == [expected[name] for name in names]
        seen |= {*names}
    assert seen == {*expected}
    halves = [batch.step_prompts for batch, _ in StepBatches(data, 0, 1, 2)]
    assert halves[0] == [data.dataset[k]["prompt"] for k in range(4)] and halves[1] == []
    assert own_prompts(concept(photos), "imagenet", "a photo of a {}") is None
    too_long = TrainingPrompts(["a <cat*> " * 40])
    with pytest.raises(TokenError, match="it would be cut off"):
        ConceptData(examples, backbone, attached.options, "<cat*>", 0, prompts=too_long).setup("fit")


def test_captions_and_templates_that_cannot_be_used(photos: Path, tmp_path: Path) -> None:
    (tmp_path / "lines.txt").write_text("a {} at night\n\n  my   {}\n")
    assert read_templates(str(tmp_path / "lines.txt")) == ["a {} at night", "my {}"]
    Image.new("RGB", (8, 8)).save(tmp_path / "a.png")
    for text, says in (
        ("a cat", r"a\.txt: found 'a cat', expected {} or <cat\*> where"),
        (b"\xff", "a.txt: expected a"),
    ):
        (tmp_path / "a.txt").write_bytes(text if isinstance(text, bytes) else text.encode())
        with pytest.raises(ConceptImageError, match=f"concept.captions: .*{says}"):
            own_prompts(concept(tmp_path / "a.png", captions="files"), "imagenet", None)


def test_defaults_are_as_before_and_files_are_read(photos: Path, tmp_path: Path) -> None:
    config = TrainConfig(method={"name": "perfusion"}, concept=concept(photos))
    named = {"rate_schedule": "constant", "warmup_steps": 0, "min_snr_gamma": None}
    for method, changes in (
        (named, {}),
        ({"rate_schedule": "linear"}, None),
        ({}, {"mirror": True}),
        ({}, {"captions": "files"}),
        ({}, {"templates": ["a {}"]}),
    ):
        other = dataclasses.replace(
            config,
            method={**config.method, **method},
            concept=dataclasses.replace(config.concept, **(changes or {})),
        )
        assert (config_hash(other) == config_hash(config)) == (method is named)
    lines = tmp_path / "lines.txt"
    lines.write_text("a {}")
    asked = dataclasses.replace(config, concept=concept(photos, captions="files", templates=str(lines)))
    read = inputs_of(asked, build(config.method, WORD))
    assert {*read["concept.captions"]} == {"a.txt", "b.txt", "c.txt"} and {*read["concept.templates"]} == {"lines.txt"}
    draws = StepDataset(5, ["a photo of a <cat*>"] * 3, (1, 1, 1), 3, 4, 3, 1000)
    assert [draws[k]["index"] for k in range(12)] == [4, 1, 2, 0, 3, 4, 2, 0, 3, 1, 1, 4]
    made = build({"name": "perfusion", **named}, WORD)
    assert not {*named} & {*made.settings}, "concept files do not grow by what is as it was"
    assert build({"name": "perfusion", "warmup_steps": 3}, WORD).settings["warmup_steps"] == 3


def test_the_command_takes_all_of_them(
    words: list[str], photos: Path, here: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    Path("lines.txt").write_text("a {} at night\n")
    words += [f"concept.images={photos} concept.masks=null concept.superclass=cat concept.placeholder='<cat*>'"]
    words += ["concept.captions=files concept.templates=lines.txt concept.mirror=true method.min_snr_gamma=5"]
    words += ["method.rate_schedule=cosine method.warmup_steps=1 method.steps=2 run.dir=run"]
    assert run(*words) == 0, capsys.readouterr().err
    settings = Concept.load("run/concept.safetensors").settings
    assert (settings["rate_schedule"], settings["warmup_steps"], settings["min_snr_gamma"]) == ("cosine", 1, 5.0)


@pytest.mark.parametrize("name", ["perfusion", "textual_inversion"])
def test_a_word_learns_its_direction_alone(tmp_path: Path, backbone: Backbone, examples: Examples, name: str) -> None:
    """Also where the training stopped in between; without the option its norm moves."""
    options = {**SMALL, "name": name, "vectors": 2, "embedding_rate": 0.05}
    free = fit(tmp_path / "free", backbone, examples, options)["embedding.text_encoder"]
    kept = fit(tmp_path / "kept", backbone, examples, {**options, "direction_only": True})["embedding.text_encoder"]
    with pytest.raises(RuntimeError, match="crash"):
        fit(tmp_path / "stopped", backbone, examples, {**options, "direction_only": True}, Stop(2))
    resumed = fit(tmp_path / "stopped", backbone, examples, {**options, "direction_only": True})
    assert torch.equal(resumed["embedding.text_encoder"], kept)
    pipe: Any = backbone.pipe
    (i,) = pipe.tokenizer("cat", add_special_tokens=False).input_ids
    start = pipe.text_encoder.get_input_embeddings().weight[i].detach()
    torch.testing.assert_close(kept.norm(dim=-1), start.norm().expand(2))
    cosines = torch.nn.functional.cosine_similarity(kept, start[None])
    assert (cosines < 0.999).all()
    assert ((free.norm(dim=-1) / start.norm() - 1).abs() > 1e-3).any()
