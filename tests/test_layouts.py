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
# their V; width of what they read; pixels.
KNOWN: dict[str, tuple[int, tuple[int, ...], int, int, int, int, int]] = {
    "sd15": (859_520_964, (123_060_480,), 83_653_863, 16, 12_480, 768, 512),
    "sd21": (865_910_724, (340_387_840,), 83_653_863, 16, 12_480, 1024, 768),
    "sd21_base": (865_910_724, (340_387_840,), 83_653_863, 16, 12_480, 1024, 512),
    "sdxl": (2_567_463_684, (123_060_480, 694_659_840), 83_653_863, 70, 83_200, 2048, 1024),
}
BEYOND: dict[str, tuple[int, int, int, int, int, int]] = {
    "kolors": (2_579_458_820, 6_243_584_000, 83_653_863, 70, 83_200, 2048),
    "pixart": (610_856_096, 4_762_310_656, 83_653_863, 28, 32_256, 1152),
    "sana": (1_604_462_752, 2_614_341_888, 312_250_275, 20, 44_800, 2240),
}
PREDICTIONS = {"sd15": "epsilon", "sd21": "v_prediction", "sd21_base": "epsilon", "sdxl": "epsilon"}


def parameters(module: Any) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


@pytest.mark.parametrize("layout", list(KNOWN))
def test_layouts_have_their_known_sizes(layout: str) -> None:
    unet, encoders, vae, attentions, outputs, width, pixels = KNOWN[layout]
    backbone: Any = around(meta_pipeline(layout))
    pipe = backbone.pipe
    assert parameters(pipe.unet) == unet and parameters(pipe.vae) == vae
    assert tuple(parameters(encoder) for encoder in backbone.text_encoders().values()) == encoders
    parts = (pipe.unet, pipe.vae, *backbone.text_encoders().values())
    assert all(p.is_meta for part in parts for p in part.parameters())
    sites = backbone.edit_sites()
    assert [site.kind for site in sites] == ["k", "v"] * attentions
    assert len({site.name for site in sites}) == 2 * attentions
    assert sum(site.projection.out_features for site in sites if site.kind == "v") == outputs
    assert {site.projection.in_features for site in sites} == {width}
    assert "mid_block.attentions.0.transformer_blocks.0.attn2.to_v" in {site.name for site in sites}
    assert sum(encoder.config.hidden_size for encoder in backbone.text_encoders().values()) == width
    assert backbone.config.resolution == pixels and backbone.latent_shape() == (4, pixels // 8, pixels // 8)
    assert (backbone.train_timesteps, backbone.device.type) == (1000, "meta")
    assert (backbone.family, backbone.prediction) == (
        "sdxl" if layout == "sdxl" else "stable_diffusion",
        PREDICTIONS[layout],
    )


@pytest.mark.parametrize("layout", list(BEYOND))
def test_so_have_those_beyond_stable_diffusion(layout: str) -> None:
    denoiser, encoder, vae, attentions, outputs, width = BEYOND[layout]
    backbone: Any = around(meta_pipeline(layout))
    pipe = backbone.pipe
    found = (parameters(backbone.denoiser), parameters(pipe.text_encoder), parameters(pipe.vae))
    assert found == (denoiser, encoder, vae) and next(pipe.text_encoder.parameters()).is_meta
    sites = backbone.edit_sites()
    assert [site.kind for site in sites] == ["k", "v"] * attentions
    assert sum(site.projection.out_features for site in sites if site.kind == "v") == outputs
    assert {site.projection.in_features for site in sites} == {width}
    assert (backbone.family, backbone.config.resolution, backbone.denoiser.config.sample_size) in [
        (layout, 1024, 1024 // pipe.vae_scale_factor)
    ]


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
    assert available_layouts() == sorted({**KNOWN, **BEYOND})
    with pytest.raises(
        BackboneError, match=r"no layout 'sd14'; there are: kolors, pixart, sana, sd15, sd21, .*, or a diffusers"
    ):
        layout_config("sd14", "unet")
