"""The public layout of SD 1.5 on the meta device: the numbers that are known of it."""

import time

import pytest

from perfusion.backbones import around
from perfusion.backbones.base import BackboneError
from perfusion.backbones.layouts import available_layouts, layout_config, meta_denoiser, meta_pipeline
from perfusion.backbones.stable_diffusion import edit_sites_of


def test_sd15_has_its_known_sizes() -> None:
    started = time.process_time()
    unet = meta_denoiser("sd15")
    assert time.process_time() - started < 2
    assert sum(p.numel() for p in unet.parameters()) == 859_520_964
    assert all(p.is_meta and not p.requires_grad for p in unet.parameters())
    pipe = meta_pipeline("sd15")
    assert sum(p.numel() for p in pipe.text_encoder.parameters()) == 123_060_480
    assert sum(p.numel() for p in pipe.vae.parameters()) == 83_653_863
    assert all(p.is_meta for part in (pipe.unet, pipe.vae, pipe.text_encoder) for p in part.parameters())


def test_sd15_has_its_known_edit_sites() -> None:
    sites = edit_sites_of(meta_denoiser("sd15"))
    assert len(sites) == 32 and len({site.name for site in sites}) == 32
    assert [site.kind for site in sites] == ["k", "v"] * 16
    assert sum(site.projection.out_features for site in sites if site.kind == "v") == 12_480  # type: ignore[arg-type]
    assert {site.projection.in_features for site in sites} == {768}
    assert "mid_block.attentions.0.transformer_blocks.0.attn2.to_v" in {site.name for site in sites}


def test_a_backbone_around_a_layout_can_be_measured() -> None:
    backbone = around(meta_pipeline("sd15"))
    assert (backbone.family, backbone.config.resolution, backbone.latent_shape()) == (
        "stable_diffusion",
        512,
        (4, 64, 64),
    )
    assert backbone.train_timesteps == 1000 and backbone.device.type == "meta"
    assert len(backbone.edit_sites()) == 32


def test_a_layout_that_is_not_known_is_refused() -> None:
    assert available_layouts() == ["sd15"]
    with pytest.raises(BackboneError, match="no layout 'sd14'; there are: sd15"):
        layout_config("sd14", "unet")
