"""The backbone seam, held by every backbone; then what is Stable Diffusion's or Toyland's own, and loading."""

import dataclasses
import json
import shutil
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import (
    DDIMScheduler,
    DiffusionPipeline,
    EulerDiscreteScheduler,
    StableDiffusionInstructPix2PixPipeline,
    StableDiffusionPipeline,
)
from omegaconf import OmegaConf
from peft import LoraConfig
from torch import Tensor

import perfusion
from perfusion import backbones, presets
from perfusion.backbones import toyland
from perfusion.backbones.base import AddedToken, Backbone, BackboneError, Encoding, TokenError
from perfusion.backbones.latent_diffusion import LatentDiffusionBackbone
from perfusion.backbones.stable_diffusion import StableDiffusionBackbone
from perfusion.backbones.toyland import ToylandBackbone, toyland_captions
from perfusion.config import BackboneConfig, ConfigError, CovarianceConfig, checked
from tests.pipelines import sd21_folder, sdxl_folder, tiny_pipeline, tiny_pipeline_folder, tiny_sdxl, toyland_folder

CONF = Path(__file__).resolve().parents[1] / "conf" / "backbone"
# kind -> name of its backbone, builder of a folder with a small pipeline of the kind
KINDS: dict[str, tuple[str, Callable[[Path], Path]]] = {
    "sd15": ("stable_diffusion", tiny_pipeline_folder),
    "sd21": ("stable_diffusion", sd21_folder),
    "sdxl": ("sdxl", sdxl_folder),
    "toyland": ("toyland", toyland_folder),
}
PROMPTS = ["a photo of a {} on the beach", "{}", "a {} and a red {}, in the snow"]


def config_of(name: str, folder: Path, cache: Path, **values: Any) -> BackboneConfig:
    """The defaults of a backbone, for a small pipeline and few captions."""
    config = backbones.default_config(name)
    covariance = dataclasses.replace(config.covariance, count=40, cache=str(cache))
    values = {"path": str(folder), "resolution": 64, "device": "cpu", "covariance": covariance} | values
    return dataclasses.replace(config, **values)


@pytest.fixture(scope="module", params=list(KINDS))
def backbone(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Backbone:
    home = tmp_path_factory.mktemp(request.param)
    name, folder = KINDS[request.param]
    loaded = backbones.backbone_class(name).load(config_of(name, folder(home), home / "cache"))
    loaded.pipe.set_progress_bar_config(disable=True)
    return loaded


def filled(word: str) -> list[str]:
    return [prompt.replace("{}", word) for prompt in PROMPTS]


@contextmanager
def added(backbone: Backbone, vectors: int = 1) -> Iterator[AddedToken]:
    """`<cat*>` in the backbone, and out of it again whatever happens."""
    token = backbone.add_token("<cat*>", "cat", vectors)
    try:
        yield token
    finally:
        token.remove()


def stock(backbone: Backbone, prompts: list[str]) -> Tensor:
    """What the stock pipeline encodes."""
    pipe: Any = backbone.pipe
    with torch.no_grad():
        return pipe.encode_prompt(
            prompts, device=backbone.device, num_images_per_prompt=1, do_classifier_free_guidance=False
        )[0]


def words_of(backbone: Backbone) -> list[Any]:
    """What a new word is put into: the tokenizers, and the tables of the text encoders."""
    tokenizers = [part for name, part in backbone.pipe.components.items() if name.startswith("tokenizer")]
    return [*tokenizers, *(encoder.get_input_embeddings() for encoder in backbone.text_encoders().values())]


# --- the seam -------------------------------------------------------------------------------------------------------


def test_a_loaded_backbone_is_frozen(backbone: Backbone) -> None:
    assert backbone.family and isinstance(backbone.pipe.scheduler, DDIMScheduler)
    assert (backbone.device, backbone.dtype) == (torch.device("cpu"), torch.float32)
    encoders = backbone.text_encoders()
    assert encoders == {n: part for n, part in backbone.pipe.components.items() if n.startswith("text_encoder")}
    for module in (backbone.pipe.unet, backbone.pipe.vae, *encoders.values()):
        assert not module.training and not any(p.requires_grad for p in module.parameters())


def test_edit_sites_are_the_cross_attention_projections(backbone: Backbone) -> None:
    sites = backbone.edit_sites()
    modules = dict(backbone.denoiser.named_modules())
    assert [s.kind for s in sites] == ["k", "v"] * (len(sites) // 2) and sites
    assert all(s.projection is modules[s.name] and s.parent is modules[s.name.rpartition(".")[0]] for s in sites)
    assert all("attn2" in s.name and s.name.endswith(s.attribute) for s in sites)
    width = backbone.encode(["a cat"], "cat").context.shape[-1]
    assert all(s.projection.weight.shape[1] == width and s.projection.bias is None for s in sites)
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
    for word, last in (("cat", "cat</w>"), ("teddy bear", tokenizer.tokenize("bear")[-1])):
        encoding = backbone.encode(filled(word), word)
        ids = tokenizer(filled(word), padding="max_length").input_ids
        for row, marks in zip(ids, encoding.concept, strict=True):
            tokens = tokenizer.convert_ids_to_tokens(row)
            assert {tokens[i] for i in marks.nonzero().flatten().tolist()} == {last}
    # "bear" alone is no teddy bear
    assert backbone.encode(["a bear and a teddy bear"], "teddy bear").concept.sum() == 1


def test_prompts_without_the_word_or_too_long_are_refused(backbone: Backbone) -> None:
    limit = backbone.pipe.tokenizer.model_max_length
    with pytest.raises(TokenError, match="'a photo of a dog': expected the word 'cat' in it"):
        backbone.encode(["a cat", "a photo of a dog"], "cat")
    with pytest.raises(TokenError, match="expected the word 'teddy bear'"):
        backbone.encode(["a teddy"], "teddy bear")
    fits = " ".join(["dog"] * (limit - 3) + ["cat"])
    assert backbone.encode([fits], "cat").concept.nonzero().tolist() == [[0, limit - 2]]
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
            assert token.embeddings().keys() == token.encoders().keys() == backbone.text_encoders().keys()
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
    for check in (backbone.check_token, lambda *words: backbones.check_words(backbone.config, *words)):
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
    e = stock(backbone, captions).double().flatten(0, 1)
    C = e.T @ e / len(e)
    expected = C + settings.ridge * C.diagonal().mean() * torch.eye(len(C))
    result = backbone.second_moment(progress=False)
    torch.testing.assert_close(result.factor @ result.factor.T, expected, rtol=1e-6, atol=1e-6)
    assert result.count == 40 * backbone.pipe.tokenizer.model_max_length

    def no_encoding(*_: Any) -> None:
        raise AssertionError("the captions were encoded again")

    monkeypatch.setattr(backbone, "_encode_captions", no_encoding)
    with added(backbone):  # changes no caption: the cache holds
        assert torch.equal(backbone.second_moment(progress=False).factor, result.factor)
    monkeypatch.setattr(settings, "ridge", 0.5)  # applied after the cache
    assert not torch.equal(backbone.second_moment(progress=False).factor, result.factor)
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
        posterior = vae.encode(pixels).latent_dist
    torch.testing.assert_close(latents, posterior.mean * vae.config.scaling_factor)
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


def test_the_fingerprint_sees_weights_and_not_what_is_attached(backbone: Backbone) -> None:
    def fresh() -> dict[str, str]:
        return backbones.around(backbone.pipe, backbone.config).fingerprint()

    started = time.process_time()
    plain = fresh()
    assert time.process_time() - started < 1
    assert plain["family"] == backbone.family and plain == backbone.fingerprint()
    assert plain.keys() == {"family", "projections", *backbone.text_encoders()}
    assert all(len(value) == 16 for key, value in plain.items() if key != "family")
    lora = LoraConfig(r=2, target_modules=["to_k", "to_v", "to_q"], init_lora_weights=False)
    with added(backbone):
        backbone.pipe.unet.add_adapter(lora, "style")
        assert fresh() == plain
        backbone.pipe.unet.unload_lora()
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
    assert length < whole.context.shape[1] and short.concept.shape == (2, length)
    torch.testing.assert_close(short.context, whole.context[:, :length], rtol=1e-4, atol=1e-5)
    assert torch.equal(short.concept, whole.concept[:, :length]) and not whole.concept[:, length:].any()


# --- loading --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["sd15", "sd21", "sdxl"])
def test_half_precision_loads_with_the_same_fingerprint(kind: str, tmp_path: Path) -> None:
    name, build = KINDS[kind]
    folder = build(tmp_path)
    loaded = {
        dtype: backbones.backbone_class(name).load(config_of(name, folder, tmp_path, dtype=str(dtype).split(".")[1]))
        for dtype in (torch.float32, torch.float16, torch.bfloat16)
    }
    assert loaded[torch.float16].fingerprint() == loaded[torch.float32].fingerprint()
    pixels = torch.rand(1, 3, 64, 64, generator=torch.Generator().manual_seed(0)) * 2 - 1
    expected = loaded[torch.float32].latents(pixels)
    for dtype, backbone in loaded.items():
        parts = (backbone.pipe.unet, backbone.pipe.vae, *backbone.text_encoders().values())
        assert backbone.dtype == dtype and {p.dtype for part in parts for p in part.parameters()} == {dtype}
        latents = backbone.latents(pixels)
        assert latents.dtype == dtype
        torch.testing.assert_close(latents.float(), expected, rtol=0.05, atol=0.05)
        token = backbone.add_token("<cat*>", "cat")
        assert all(vectors.dtype == torch.float32 for vectors in token.embeddings().values())
        encoding = backbone.encode(["a <cat*>"], "<cat*>")
        assert encoding.context.dtype == dtype and encoding.context.requires_grad
        predicted = backbone.predict(latents, torch.tensor([500]), encoding)
        assert predicted.dtype == dtype and predicted.isfinite().all()


def test_load_gives_a_stock_pipeline_that_is_known_again(tmp_path: Path) -> None:
    folder = toyland_folder(tmp_path)
    pipe = perfusion.load("toyland", path=str(folder), device="cpu")
    assert type(pipe) is StableDiffusionPipeline
    again = backbones.around(pipe)
    assert isinstance(again, ToylandBackbone) and again.pipe is pipe and again.config.path == str(folder)


def test_a_pipeline_of_the_user_finds_its_backbone(tmp_path: Path) -> None:
    own = StableDiffusionPipeline.from_pretrained(toyland_folder(tmp_path))
    toy = backbones.around(own)
    assert isinstance(toy, ToylandBackbone) and toy.config == ToylandBackbone.defaults()
    tiny = tiny_pipeline()
    tiny.scheduler = EulerDiscreteScheduler.from_config(tiny.scheduler.config)
    tiny.unet.requires_grad_(True)
    scheduler = tiny.scheduler
    backbone = backbones.around(tiny)
    assert type(backbone) is StableDiffusionBackbone and backbone.config.resolution == 64
    assert tiny.scheduler is scheduler and not any(p.requires_grad for p in tiny.unet.parameters())
    latents, noise = torch.ones(1, 4, 8, 8), torch.zeros(1, 4, 8, 8)
    schedule = DDIMScheduler.from_config(tiny.scheduler.config)  # Euler's own add_noise means something else
    expected = schedule.alphas_cumprod[500].sqrt() * latents
    torch.testing.assert_close(backbone.add_noise(latents, noise, torch.tensor([500])), expected)


def test_velocity_is_the_target_of_v_prediction() -> None:
    config = BackboneConfig(name="stable_diffusion", resolution=64)
    backbone = backbones.around(tiny_pipeline(scheduler={"prediction_type": "v_prediction"}), config)
    latents, noise, steps = torch.ones(1, 4, 8, 8), torch.full((1, 4, 8, 8), 2.0), torch.tensor([300])
    share = backbone.pipe.scheduler.alphas_cumprod[300]
    expected = share.sqrt() * noise - (1 - share).sqrt() * latents  # arXiv 2202.00512
    torch.testing.assert_close(backbone.target(latents, noise, steps), expected)
    with pytest.raises(BackboneError, match="prediction_type 'sample', expected 'epsilon' or 'v_prediction'"):
        backbones.around(tiny_pipeline(scheduler={"prediction_type": "sample"}), config)


def test_an_own_textual_inversion_is_encoded_as_in_the_stock_pipeline() -> None:
    pipe = tiny_pipeline()
    pipe.load_textual_inversion(torch.randn(2, 32), token="<style>")
    backbone = backbones.around(pipe)
    prompt = "a photo of <cat*>, <style>"
    with added(backbone, vectors=2):
        assert torch.equal(backbone.encode([prompt], "<cat*>").context.detach(), stock(backbone, [prompt]))
        assert "<style>_1" in pipe.tokenizer.get_vocab()


def test_fused_projections_are_refused() -> None:
    backbone = backbones.around(tiny_pipeline())
    backbone.pipe.unet.fuse_qkv_projections()
    with pytest.raises(BackboneError, match=r"attn2: its K and V projections are fused.*unfuse_qkv_projections"):
        backbone.edit_sites()


def test_compiled_parts_are_the_same_backbone() -> None:
    class Compiled(torch.nn.Module):
        """In the shape of torch.compile's wrapper, whose import takes seconds."""

        def __init__(self, module: torch.nn.Module) -> None:
            super().__init__()
            self._orig_mod = module

    backbone = backbones.around(tiny_pipeline())
    names, fingerprint = [site.name for site in backbone.edit_sites()], backbone.fingerprint()
    backbone.pipe.unet, backbone.pipe.text_encoder = Compiled(backbone.pipe.unet), Compiled(backbone.pipe.text_encoder)
    again = StableDiffusionBackbone(backbone.pipe, backbone.config)
    assert [site.name for site in again.edit_sites()] == names and again.fingerprint() == fingerprint


def test_captions_from_adapted_encoders_are_not_cached(tmp_path: Path) -> None:
    pipe = tiny_pipeline()
    covariance = CovarianceConfig(count=30, cache=str(tmp_path / "cache"))
    config = BackboneConfig(name="stable_diffusion", resolution=64, covariance=covariance)
    plain = backbones.around(pipe, config).second_moment(progress=False)
    files = sorted((tmp_path / "cache").iterdir())
    pipe.text_encoder.add_adapter(LoraConfig(r=2, target_modules=["q_proj", "v_proj"], init_lora_weights=False))
    adapted = backbones.around(pipe, config).second_moment(progress=False)
    assert not torch.equal(adapted.factor, plain.factor) and sorted((tmp_path / "cache").iterdir()) == files


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"path": None}, r"backbone.path: stable_diffusion ships no weights; give backbone.path=<folder, .*> of a"),
        ({"path": "/no/such/folder"}, "backbone.path: no folder /no/such/folder"),
        ({"path": "nobody/nothing"}, "nobody/nothing is no folder here, and the hub did not give it"),
        ({"dtype": "float8"}, "backbone.dtype: found 'float8', expected one of float32, float16, bfloat16"),
        ({"device": "gpu"}, "backbone.device: found 'gpu', expected auto, cuda"),
        ({"resolution": 100}, "backbone.resolution: found 100, expected a multiple of 8 pixels"),
    ],
)
def test_configs_that_cannot_be_loaded_are_refused(values: dict[str, Any], message: str, tmp_path: Path) -> None:
    config = config_of("stable_diffusion", tiny_pipeline_folder(tmp_path), tmp_path, **values)
    with pytest.raises(BackboneError, match=message):
        StableDiffusionBackbone.load(config)
    if "path" in values:
        with pytest.raises(BackboneError, match=message):
            backbones.check_words(config, "<cat*>", "cat")


def no_index(folder: Path) -> None:
    (folder / "model_index.json").unlink()


def other_class(folder: Path) -> None:
    index = folder / "model_index.json"
    index.write_text(json.dumps({**json.loads(index.read_text()), "_class_name": "StableDiffusionXLPipeline"}))


def spoilt_index(folder: Path) -> None:
    (folder / "model_index.json").write_text("{")


def truncated(folder: Path) -> None:
    weights = folder / "unet" / "diffusion_pytorch_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])


def pickled(folder: Path) -> None:
    weights = folder / "unet" / "diffusion_pytorch_model.safetensors"
    weights.rename(weights.with_suffix(".bin"))


def no_tokenizer(folder: Path) -> None:
    shutil.rmtree(folder / "tokenizer")


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (no_index, "is not a diffusers pipeline: it holds no model_index.json"),
        (other_class, "holds a StableDiffusionXLPipeline, expected a StableDiffusionPipeline"),
        (spoilt_index, r"cannot read .*model_index\.json"),
        (truncated, "cannot load .*pipeline: "),
        (pickled, "cannot load .*pipeline: "),
        (no_tokenizer, "cannot load .*pipeline: "),
    ],
)
def test_folders_that_cannot_be_loaded_are_refused(damage: Callable, message: str, tmp_path: Path) -> None:
    folder = tiny_pipeline_folder(tmp_path)
    damage(folder)
    with pytest.raises(BackboneError, match=f"^backbone.path: .*{message}"):
        StableDiffusionBackbone.load(config_of("stable_diffusion", folder, tmp_path))


def test_other_pipelines_are_refused() -> None:
    other = StableDiffusionInstructPix2PixPipeline(**tiny_pipeline().components, requires_safety_checker=False)
    with pytest.raises(BackboneError, match="no backbone fits a StableDiffusionInstructPix2PixPipeline"):
        backbones.around(other)
    with pytest.raises(BackboneError, match=r"expected a StableDiffusionPipeline; .*\*\*pipe.components"):
        backbones.around(other, BackboneConfig(name="stable_diffusion"))
    pipe = tiny_pipeline()
    pipe.text_encoder = None
    with pytest.raises(BackboneError, match="found a pipeline without a text_encoder, expected one with all"):
        backbones.around(pipe)
    xl = tiny_sdxl()
    with pytest.raises(BackboneError, match="found a StableDiffusionXLPipeline, expected a StableDiffusionPipeline"):
        backbones.around(xl, BackboneConfig(name="stable_diffusion"))
    with pytest.raises(BackboneError, match="found a StableDiffusionPipeline, expected a StableDiffusionXLPipeline"):
        backbones.around(tiny_pipeline(), BackboneConfig(name="sdxl"))
    xl.text_encoder_2 = None
    with pytest.raises(BackboneError, match="found a pipeline without a text_encoder_2"):
        backbones.around(xl)


# --- the registry and the presets -----------------------------------------------------------------------------------


def test_the_registry_knows_every_backbone_and_no_other() -> None:
    assert {name for name, _ in KINDS.values()} == set(backbones.available())
    for name in backbones.available():
        assert issubclass(backbones.backbone_class(name), Backbone)
        assert backbones.default_config(name).name == name
    for name in ("sd15", "base", "tokens", "latent_diffusion", "single_file"):
        with pytest.raises(ConfigError, match=rf"backbone.name: no backbone '{name}'; there are: .*toyland"):
            backbones.backbone_class(name)


@pytest.mark.parametrize(
    ("preset", "values"), [("sd15", {}), ("sd21", {"resolution": 768}), ("sdxl", {}), ("toyland", {})]
)
def test_the_presets_are_the_defaults(preset: str, values: dict[str, Any]) -> None:
    config = checked(BackboneConfig, OmegaConf.load(CONF / f"{preset}.yaml"), "backbone")
    assert config == dataclasses.replace(backbones.default_config(config.name), **values)


# --- Toyland --------------------------------------------------------------------------------------------------------


def test_toyland_says_how_to_build_its_weights(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(toyland, "WEIGHTS", tmp_path / "weights")
    with pytest.raises(BackboneError, match=r"Toyland's weights are not in .*weights; run `make toyland`"):
        perfusion.load()
    shutil.copytree(toyland_folder(tmp_path), tmp_path / "weights")
    assert isinstance(backbones.around(perfusion.load(device="cpu")), ToylandBackbone)


def test_toyland_captions_are_of_its_world() -> None:
    captions = list(toyland_captions(200))
    assert captions[:20] == list(toyland_captions(20)) and len(set(captions)) > 180
    words = {word for caption in captions for word in caption.split()}
    assert words <= set(toyland.vocabulary()) and {"cat", "beach", "sketch", "hat"} <= words


def test_the_public_face_is_lazy() -> None:
    assert perfusion.load is presets.load and "Concept" in dir(perfusion)
    with pytest.raises(AttributeError, match="no attribute 'lode'"):
        perfusion.lode  # noqa: B018
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        import subprocess
        import sys

        code = "import sys, perfusion; sys.exit('torch' in sys.modules or 'diffusers' in sys.modules)"
        assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
