"""Custom Diffusion: what its word stands for, what it trains, and two concepts in one picture by the closed form."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from perfusion.backbones.base import Backbone
from perfusion.backbones.stable_diffusion import StableDiffusionBackbone
from perfusion.concept import Concept, save_concept
from perfusion.editing import EditError
from perfusion.generate import main as generate
from perfusion.methods.base import Batch, Word, build
from perfusion.methods.custom_diffusion import CustomDiffusion, merged_projection, token_vectors
from tests.concepts import random_concept
from tests.drawing import draw
from tests.pipelines import tiny_pipeline_folder

BEAR, HAT = Word("<bear*>", "teddy bear"), Word("<hat*>", "hat")


def custom_diffusion(word: Word = BEAR, **options: Any) -> CustomDiffusion:
    method = build({"name": "custom_diffusion", **options}, word)
    assert isinstance(method, CustomDiffusion)
    return method


@pytest.fixture(scope="module")
def bear(backbone: Backbone) -> Concept:
    return random_concept(backbone, BEAR, 1, name="custom_diffusion")


@pytest.fixture(scope="module")
def hat(backbone: Backbone) -> Concept:
    return random_concept(backbone, HAT, 2, name="custom_diffusion")


def weights(backbone: Backbone) -> list[Tensor]:
    found: list[Tensor] = []
    for site in backbone.edit_sites():
        weight: Any = site.projection.weight
        found.append(weight)
    return found


def test_merging_is_the_constrained_least_squares() -> None:
    """Against the problem written out: minimise ½ tr((Ŵ − W) M (Ŵ − W)ᵀ) subject to Ŵ Cᵀ = O, by its KKT equations."""
    torch.manual_seed(0)
    h, d, s = 5, 12, 3
    captions = torch.randn(200, d, dtype=torch.float64) @ torch.randn(d, d, dtype=torch.float64)
    moment = captions.T @ captions / 200
    weight, words, outputs = (torch.randn(*shape, dtype=torch.float64) for shape in ((h, d), (s, d), (s, h)))
    found = merged_projection(weight, words, outputs, torch.linalg.cholesky(moment))

    # For each row w of Ŵ:  M w + Cᵀ λ = M w₀  and  C w = o.
    system = torch.cat([torch.cat([moment, words.T], 1), torch.cat([words, torch.zeros(s, s, dtype=torch.float64)], 1)])
    right = torch.cat([moment @ weight.T, outputs])
    expected = torch.linalg.solve(system, right)[:d].T
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(found @ words.T, outputs.T, rtol=1e-9, atol=1e-9)
    scaled = merged_projection(weight, words, outputs, torch.linalg.cholesky(7 * moment))
    torch.testing.assert_close(scaled, found, rtol=1e-9, atol=1e-9, msg="a factor of C cancels")

    def cost(candidate: Tensor) -> float:
        return ((captions @ (candidate - weight).T) ** 2).sum().item()

    other = found + torch.randn(h, d, dtype=torch.float64) @ torch.eye(d, dtype=torch.float64)
    other = other - torch.linalg.lstsq(words, (other @ words.T - outputs.T).T).solution.T  # meets the constraint, too
    torch.testing.assert_close(other @ words.T, outputs.T)
    assert cost(found) < cost(other)


def test_words_that_cannot_be_told_apart_cannot_be_merged() -> None:
    words = torch.randn(3, 6, dtype=torch.float64)
    words[2] = words[0] - words[1]
    with pytest.raises(ValueError, match="found one of 3 in the span of the others"):
        merged_projection(torch.zeros(2, 6), words, torch.zeros(3, 2), torch.eye(6, dtype=torch.float64))


def test_the_modifier_stands_before_the_words_of_the_superclass_and_alone_is_trained(backbone: Backbone) -> None:
    method = custom_diffusion(embedding_rate=0.1)
    start = token_vectors(backbone, BEAR.placeholder, "ktn")["text_encoder"].mean(0)
    words = token_vectors(backbone, BEAR.placeholder, "teddy bear")["text_encoder"]
    method.attach(backbone)
    (vectors,) = method.embeddings.values()
    assert torch.equal(vectors[0], start) and torch.equal(vectors[1:], words) and len(words) == 2
    optimizer = torch.optim.AdamW(method.parameter_groups())
    shape = (1, *backbone.latent_shape())
    for _ in range(2):
        example = Batch(torch.ones(shape), None, ["my <bear*>"], torch.zeros(shape), torch.tensor([500]))
        method.loss(backbone, example)["denoising"].backward()
        optimizer.step()
    assert not torch.equal(vectors[0], start) and torch.equal(vectors[1:], words)
    assert method.state()["embedding.text_encoder"].shape == (1, vectors.shape[1])
    method.detach()


def test_two_concepts_keep_what_their_words_project_to(backbone: Backbone, bear: Concept, hat: Concept) -> None:
    before = weights(backbone)
    plain = draw(backbone.pipe, "a bear")
    first = bear.attach(backbone.pipe)  # by the pipeline: another wrapper each time, and the same fingerprint
    alone = draw(backbone.pipe, "a photo of a <bear*>")
    second = hat.attach(backbone.pipe)
    merged = [weight.double() for weight in weights(backbone)]
    for attached in (first, second):
        method: Any = attached.method
        words = method.target_words(backbone)
        assert words.shape == (1 + len(method.word.superclass.split()), merged[0].shape[1])
        for weight, own in zip(merged, method.weights, strict=True):
            torch.testing.assert_close(words @ weight.T, words @ own.double().T, rtol=1e-4, atol=1e-4)
    together = draw(backbone.pipe, "a photo of a <bear*> and a <hat*>")

    first.detach()
    assert all(torch.equal(weight, own) for weight, own in zip(weights(backbone), second.method.weights, strict=True))  # type: ignore[arg-type]
    first = bear.attach(backbone)
    torch.testing.assert_close(draw(backbone.pipe, "a photo of a <bear*> and a <hat*>"), together, atol=1e-3, rtol=1e-3)
    second.detach()
    assert torch.equal(draw(backbone.pipe, "a photo of a <bear*>"), alone)
    first.detach()
    assert all(weight is old for weight, old in zip(weights(backbone), before, strict=True))
    assert torch.equal(draw(backbone.pipe, "a bear"), plain)


def test_two_files_are_generated_together(
    bear: Concept, hat: Concept, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    moment = torch.eye(32, dtype=torch.float64)  # that of the preset takes 10,000 captions
    monkeypatch.setattr(StableDiffusionBackbone, "second_moment", lambda self: moment)
    save_concept("bear.safetensors", bear)
    save_concept("hat.safetensors", hat)
    words = ["concept=[bear.safetensors, hat.safetensors]", "prompt=a <bear*> and a <hat*>", "num=1", "steps=1"]
    pipeline = tiny_pipeline_folder(tmp_path)
    generate([*words, "backbone=sd15", f"path={pipeline}", "device=cpu", "out=out"])
    assert len(list(Path("out").glob("a-bear*.png"))) == 1


def test_what_is_trained_is_alone(backbone: Backbone, bear: Concept) -> None:
    before = weights(backbone)
    trained = custom_diffusion(HAT)
    with bear.attach(backbone):
        with pytest.raises(EditError, match=r"<hat\*>: found <bear\*> attached, expected no other concept"):
            trained.attach(backbone)
        for name in ("dreambooth", "perfusion"):
            with pytest.raises(EditError, match="found weights of the concept <bear\\*>"):
                build({"name": name}, HAT).attach(backbone)
    trained.attach(backbone)
    with pytest.raises(EditError, match=r"<bear\*>: found <hat\*> attached, expected no other concept"):
        bear.attach(backbone)
    trained.detach()
    assert all(weight is old for weight, old in zip(weights(backbone), before, strict=True))
