"""What is Stable Diffusion XL's own: two text encoders, the pooled text, sizes, an autoencoder that overflows."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import perfusion
from perfusion.backbones.sdxl import StableDiffusionXLBackbone
from perfusion.concept import Concept
from perfusion.editing import TokenError
from perfusion.methods.base import Word
from tests.concepts import tiny_sdxl_backbone, untrained_concept
from tests.pipelines import tiny_sdxl

BEAR = "a photo of <bear*> on the beach"
PLAIN = "a photo of teddy bear on the beach"
BOTH = "<cat*> and a red <bear*> in the snow"
pytestmark = pytest.mark.usefixtures("untouched")


@pytest.fixture(scope="module")
def backbone(tmp_path_factory: pytest.TempPathFactory) -> StableDiffusionXLBackbone:
    return tiny_sdxl_backbone(tmp_path_factory.mktemp("covariance"))


@pytest.fixture(scope="module")
def bear(backbone: StableDiffusionXLBackbone) -> Concept:
    return untrained_concept(backbone, Word("<bear*>", "teddy bear"), 0)


@pytest.fixture(scope="module")
def cat(backbone: StableDiffusionXLBackbone) -> Concept:
    return untrained_concept(backbone, Word("<cat*>", "cat"), 1)


def encoded(pipe: Any, *prompts: str, **settings: Any) -> tuple[Tensor, Tensor]:
    """Contexts and pooled texts of the stock pipeline."""
    with torch.no_grad():
        context, _, pooled, _ = pipe.encode_prompt(
            [*prompts], device="cpu", num_images_per_prompt=1, do_classifier_free_guidance=False, **settings
        )
    return context, pooled


def close(found: Tensor, expected: Tensor) -> None:
    """Equal but for the rounding of batches of other sizes."""
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-3)


@contextmanager
def conditions(pipe: Any) -> Iterator[list[dict[str, Tensor]]]:
    """What the UNet is given besides the context, call by call."""
    seen: list[dict[str, Tensor]] = []

    def look(unet: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        seen.append(kwargs["added_cond_kwargs"])

    hook = pipe.unet.register_forward_pre_hook(look, with_kwargs=True)
    try:
        yield seen
    finally:
        hook.remove()


def pictures(pipe: Any, *prompts: str, **settings: Any) -> Tensor:
    generators = [torch.Generator().manual_seed(7) for _ in prompts]
    given: dict[str, Any] = {"num_inference_steps": 2, "output_type": "pt"} | settings
    return pipe([*prompts], generator=generators, **given).images


# --- the pooled text ------------------------------------------------------------------------------------------------


def test_the_pooled_text_is_that_of_the_superclass(
    backbone: StableDiffusionXLBackbone, bear: Concept, cat: Concept
) -> None:
    pipe = backbone.pipe
    plain_context, plain = encoded(pipe, PLAIN, "cat and a red teddy bear in the snow")
    with bear.attach(backbone):
        context, pooled = encoded(pipe, BEAR, "a dog")
        close(pooled[0], plain[0])
        close(pooled[1], encoded(pipe, "a dog")[1][0])
        assert not torch.allclose(context[0], plain_context[0], atol=0.1), "K and V still read the word itself"
        with cat.attach(backbone):
            close(encoded(pipe, BOTH)[1][0], plain[1])
        close(encoded(pipe, BEAR)[1][0], plain[0])
        # Of the prompt that the second encoder reads, where it is another one; and of negative prompts.
        close(encoded(pipe, "a dog", prompt_2=BEAR)[1][0], plain[0])
        with conditions(pipe) as seen:
            pictures(pipe, "a dog", negative_prompt=[BEAR], guidance_scale=3.0)
        close(seen[0]["text_embeds"][0], plain[0])
    assert not torch.allclose(plain[0], plain[1], atol=0.1)


def test_words_of_several_vectors_pool_as_their_superclass(backbone: StableDiffusionXLBackbone) -> None:
    _, plain = encoded(backbone.pipe, "a photo of cat on the beach")
    token = backbone.add_token("<cat*>", "cat", vectors=3)
    try:
        for vectors in token.embeddings().values():
            vectors.data.add_(5 * torch.randn(vectors.shape, generator=torch.Generator().manual_seed(0)))
        _, pooled = encoded(backbone.pipe, "a photo of <cat*> on the beach")
        close(pooled, plain)
        # Whoever wants a tuple gets the same, and so does a copy of the encoder.
        inputs = backbone.pipe.tokenizer_2(
            ["a photo of <cat*> on the beach"], padding="max_length", return_tensors="pt"
        )
        for encoder in (backbone.pipe.text_encoder_2, copy.deepcopy(backbone.pipe.text_encoder_2)):
            with torch.no_grad():
                close(encoder(inputs.input_ids, return_dict=False)[0], plain)
    finally:
        token.remove()


def test_training_tells_the_denoiser_what_the_stock_call_does(
    backbone: StableDiffusionXLBackbone, bear: Concept
) -> None:
    with bear.attach(backbone), conditions(backbone.pipe) as seen:
        pictures(backbone.pipe, BEAR, PLAIN, guidance_scale=1.0)
        encoding = backbone.encode([BEAR, PLAIN.replace("teddy bear", "<bear*>")], "<bear*>")
        backbone.predict(torch.zeros(2, *backbone.latent_shape()), torch.tensor([10, 900]), encoding)
    stock, training = seen[0], seen[-1]
    assert stock.keys() == training.keys() == {"text_embeds", "time_ids"}
    close(stock["text_embeds"], training["text_embeds"])
    assert torch.equal(stock["time_ids"], training["time_ids"].float())
    assert training["time_ids"].tolist() == [[64, 64, 0, 0, 64, 64]] * 2


def test_no_gradient_reaches_the_word_through_the_pooled_text(backbone: StableDiffusionXLBackbone) -> None:
    token = backbone.add_token("<cat*>", "cat")
    try:
        encoding = backbone.encode(["a <cat*>"], "<cat*>")
        assert encoding.context.requires_grad
        assert not encoding.extra["added_cond_kwargs"]["text_embeds"].requires_grad
    finally:
        token.remove()


# --- keys -----------------------------------------------------------------------------------------------------------


def test_global_locking_takes_the_keys_of_both_encoders_from_the_superclass(
    backbone: StableDiffusionXLBackbone, bear: Concept
) -> None:
    pipe = backbone.pipe
    prompt, plain = "<bear*>", encoded(pipe, "teddy bear")[0]
    read: list[Tensor] = []
    with bear.attach(backbone, key_lock="global"):
        site = next(site for site in backbone.edit_sites() if site.kind == "k")
        layer: Any = site.projection
        hook = layer.base_layer.register_forward_pre_hook(lambda module, args: read.append(args[0].detach()))
        pictures(pipe, prompt, guidance_scale=1.0)
        twice = pipe(prompt, num_images_per_prompt=2, num_inference_steps=1, output_type="pt").images
        hook.remove()
    assert len(twice) == 2 and torch.equal(read[-1][2], read[-1][3])
    # The word is one token, its superclass two: position 1 is "bear", and what follows is one further on.
    torch.testing.assert_close(read[0][0, :2], plain[0, [0, 2]])
    torch.testing.assert_close(read[0][0, 2:10], plain[0, 3:11])


@pytest.mark.parametrize(
    ("key_lock", "prompt", "calls"),
    [
        ("local", BEAR, (1, 2)),  # the second encoder pools the superclass
        ("global", BEAR, (2, 2)),  # which are the keys as well
        ("global", PLAIN, (1, 1)),
    ],
)
def test_no_text_is_read_twice(
    backbone: StableDiffusionXLBackbone, bear: Concept, key_lock: str, prompt: str, calls: tuple[int, int]
) -> None:
    counts = [0, 0]
    with bear.attach(backbone, key_lock=key_lock), pytest.MonkeyPatch.context() as patch:
        for k, encoder in enumerate(backbone.text_encoders().values()):

            def counted(*args: Any, k: int = k, forward: Any = encoder.forward, **more: Any) -> Any:
                counts[k] += 1
                return forward(*args, **more)

            patch.setattr(encoder, "forward", counted)
        pictures(backbone.pipe, prompt, guidance_scale=1.0)
    assert tuple(counts) == calls


def test_encoders_that_read_a_word_at_other_positions_are_refused(backbone: StableDiffusionXLBackbone) -> None:
    tokenizer = backbone.pipe.tokenizer_2
    prompt = "a photo of cat"
    original = backbone.pipe.maybe_convert_prompt

    def written_out(text: str, which: Any) -> str:
        return text.replace("photo", "photo photo") if which is tokenizer else original(text, which)

    other = StableDiffusionXLBackbone(backbone.pipe, backbone.config)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(backbone.pipe, "maybe_convert_prompt", written_out)
        with pytest.raises(TokenError, match="at other positions for one text encoder than for"):
            other.encode([prompt], "cat")


# --- latents --------------------------------------------------------------------------------------------------------


def test_an_autoencoder_that_overflows_in_half_precision_is_read_in_single(backbone: StableDiffusionXLBackbone) -> None:
    pixels = torch.rand(1, 3, 64, 64, generator=torch.Generator().manual_seed(0)) * 2 - 1
    single = tiny_sdxl()
    single.vae.encoder.conv_in.weight.data.mul_(2e5)
    half = tiny_sdxl()
    half.vae.encoder.conv_in.weight.data.mul_(2e5)
    half.to(torch.float16)
    expected = StableDiffusionXLBackbone.around(single, backbone.config).latents(pixels)
    before = {name: value.clone() for name, value in half.vae.state_dict().items()}
    with torch.no_grad():
        assert half.vae.encode(pixels.half()).latent_dist.mode().isnan().any(), "no overflow to be tested"
    found = StableDiffusionXLBackbone.around(half, backbone.config).latents(pixels)
    assert found.dtype == torch.float16
    torch.testing.assert_close(found.float(), expected, rtol=0.02, atol=0.02)
    after = half.vae.state_dict()
    assert all(value.dtype == torch.float16 and torch.equal(value, after[name]) for name, value in before.items())


def test_latents_are_shifted_where_the_autoencoder_says_so(backbone: StableDiffusionXLBackbone) -> None:
    pixels = torch.rand(1, 3, 64, 64, generator=torch.Generator().manual_seed(0)) * 2 - 1
    shifted = tiny_sdxl(vae={"latents_mean": [1.0, 2.0, 3.0, 4.0], "latents_std": [1.0, 2.0, 4.0, 8.0]})
    plain = backbone.latents(pixels) / backbone.pipe.vae.config.scaling_factor
    mean, std = (torch.tensor(v).view(1, 4, 1, 1) for v in ([1.0, 2.0, 3.0, 4.0], [1.0, 2.0, 4.0, 8.0]))
    found = StableDiffusionXLBackbone.around(shifted, backbone.config).latents(pixels)
    torch.testing.assert_close(found, (plain - mean) / std * backbone.pipe.vae.config.scaling_factor)


def test_a_schedule_for_latents_does_not_clip_them(tmp_path: Path) -> None:
    """DDIM clips by default, and the schedulers that SDXL is published with need not speak of it."""
    pipe = tiny_sdxl()
    config = {k: v for k, v in pipe.scheduler.config.items() if k not in ("clip_sample", "set_alpha_to_one")}
    pipe.scheduler = type(pipe.scheduler).from_config(config)
    pipe.save_pretrained(tmp_path / "pipeline")
    loaded = perfusion.load("sdxl", str(tmp_path / "pipeline"), device="cpu")
    assert loaded.scheduler.config.clip_sample is False and loaded.scheduler.config.set_alpha_to_one is False
    assert loaded.scheduler.config.steps_offset == 1 and loaded.watermark is None  # type: ignore[union-attr]
