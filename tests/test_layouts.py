"""The public layouts on the meta device: the numbers that are known of the models."""

import shutil
from pathlib import Path
from typing import Any

import pytest

from perfusion.backbones import around
from perfusion.backbones.base import BackboneError
from perfusion.backbones.layouts import (
    available_layouts,
    layout_config,
    layout_folder,
    meta_pipeline,
)

# Of each layout: parameters of the denoiser, of the text encoders and of the autoencoder; cross-attentions; outputs of
# their V; width of what they read; pixels; family; what the denoiser predicts.
VAE = 83_653_863
KNOWN: dict[str, tuple[int, tuple[int, ...], int, int, int, int, int, str, str]] = {
    "sd15": (859_520_964, (123_060_480,), VAE, 16, 12_480, 768, 512, "stable_diffusion", "epsilon"),
    "sd21": (865_910_724, (340_387_840,), VAE, 16, 12_480, 1024, 768, "stable_diffusion", "v_prediction"),
    "sd21_base": (865_910_724, (340_387_840,), VAE, 16, 12_480, 1024, 512, "stable_diffusion", "epsilon"),
    "sdxl": (2_567_463_684, (123_060_480, 694_659_840), VAE, 70, 83_200, 2048, 1024, "sdxl", "epsilon"),
    "kolors": (2_579_458_820, (6_243_584_000,), VAE, 70, 83_200, 2048, 1024, "kolors", "epsilon"),
    "pixart": (610_856_096, (4_762_310_656,), VAE, 28, 32_256, 1152, 1024, "pixart", "epsilon"),
    "sana": (1_604_462_752, (2_614_341_888,), 312_250_275, 20, 44_800, 2240, 1024, "sana", "flow_prediction"),
}


def parameters(module: Any) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


@pytest.mark.parametrize("layout", list(KNOWN))
def test_layouts_have_their_known_sizes(layout: str) -> None:
    denoiser, texts, vae, attentions, outputs, width, pixels, family, prediction = KNOWN[layout]
    backbone: Any = around(meta_pipeline(layout))
    encoders = [*backbone.text_encoders().values()]
    parts = (backbone.denoiser, backbone.pipe.vae, *encoders)
    assert tuple(map(parameters, parts)) == (denoiser, vae, *texts)
    assert all(p.is_meta for part in parts for p in part.parameters()) and backbone.device.type == "meta"
    sites = backbone.edit_sites()
    assert [site.kind for site in sites] == ["k", "v"] * attentions
    assert len({site.name for site in sites}) == 2 * attentions
    assert sum(site.projection.out_features for site in sites if site.kind == "v") == outputs
    assert {site.projection.in_features for site in sites} == {width}
    side = pixels // backbone.pipe.vae_scale_factor
    assert backbone.denoiser.config.sample_size == side and backbone.config.resolution == pixels
    assert backbone.latent_shape() == (backbone.denoiser.config.in_channels, side, side)
    assert (backbone.family, backbone.prediction) == (family, prediction)
    assert backbone.train_timesteps == (1100 if layout == "kolors" else 1000)
    if layout.startswith("sd"):  # whose K and V read the encodings themselves
        assert "mid_block.attentions.0.transformer_blocks.0.attn2.to_v" in {site.name for site in sites}
        assert sum(encoder.config.hidden_size for encoder in encoders) == width


def test_a_folder_of_configs_is_a_layout(tmp_path: Path) -> None:
    folder = tmp_path / "own"
    shutil.copytree(layout_folder("sd15"), folder)
    unet = folder / "unet" / "config.json"
    unet.write_text(unet.read_text().replace('"cross_attention_dim": 768', '"cross_attention_dim": 640'))
    assert layout_config(str(folder), "unet")["cross_attention_dim"] == 640
    index = folder / "model_index.json"
    index.write_text(index.read_text().replace('["diffusers", "AutoencoderKL"]', '["os", "system"]'))
    with pytest.raises(BackboneError, match=r"found vae of os.system, expected a class of diffusers, transformers"):
        meta_pipeline(str(folder))


def test_a_layout_that_is_not_known_is_refused() -> None:
    assert available_layouts() == sorted(KNOWN)
    with pytest.raises(
        BackboneError, match=r"no layout 'sd14'; there are: kolors, pixart, sana, sd15, sd21, .*, or a diffusers"
    ):
        layout_config("sd14", "unet")
