"""The backbone seam, held by every backbone."""

import time
from typing import Any

import pytest
import torch
from diffusers import (
    DDIMScheduler,
    DiffusionPipeline,
)
from peft import LoraConfig

from perfusion import backbones
from perfusion.backbones.base import Backbone, Encoding, TokenError
from perfusion.backbones.latent_diffusion import LatentDiffusionBackbone
from tests.backbone_kinds import KINDS, added, loaded, stock

PROMPTS = ["a photo of a {} on the beach", "{}", "a {} and a red {}, in the snow"]


@pytest.fixture(scope="module", params=list(KINDS))
def backbone(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Backbone:
    return loaded(request.param, tmp_path_factory.mktemp(request.param))


def filled(word: str) -> list[str]:
    return [prompt.replace("{}", word) for prompt in PROMPTS]


def words_of(backbone: Backbone) -> list[Any]:
    """What a new word is put into: the tokenizers, and the tables of the text encoders."""
    tokenizers = [part for name, part in backbone.pipe.components.items() if name.startswith("tokenizer")]
    return [*tokenizers, *(encoder.get_input_embeddings() for encoder in backbone.text_encoders().values())]


def test_a_loaded_backbone_is_frozen(backbone: Backbone) -> None:
    assert backbone.family and isinstance(backbone, LatentDiffusionBackbone)
    assert isinstance(backbone.pipe.scheduler, DDIMScheduler) or backbone.prediction == "flow_prediction"
    assert (backbone.device, backbone.dtype) == (torch.device("cpu"), torch.float32)
    encoders = backbone.text_encoders()
    assert encoders == {n: part for n, part in backbone.pipe.components.items() if n.startswith("text_encoder")}
    for module in (backbone.denoiser, backbone.pipe.vae, *encoders.values()):
        assert not module.training and not any(p.requires_grad for p in module.parameters())


def test_edit_sites_are_the_cross_attention_projections(backbone: Backbone) -> None:
    sites = backbone.edit_sites()
    modules = dict(backbone.denoiser.named_modules())
    assert [s.kind for s in sites] == ["k", "v"] * (len(sites) // 2) and sites
    assert all(s.projection is modules[s.name] and s.parent is modules[s.name.rpartition(".")[0]] for s in sites)
    assert all("attn2" in s.name and s.name.endswith(s.attribute) for s in sites)
    width = backbone.encode(["a cat"], "cat").inputs.shape[-1]
    assert all(s.projection.weight.shape[1] == width for s in sites)
    order = list(modules)
    assert [order.index(s.name) for s in sites] == sorted(order.index(s.name) for s in sites)


def test_encodings_are_those_of_the_stock_pipeline(backbone: Backbone) -> None:
    for word in ("cat", "teddy bear"):
        encoding = backbone.encode(filled(word), word)
        assert torch.equal(encoding.context, stock(backbone, filled(word)))
        assert encoding.concept.shape == encoding.context.shape[:2] and encoding.concept.dtype == torch.bool
        assert encoding.concept.sum(1).tolist() == [1, 1, 2]


def test_the_last_token_of_the_word_is_marked(backbone: Backbone) -> None:
    tokenizer = backbone.pipe.tokenizer
    for word, last in (("cat", tokenizer.tokenize(" cat")[-1]), ("teddy bear", tokenizer.tokenize(" bear")[-1])):
        encoding = backbone.encode(filled(word), word)
        for prompt, marks in zip(filled(word), encoding.concept, strict=True):
            tokens = backbone.tokens(prompt)
            assert {tokens[i] for i in marks.nonzero().flatten().tolist()} == {last}
    # "bear" alone is no teddy bear
    assert backbone.encode(["a bear and a teddy bear"], "teddy bear").concept.sum() == 1


def test_prompts_without_the_word_or_too_long_are_refused(backbone: Backbone) -> None:
    assert isinstance(backbone, LatentDiffusionBackbone)
    limit = backbone.length(backbone.pipe.tokenizer)
    with pytest.raises(TokenError, match="'a photo of a dog': expected the word 'cat' in it"):
        backbone.encode(["a cat", "a photo of a dog"], "cat")
    with pytest.raises(TokenError, match="expected the word 'teddy bear'"):
        backbone.encode(["a teddy"], "teddy bear")
    room = limit - len(backbone.pipe.tokenizer(backbone.text("cat", backbone.pipe.tokenizer)).input_ids)
    fits = " ".join(["dog"] * room + ["cat"])
    assert backbone.encode([fits], "cat").concept.sum() == 1
    with pytest.raises(TokenError, match=f"{limit + 1} tokens .* reads {limit}: it would be cut off"):
        backbone.encode([f"dog {fits}"], "cat")


def test_an_added_token_is_encoded_trained_and_removed(backbone: Backbone) -> None:
    before = stock(backbone, filled("cat"))
    sentinel = words_of(backbone)
    assert len(sentinel) == 2 * len(backbone.text_encoders())
    for vectors in (1, 2):
        with added(backbone, vectors) as token:
            encoding = backbone.encode(filled("<cat*>"), "<cat*>")
            assert torch.equal(encoding.context.detach(), stock(backbone, filled("<cat*>")))
            assert encoding.concept.sum(1).tolist() == [1, 1, 2]
            if vectors == 1:  # the superclass's own embedding
                assert torch.equal(encoding.context.detach(), before)
            marked = encoding.context[encoding.concept]
            (marked * torch.arange(marked.shape[-1])).sum().backward()
            assert token.embeddings().keys() == backbone.text_encoders().keys()
            for parameter in token.embeddings().values():
                assert parameter.shape[0] == vectors and parameter.dtype == torch.float32
                assert parameter.grad is not None and (parameter.grad.abs().sum(1) > 1e-3).all()
            frozen = (backbone.denoiser, *(part for part in sentinel if isinstance(part, torch.nn.Module)))
            assert not any(p.grad is not None for part in frozen for p in part.parameters())
        assert all(part is before for part, before in zip(words_of(backbone), sentinel, strict=True))
        assert not any(encoder._forward_hooks for encoder in backbone.text_encoders().values())
        assert torch.equal(stock(backbone, filled("cat")), before)


def test_words_are_checked_with_and_without_the_models(backbone: Backbone, monkeypatch: pytest.MonkeyPatch) -> None:
    def no_model(*_: Any, **__: Any) -> None:
        raise AssertionError("a model was loaded")

    monkeypatch.setattr(DiffusionPipeline, "from_pretrained", no_model)
    for check in (
        backbone.check_token,
        lambda *words: backbones.backbone_class(backbone.config.name).check_words(backbone.config, *words),
    ):
        check("<cat*>", "teddy bear")
        with pytest.raises(TokenError, match="'cat' is already a word"):
            check("cat", "cat")
        with pytest.raises(TokenError, match="superclass"):
            check("<cat*>", "")


def test_the_second_moment_is_over_all_positions_and_cached(
    backbone: Backbone, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert isinstance(backbone, LatentDiffusionBackbone)
    settings = backbone.config.covariance
    captions = list(backbone.captions())
    assert len(captions) == settings.count == 40
    e = backbone.inputs_of(stock(backbone, captions)).double()
    # What pads a caption counts where the denoiser looks at it.
    e = torch.cat(
        [row[: len(backbone.tokens(c)) if backbone.masked else None] for row, c in zip(e, captions, strict=True)]
    )
    C = e.T @ e / len(e)
    expected = C + settings.ridge * C.diagonal().mean() * torch.eye(len(C))
    factor = backbone.second_moment(progress=False)
    torch.testing.assert_close(factor @ factor.T, expected, rtol=1e-6, atol=1e-6)
    assert backbone.moment(progress=False).count == len(e)

    def no_encoding(*_: Any) -> None:
        raise AssertionError("the captions were encoded again")

    monkeypatch.setattr(backbone, "_encode_captions", no_encoding)
    with added(backbone):  # changes no caption: the cache holds
        assert torch.equal(backbone.second_moment(progress=False), factor)
    monkeypatch.setattr(settings, "ridge", 0.5)  # applied after the cache
    assert not torch.equal(backbone.second_moment(progress=False), factor)
    monkeypatch.setattr(settings, "count", 41)
    with pytest.raises(AssertionError, match="encoded again"):
        backbone.second_moment(progress=False)


def test_images_become_latents_and_back(backbone: Backbone) -> None:
    pixels = torch.rand(2, 3, 64, 64, generator=torch.Generator().manual_seed(0)) * 2 - 1
    latents = backbone.latents(pixels)
    assert latents.shape == (2, *backbone.latent_shape()) and not latents.requires_grad
    assert torch.equal(latents, backbone.latents(pixels))  # no sampling
    vae = backbone.pipe.vae
    with torch.no_grad():
        encoded = vae.encode(pixels)
    mean = encoded.latent if "latent" in encoded else encoded.latent_dist.mean
    torch.testing.assert_close(latents, mean * vae.config.scaling_factor)
    assert backbone.denoiser.config.in_channels == backbone.latent_shape()[0]


def test_training_denoises(backbone: Backbone) -> None:
    generator = torch.Generator().manual_seed(0)
    latents, noise = (torch.randn(2, *backbone.latent_shape(), generator=generator) for _ in range(2))
    steps = torch.tensor([0, backbone.train_timesteps - 1])
    noisy = backbone.add_noise(latents, noise, steps)
    assert (noisy[0] - latents[0]).abs().max() < 0.3 and (noisy[1] - noise[1]).abs().max() < 0.5
    target = backbone.target(latents, noise, steps)
    if backbone.pipe.scheduler.config.prediction_type == "epsilon":
        assert torch.equal(target, noise)
    elif backbone.pipe.scheduler.config.prediction_type == "flow_prediction":
        assert torch.equal(target, noise - latents)
    else:  # the velocity: the noise where there is none yet, minus the image where there is nothing else
        assert (target[0] - noise[0]).abs().max() < 0.3 and (target[1] + latents[1]).abs().max() < 0.5
    with added(backbone) as token:
        predicted = backbone.predict(noisy, steps, backbone.encode(["a <cat*>", "a photo of <cat*>"], "<cat*>"))
        assert predicted.shape == latents.shape
        (predicted - target).square().mean().backward()
        assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in token.embeddings().values())
        assert all(p.grad is None for p in backbone.denoiser.parameters())


def test_further_keywords_reach_the_denoiser(backbone: Backbone) -> None:
    encoding = backbone.encode(["a cat"], "cat")
    latents = torch.zeros(1, *backbone.latent_shape())
    ignored = Encoding(encoding.context, encoding.concept, {"unknown_keyword": 1})
    with pytest.raises(TypeError, match="unknown_keyword"):
        backbone.predict(latents, torch.tensor([5]), ignored)


def test_gradient_checkpointing_leaves_no_trace(backbone: Backbone, monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither in a call that trains nor in one that raises."""
    noisy, steps = torch.zeros(2, *backbone.latent_shape()), torch.tensor([10, 900])
    blocks = [*backbone.denoiser.modules()]
    before = [dict(vars(block)) for block in blocks]
    monkeypatch.setattr(backbone.config, "gradient_checkpointing", True)
    with added(backbone):
        encoding = backbone.encode(["a <cat*>", "a photo of <cat*>"], "<cat*>")
        backbone.predict(noisy, steps, encoding).mean().backward()
    encoding = backbone.encode(["a cat", "a cat"], "cat")
    with pytest.raises(TypeError, match="unknown_keyword"):
        backbone.predict(noisy, steps, Encoding(encoding.context, encoding.concept, {"unknown_keyword": 1}))
    for block, state in zip(blocks, before, strict=True):
        assert vars(block).keys() == state.keys() and all(vars(block)[name] is state[name] for name in state)


def test_the_fingerprint_sees_weights_and_not_what_is_attached(backbone: Backbone) -> None:
    def fresh() -> dict[str, str]:
        return backbones.around(backbone.pipe, backbone.config).fingerprint()

    started = time.process_time()
    plain = fresh()
    assert time.process_time() - started < 1
    assert plain["family"] == backbone.family and plain == backbone.fingerprint()
    assert plain.keys() == {*backbone.kind(), "projections", *backbone.text_encoders()}
    assert all(len(value) == 16 for key, value in plain.items() if key not in backbone.kind())
    lora = LoraConfig(r=2, target_modules=["to_k", "to_v", "to_q"], init_lora_weights=False)
    with added(backbone):
        denoiser: Any = backbone.denoiser
        if hasattr(denoiser, "add_adapter"):  # not PixArt's
            denoiser.add_adapter(lora, "style")
        assert fresh() == plain
        if hasattr(denoiser, "unload_lora"):
            denoiser.unload_lora()
    assert fresh() == plain
    tables: Any = [encoder.get_input_embeddings() for encoder in backbone.text_encoders().values()]
    weights: list[tuple[str, Any]] = [("projections", backbone.edit_sites()[-1].projection.weight)]
    weights += [(name, table.weight) for name, table in zip(backbone.text_encoders(), tables, strict=True)]
    for part, weight in weights:
        kept = weight.detach().clone()
        with torch.no_grad():
            weight[1, 1] += 1
            assert {key for key, value in fresh().items() if value != plain[key]} == {part}
            weight.copy_(kept)
            assert fresh() == plain
            weight.data += 0.01  # as in merging LoRA: torch does not count it as a change
            assert {key for key, value in fresh().items() if value != plain[key]} == {part}
            weight.copy_(kept)
    assert fresh() == plain


def test_weights_that_did_not_change_are_not_hashed_again(backbone: Backbone, monkeypatch: pytest.MonkeyPatch) -> None:
    plain = backbones.around(backbone.pipe, backbone.config).fingerprint()
    monkeypatch.setattr("perfusion.backbones.fingerprint.digest", lambda tensors: "anew")
    assert backbones.around(backbone.pipe, backbone.config).fingerprint() == plain
    encoder: Any = next(iter(backbone.text_encoders().values()))
    table = encoder.get_input_embeddings()
    kept = table.weight.detach().clone()
    with torch.no_grad():
        table.weight.mul_(2)
        assert "anew" in backbones.around(backbone.pipe, backbone.config).fingerprint().values()
        table.weight.copy_(kept)
    monkeypatch.undo()
    assert backbones.around(backbone.pipe, backbone.config).fingerprint() == plain


def test_short_encodings_are_the_beginning_of_padded_ones(backbone: Backbone) -> None:
    prompts = ["a photo of a cat", "a cat"]
    whole, short = (backbone.encode(prompts, "cat", padded=padded) for padded in (True, False))
    length = short.context.shape[1]
    assert isinstance(backbone, LatentDiffusionBackbone)
    assert (length < whole.context.shape[1] or not backbone.trims) and short.concept.shape == (2, length)
    torch.testing.assert_close(short.context, whole.context[:, :length], rtol=1e-4, atol=1e-5)
    assert torch.equal(short.concept, whole.concept[:, :length]) and not whole.concept[:, length:].any()
