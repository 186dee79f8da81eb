"""How backbones are loaded and found again, what cannot be loaded, and what is Stable Diffusion's or Toyland's own."""

import dataclasses
import functools
import json
import os
import shutil
import subprocess
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import (
    DDIMScheduler,
    EulerDiscreteScheduler,
    StableDiffusionInstructPix2PixPipeline,
    StableDiffusionPipeline,
)
from peft import LoraConfig
from safetensors.torch import load_file, save_file

import perfusion
from perfusion import backbones, hub
from perfusion.backbones import loading, toyland
from perfusion.backbones.base import Backbone, BackboneError, TokenError
from perfusion.backbones.stable_diffusion import StableDiffusionBackbone
from perfusion.backbones.toyland import ToylandBackbone, toyland_captions
from perfusion.config import BackboneConfig, ConfigError, CovarianceConfig
from perfusion.covariance.moment import CovarianceError
from perfusion.generate import GenerateConfig
from tests.backbone_kinds import KINDS, added, config_of, stock
from tests.hub import put_in_hub_cache
from tests.pipelines import Compiled, tiny_pipeline, tiny_pipeline_folder, tiny_sdxl, toyland_folder

CONF = Path(__file__).resolve().parents[1] / "conf" / "backbone"


@pytest.mark.parametrize("kind", ["sd15", "sd21", "sdxl"])
def test_half_precision_loads_with_the_same_fingerprint(kind: str, tmp_path: Path) -> None:
    name, build = KINDS[kind]
    folder = build(tmp_path)
    loaded = {
        dtype: backbones.backbone_class(name).load(config_of(name, folder, tmp_path, dtype=str(dtype).split(".")[1]))
        for dtype in (torch.float32, torch.float16, torch.bfloat16)
    }
    assert loaded[torch.float16].fingerprint() == loaded[torch.float32].fingerprint()
    assert loaded[torch.bfloat16].fingerprint() == loaded[torch.float32].fingerprint(torch.bfloat16)
    assert loaded[torch.bfloat16].fingerprint() != loaded[torch.float32].fingerprint()
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
    assert tiny.scheduler is scheduler and all(p.requires_grad for p in tiny.unet.parameters())
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


def test_captions_from_adapted_encoders_are_not_cached(tmp_path: Path) -> None:
    pipe = tiny_pipeline()
    covariance = CovarianceConfig(count=30, cache=str(tmp_path / "cache"))
    config = BackboneConfig(name="stable_diffusion", resolution=64, covariance=covariance)
    plain = backbones.around(pipe, config).second_moment(progress=False)
    files = sorted((tmp_path / "cache").iterdir())
    pipe.text_encoder.add_adapter(LoraConfig(r=2, target_modules=["q_proj", "v_proj"], init_lora_weights=False))
    adapted = backbones.around(pipe, config).second_moment(progress=False)
    assert not torch.equal(adapted, plain) and sorted((tmp_path / "cache").iterdir()) == files


def test_a_hub_that_does_not_answer_is_asked_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where a network swallows what is sent, libraries ask for every file anew and wait for minutes."""
    asked: list[float] = []

    class Silent:
        def head(self, address: str, timeout: float) -> None:
            asked.append(timeout)
            raise TimeoutError

    monkeypatch.setattr(hub.constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(hub, "get_session", Silent)
    hub.offline.cache_clear()
    try:
        assert loading.Source("owner/name", local=False).local_files_only
        assert loading.Source("owner/other", local=False).local_files_only and asked == [hub.SECONDS]
        assert loading.Source("folder", local=True).local_files_only
    finally:
        hub.offline.cache_clear()


def test_a_hub_id_is_loaded_from_the_hubs_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tiny_pipeline_folder(tmp_path)
    put_in_hub_cache("owner/tiny", folder, tmp_path / "hub", monkeypatch)
    config = config_of("stable_diffusion", Path("owner/tiny"), tmp_path)
    backbones.backbone_class(config.name).check_words(config, "<cat*>", "cat")
    with pytest.raises(TokenError, match="'cat' is already a word of the tokenizer's vocabulary"):
        backbones.backbone_class(config.name).check_words(config, "cat", "cat")
    np.save(tmp_path / "C.npy", np.eye(33))
    matrix = dataclasses.replace(config.covariance, matrix=str(tmp_path / "C.npy"))
    with pytest.raises(CovarianceError, match="found width 33, expected 32"):  # from the UNet's config alone
        backbones.backbone_class(config.name).check_covariance(dataclasses.replace(config, covariance=matrix))
    backbone = StableDiffusionBackbone.load(config)
    expected = StableDiffusionBackbone.load(dataclasses.replace(config, path=str(folder)))
    assert backbone.fingerprint() == expected.fingerprint()
    assert type(perfusion.load("sd15", "owner/tiny", device="cpu")) is StableDiffusionPipeline


def with_weights(part: str, change: Callable[[dict[str, torch.Tensor]], object]) -> Callable[[Path], None]:
    def damage(folder: Path) -> None:
        (file,) = (folder / part).glob("*.safetensors")
        tensors = load_file(file)
        change(tensors)
        save_file(tensors, file, {"format": "pt"})

    return damage


def one_less(tensors: dict[str, torch.Tensor]) -> None:
    del tensors[sorted(tensors)[3]]


def one_nan(tensors: dict[str, torch.Tensor]) -> None:
    tensors[sorted(tensors)[0]].flatten()[0] = float("nan")


def with_values(file: str, **values: Any) -> Callable[[Path], None]:
    def damage(folder: Path) -> None:
        path = folder / file
        path.write_text(json.dumps({**json.loads(path.read_text()), **values}))

    return damage


def for_inpainting(folder: Path) -> None:
    wider = lambda tensors: tensors.update({"conv_in.weight": torch.zeros(8, 9, 3, 3)})  # noqa: E731
    with_weights("unet", wider)(folder)
    with_values("unet/config.json", in_channels=9)(folder)


UNET = "unet/diffusion_pytorch_model.safetensors"


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (with_weights("unet", one_less), "the weights of its unet are not whole: they lack "),
        (with_weights("vae", one_less), "the weights of its vae are not whole: they lack "),
        (with_weights("text_encoder", one_less), "the weights of its text_encoder are not whole: they lack "),
        (with_weights("unet", one_nan), "the weights of its unet hold NaN or infinity, first in "),
        (with_weights("text_encoder", one_nan), "the weights of its text_encoder hold NaN or infinity, first in "),
        (lambda folder: (folder / "tokenizer" / "tokenizer.json").write_text("{}"), "cannot load .*pipeline: "),
        (with_values("model_index.json", unet=None), "cannot load .*pipeline: "),
        (lambda folder: (folder / "model_index.json").write_text("[]"), r"cannot read .*model_index\.json"),
        (
            with_values("scheduler/scheduler_config.json", num_train_timesteps=0),
            "cannot load .*pipeline: ",
        ),
        (for_inpainting, "found a denoiser of 9 channels, expected the 4 of the latents: a model for inpainting"),
        (lambda folder: (folder / "model_index.json").unlink(), "is not a diffusers pipeline: it holds no model_index"),
        (with_values("model_index.json", _class_name="StableDiffusionXLPipeline"), "holds a StableDiffusionXLPip"),
        (lambda folder: (folder / "model_index.json").write_text("{"), r"cannot read .*model_index\.json"),
        (lambda folder: os.truncate(folder / UNET, (folder / UNET).stat().st_size - 100), "cannot load .*pipeline: "),
        (lambda folder: (folder / UNET).rename((folder / UNET).with_suffix(".bin")), "cannot load .*pipeline: "),
        (lambda folder: shutil.rmtree(folder / "tokenizer"), "cannot load .*pipeline: "),
    ],
)
def test_folders_that_cannot_be_loaded_are_refused(damage: Callable, message: str, tmp_path: Path) -> None:
    folder = tiny_pipeline_folder(tmp_path)
    damage(folder)
    with pytest.raises(BackboneError, match=message):
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


@pytest.mark.parametrize(("named", "resolution"), [(None, 64), ("sd15", 512)])
def test_a_concept_that_names_a_family_alone_is_drawn_in_the_size_of_the_weights(
    tmp_path: Path, named: str | None, resolution: int
) -> None:
    """SD 1.x and SD 2.x are one family, of other sizes; a preset that is named says its own."""
    options = GenerateConfig(backbone=named, path=str(tiny_pipeline_folder(tmp_path)), device="cpu")
    backbone = backbones.load_backbone(options, default="stable_diffusion")
    assert backbone.config.resolution == resolution
    assert backbone.latent_shape()[1:] == (resolution // 8, resolution // 8)


def test_a_size_may_be_height_and_width() -> None:
    pipe = tiny_pipeline()
    pipe.unet.register_to_config(sample_size=(8, 12))
    assert backbones.resolution_of(pipe) == 64


@pytest.mark.parametrize("compiled_by", [Compiled, functools.partial(torch.compile, backend="eager")])
def test_a_pipeline_whose_parts_are_compiled_finds_its_backbone(compiled_by: Callable[[Any], Any]) -> None:
    pipe = tiny_pipeline()
    plain = backbones.around(pipe)
    names, fingerprint = [site.name for site in plain.edit_sites()], plain.fingerprint()
    pipe.unet, pipe.text_encoder = compiled_by(pipe.unet), Compiled(pipe.text_encoder)
    for compiled in (backbones.around(pipe), StableDiffusionBackbone(pipe, plain.config)):
        assert (compiled.family, compiled.config) == (plain.family, plain.config)
        assert [site.name for site in compiled.edit_sites()] == names and compiled.fingerprint() == fingerprint


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
    config = backbones.backbone_config(preset)
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
    words = {word for caption in captions for word in caption.replace("-", " - ").split()}
    assert words <= set(toyland.vocabulary()) and {"cat", "beach", "sketch", "hat"} <= words


def test_the_public_face_is_lazy() -> None:
    assert perfusion.load is backbones.load and "Concept" in dir(perfusion)
    with pytest.raises(AttributeError, match="no attribute 'lode'"):
        perfusion.lode  # noqa: B018
    with warnings.catch_warnings():
        warnings.simplefilter("error")

        code = "import sys, perfusion; sys.exit('torch' in sys.modules or 'diffusers' in sys.modules)"
        assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_toyland_runs_in_one_thread_unless_told_otherwise(monkeypatch: pytest.MonkeyPatch) -> None:
    set_to: list[int] = []
    monkeypatch.setattr(torch, "set_num_threads", set_to.append)
    monkeypatch.setenv("OMP_NUM_THREADS", "2")
    perfusion.load("toyland", device="cpu")
    assert not set_to
    monkeypatch.delenv("OMP_NUM_THREADS")
    perfusion.load("toyland", device="cpu")
    assert set_to == [1]
