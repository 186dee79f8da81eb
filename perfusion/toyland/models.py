"""The architectures of the Toyland pipeline: stock diffusers and transformers classes, small sizes."""

from __future__ import annotations

from typing import Any

from diffusers import AutoencoderKL, DDIMScheduler, UNet2DConditionModel
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

from perfusion.toyland.captions import vocabulary
from perfusion.toyland.tokenizer import build_tokenizer

IMAGE_SIZE = 64
LATENT_CHANNELS = 16
LATENT_SIZE = 8
TEXT_POSITIONS = 24
TEXT_WIDTH = 128


def autoencoder() -> AutoencoderKL:
    """64x64x3 to 8x8x16 and back. Few channels at full resolution: that is where a CPU spends its time."""
    settings: dict[str, Any] = {
        "block_out_channels": (16, 32, 64, 64),
        "down_block_types": ("DownEncoderBlock2D",) * 4,
        "up_block_types": ("UpDecoderBlock2D",) * 4,
        "latent_channels": LATENT_CHANNELS,
        "norm_num_groups": 8,
        "layers_per_block": 1,
        "mid_block_add_attention": False,
        "sample_size": IMAGE_SIZE,
    }
    return AutoencoderKL(**settings)


def text_encoder(tokenizer: CLIPTokenizer) -> CLIPTextModel:
    """A CLIP text tower of three layers, 128 wide, over 24 positions.

    Of two layers with two heads each, it learns far more slowly to carry a toy's looks to its noun.
    """
    special: dict[str, Any] = {
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
    }
    return CLIPTextModel(
        CLIPTextConfig(
            vocab_size=len(tokenizer),
            hidden_size=TEXT_WIDTH,
            intermediate_size=4 * TEXT_WIDTH,
            num_hidden_layers=3,
            num_attention_heads=4,
            max_position_embeddings=TEXT_POSITIONS,
            projection_dim=TEXT_WIDTH,
            **special,
        )
    )


def unet() -> UNet2DConditionModel:
    """Cross-attention at 8x8 and 4x4; two wide heads, since narrow ones are slow on a CPU.

    As wide at 8x8 as at 4x4: 16 latent channels hold eyes and stripes, and a trunk of 64 channels lost them.
    """
    return UNet2DConditionModel(
        sample_size=LATENT_SIZE,
        in_channels=LATENT_CHANNELS,
        out_channels=LATENT_CHANNELS,
        layers_per_block=1,
        block_out_channels=(128, 128),
        down_block_types=("CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D"),
        cross_attention_dim=TEXT_WIDTH,
        attention_head_dim=2,
        norm_num_groups=16,
    )


def scorer_config() -> dict[str, Any]:
    """open_clip configuration of the model that scores: a small ResNet and a text tower of three layers.

    It reads the pipeline's words but shares no weight with it; the tokenizer's files lie in its own folder.
    """
    return {
        "model_cfg": {
            "embed_dim": 96,
            "init_logit_bias": -10.0,  # SigLIP's: how similar picture and caption have to be to be believed
            "vision_cfg": {"image_size": IMAGE_SIZE, "layers": [1, 1, 1, 1], "width": 24, "patch_size": None},
            "text_cfg": {
                "context_length": TEXT_POSITIONS,
                "vocab_size": len(build_tokenizer(vocabulary(), TEXT_POSITIONS)),
                "hf_tokenizer_name": "local",
                "width": 96,
                "heads": 2,
                "layers": 3,
            },
        },
        "preprocess_cfg": {
            "size": [IMAGE_SIZE, IMAGE_SIZE],
            "mean": [0.5, 0.5, 0.5],
            "std": [0.5, 0.5, 0.5],
            "interpolation": "bicubic",
            "resize_mode": "shortest",
        },
    }


def scheduler() -> DDIMScheduler:
    """The noise schedule of Stable Diffusion 1.5, for a UNet that predicts the velocity."""
    return DDIMScheduler(
        prediction_type="v_prediction",
        num_train_timesteps=1000,
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        clip_sample=False,
        set_alpha_to_one=False,
        steps_offset=1,
    )
