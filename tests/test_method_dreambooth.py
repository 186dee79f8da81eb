"""DreamBooth: what its word stands for, what it trains, and that stock diffusers draws the same from its export."""

from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import DiffusionPipeline
from torch import Tensor

from perfusion.backbones.base import Backbone, TokenError
from perfusion.backbones.fingerprint import base_parameters
from perfusion.backbones.sdxl import StableDiffusionXLBackbone
from perfusion.concept import Concept, save_concept
from perfusion.config import BackboneConfig
from perfusion.editing import EditError
from perfusion.methods.base import Batch, Word, build
from perfusion.methods.dreambooth import DreamBooth
from tests.concepts import Snapshot, untrained_concept
from tests.drawing import draw
from tests.pipelines import tiny_sdxl

WORD = Word("<bear*>", "teddy bear")
PHRASE = "sks teddy bear"


@pytest.fixture(scope="module")
def sdxl() -> Backbone:
    config = BackboneConfig(name="sdxl", resolution=64, device="cpu")
    return StableDiffusionXLBackbone.around(tiny_sdxl(), config)


def dreambooth(**options: Any) -> DreamBooth:
    method = build({"name": "dreambooth", **options}, WORD)
    assert isinstance(method, DreamBooth)
    return method


def batch(backbone: Backbone, count: int = 1) -> Batch:
    draw = torch.Generator().manual_seed(0)
    shape = (count, *backbone.latent_shape())
    latents, noise = (torch.randn(shape, generator=draw) for _ in range(2))
    prior = Batch(latents.flip(0), None, ["a photo of a cat"] * count, noise.flip(1), torch.tensor([300] * count))
    return Batch(latents, None, ["a photo of a <bear*>"] * count, noise, torch.tensor([500] * count), prior)


def step(method: DreamBooth, backbone: Backbone) -> None:
    optimizer = torch.optim.AdamW(method.parameter_groups())
    sum(method.loss(backbone, batch(backbone)).values(), torch.zeros(())).backward()
    optimizer.step()
    optimizer.zero_grad()


def values(backbone: Backbone) -> dict[str, Tensor]:
    """Everything in the pipeline that has weights, by name, and where it lies in memory."""
    parts = {name: part for name, part in backbone.pipe.components.items() if isinstance(part, torch.nn.Module)}
    return {f"{part}.{name}": value for part, module in parts.items() for name, value in module.named_parameters()}


def test_the_placeholder_is_encoded_as_the_words_that_it_stands_for(backbone: Backbone, sdxl: Backbone) -> None:
    for model in (backbone, sdxl):
        stock = model.encode([f"a photo of a {PHRASE} on the beach"], None)
        method = dreambooth()
        method.attach(model)
        own = model.encode(["a photo of a <bear*> on the beach"], WORD.placeholder)
        method.detach()
        assert torch.equal(own.context, stock.context)
        for name, value in stock.extra.get("added_cond_kwargs", {}).items():
            assert torch.equal(own.extra["added_cond_kwargs"][name], value), f"{name}: SDXL pools the words themselves"


def test_all_of_the_text_encoders_but_their_tables_is_trained_if_asked_for(sdxl: Backbone) -> None:
    before = Snapshot(sdxl.pipe)
    method = dreambooth(train_text_encoder=True, denoiser_rate=1e-3, text_encoder_rate=1e-4)
    method.attach(sdxl)
    groups = {group["name"]: group for group in method.parameter_groups()}
    assert {name: group["lr"] for name, group in groups.items()} == {
        "denoiser": 1e-3,
        "text_encoder": 1e-4,
        "text_encoder_2": 1e-4,
    }
    tables = [
        dict(base_parameters(encoder.get_input_embeddings()))["weight"]  # type: ignore[operator]
        for encoder in sdxl.text_encoders().values()
    ]
    trained = {parameter.data_ptr() for group in groups.values() for parameter in group["params"]}
    assert not any(table.data_ptr() in trained for table in tables)
    assert not any(p.requires_grad for p in values(sdxl).values() if p.data_ptr() not in trained), "nor the words"
    start = method.state()
    step(method, sdxl)
    changed = {name.partition(".")[0] for name, value in method.state().items() if not torch.equal(value, start[name])}
    assert changed == {*groups}
    assert {name: tuple(value.shape) for name, value in start.items()} == method.state_shapes(sdxl)
    method.detach()
    assert before.differences() == [] and all(value.grad is None for value in values(sdxl).values())


@pytest.mark.parametrize("text_encoder", [False, True])
def test_stock_diffusers_draws_the_same_from_the_export(backbone: Backbone, tmp_path: Path, text_encoder: bool) -> None:
    """As a training ends: rounded as in the file, written, detached."""
    method = dreambooth(train_text_encoder=text_encoder, denoiser_rate=1e-3, text_encoder_rate=1e-3)
    method.attach(backbone)
    other = backbone.add_token("<cap*>", "hat")
    step(method, backbone)
    concept = save_concept(tmp_path / "concept.safetensors", Concept.of(method, backbone, 0))
    method.load_state({name: tensor.float() for name, tensor in concept.tensors.items()})
    (tmp_path / "diffusers" / "unet").mkdir(parents=True)
    (tmp_path / "diffusers" / "unet" / "config.json").write_text("of a run that was stopped")
    files = method.export(tmp_path / "diffusers")
    other.remove()
    method.detach()
    assert files and all(file.is_file() for file in files) and files[-1].name == "model_index.json"
    assert {*files} == {path for path in (tmp_path / "diffusers").rglob("*") if path.is_file()}
    assert not [path for path in tmp_path.iterdir() if path.name.startswith(".")]

    with Concept.load(tmp_path / "concept.safetensors").attach(backbone.pipe):
        expected = draw(backbone.pipe, "a photo of a <bear*> on the beach")
    stock: Any = DiffusionPipeline.from_pretrained(tmp_path / "diffusers", local_files_only=True)
    stock.set_progress_bar_config(disable=True)
    assert torch.equal(draw(stock, f"a photo of a {PHRASE} on the beach"), expected)
    assert len(stock.tokenizer) == len(getattr(backbone.pipe, "tokenizer"))  # noqa: B009
    assert (expected - draw(backbone.pipe, f"a photo of a {PHRASE} on the beach")).abs().max() > 1e-3


def test_half_precision_is_for_drawing_alone() -> None:
    config = BackboneConfig(name="sdxl", resolution=64, device="cpu")
    half = StableDiffusionXLBackbone.around(tiny_sdxl().to(torch.bfloat16), config)
    before = Snapshot(half.pipe)
    with pytest.raises(EditError, match=r"backbone\.dtype: found bfloat16 at .*, expected float32"):
        dreambooth().attach(half)
    assert before.differences() == []
    method = dreambooth().eval()
    method.attach(half)
    assert {p.dtype for p in half.denoiser.parameters()} == {torch.bfloat16}
    assert {value.dtype for value in method.state().values()} == {torch.float32}
    method.load_state({name: value + 1 for name, value in method.state().items()})
    method.detach()
    assert before.differences() == []


def test_the_weights_are_one_concepts_at_a_time(backbone: Backbone) -> None:
    method, other = dreambooth(), build({"name": "dreambooth"}, Word("<cat*>", "cat"))
    method.attach(backbone)
    for second in (
        other,
        *(build({"name": name}, Word("<cat*>", "cat")) for name in ("custom_diffusion", "perfusion")),
    ):
        with pytest.raises(EditError, match="found weights of the concept <bear\\*>, expected those of the model"):
            second.attach(backbone)
    method.detach()
    other.attach(backbone)
    other.detach()
    concept = untrained_concept(backbone, Word("<cat*>", "cat"), 0)
    with concept.attach(backbone):
        before = Snapshot(backbone.pipe)
        with pytest.raises(EditError, match=r"<bear\*>: found the edit of <cat\*> at .*, expected none"):
            method.attach(backbone)
        assert before.differences() == []


def test_a_word_that_is_taken_leaves_everything_as_it_was(backbone: Backbone) -> None:
    token = backbone.add_token(WORD.placeholder, "hat")
    before = Snapshot(backbone.pipe)
    with pytest.raises(TokenError, match="already a word"):
        dreambooth().attach(backbone)
    assert before.differences() == []
    token.remove()
