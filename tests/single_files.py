"""Checkpoints in one file for tests: a diffusers pipeline written out under the names that its publishers use."""

import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

Rules = Iterable[tuple[str, str]]

_RESNET: Rules = (
    ("norm1", "in_layers.0"),
    ("conv1", "in_layers.2"),
    ("norm2", "out_layers.0"),
    ("conv2", "out_layers.3"),
    ("time_emb_proj", "emb_layers.1"),
    ("conv_shortcut", "skip_connection"),
)
_UNET: Rules = (
    ("time_embedding.linear_1.", "time_embed.0."),
    ("time_embedding.linear_2.", "time_embed.2."),
    ("add_embedding.linear_1.", "label_emb.0.0."),
    ("add_embedding.linear_2.", "label_emb.0.2."),
    ("conv_in.", "input_blocks.0.0."),
    ("conv_norm_out.", "out.0."),
    ("conv_out.", "out.2."),
    ("mid_block.resnets.0.", "middle_block.0."),
    ("mid_block.attentions.0.", "middle_block.1."),
    ("mid_block.resnets.1.", "middle_block.2."),
)
_VAE: Rules = (
    ("mid_block.resnets.0.", "mid.block_1."),
    ("mid_block.resnets.1.", "mid.block_2."),
    ("mid_block.attentions.0.", "mid.attn_1."),
    ("conv_norm_out.", "norm_out."),
    ("conv_shortcut.", "nin_shortcut."),
    ("downsamplers.0.", "downsample."),
    ("upsamplers.0.", "upsample."),
    ("group_norm.", "norm."),
    ("to_q.", "q."),
    ("to_k.", "k."),
    ("to_v.", "v."),
    ("to_out.0.", "proj_out."),
)
_OPEN_CLIP: Rules = (
    ("embeddings.token_embedding.", "token_embedding."),
    ("embeddings.position_embedding.weight", "positional_embedding"),
    ("final_layer_norm.", "ln_final."),
    ("encoder.layers.", "transformer.resblocks."),
    ("layer_norm1.", "ln_1."),
    ("layer_norm2.", "ln_2."),
    ("mlp.fc1.", "mlp.c_fc."),
    ("mlp.fc2.", "mlp.c_proj."),
    ("self_attn.", "attn."),
)


def write_single_file(pipe: Any, path: Path, drop: str = "", **extra: Tensor) -> Path:
    """`pipe` as one file at `path`, without the tensors whose names begin with `drop`."""
    tensors = {**_unet(pipe.unet), **_vae(pipe.vae)}
    first = pipe.text_encoder.state_dict()
    if hasattr(pipe, "text_encoder_2"):
        tensors |= _under("conditioner.embedders.0.transformer.text_model.", first)
        second = pipe.text_encoder_2.state_dict()
        projection = second.pop("text_projection.weight")
        second = {name.removeprefix("text_model."): value for name, value in second.items()}
        tensors |= _under("conditioner.embedders.1.model.", {**_open_clip(second), "text_projection": projection.T})
    elif pipe.text_encoder.config.hidden_act == "gelu":  # SD 2.x
        tensors |= _under("cond_stage_model.model.", _open_clip(first))
    else:
        positions = {"embeddings.position_ids": torch.arange(77)[None]}  # as old transformers saved them
        tensors |= _under("cond_stage_model.transformer.text_model.", {**first, **positions})
    kept = {
        name: value.contiguous().clone() for name, value in tensors.items() if not drop or not name.startswith(drop)
    }
    save_file({**kept, **extra}, path)
    return path


def _unet(unet: Any) -> dict[str, Tensor]:
    per_block = unet.config.layers_per_block + 1
    crossed = {k for k, kind in enumerate(unet.config.up_block_types) if "CrossAttn" in kind}
    found: dict[str, Tensor] = {}
    for name, value in unet.state_dict().items():
        match = re.match(r"(down|up)_blocks\.(\d+)\.(resnets|attentions|downsamplers|upsamplers)\.(\d+)\.(.*)", name)
        if match:
            way, block, kind, layer, rest = match[1], int(match[2]), match[3], int(match[4]), match[5]
            if way == "down":
                at = 1 + block * per_block + (layer if kind != "downsamplers" else per_block - 1)
                part = {"resnets": "0", "attentions": "1", "downsamplers": "0.op"}[kind]
                head = f"input_blocks.{at}.{part}."
            else:
                at = block * per_block + (layer if kind != "upsamplers" else per_block - 1)
                upsampler = "2.conv" if block in crossed else "1.conv"
                part = {"resnets": "0", "attentions": "1", "upsamplers": upsampler}[kind]
                head = f"output_blocks.{at}.{part}."
            rest = rest.removeprefix("conv.") if kind in ("downsamplers", "upsamplers") else rest
            name = head + (_renamed(rest, _RESNET) if kind == "resnets" else rest)
        else:
            name = _renamed(_renamed(name, _UNET), _RESNET if "resnets" in name else ())
        found[name] = value
    return _under("model.diffusion_model.", found)


def _vae(vae: Any) -> dict[str, Tensor]:
    last = len(vae.config.up_block_types) - 1
    found: dict[str, Tensor] = {}
    for name, value in vae.state_dict().items():
        attention = "attentions" in name and ".to_" in name and name.endswith("weight")
        name = re.sub(r"down_blocks\.(\d+)\.", r"down.\1.", name)
        name = re.sub(r"up_blocks\.(\d+)\.", lambda m: f"up.{last - int(m[1])}.", name)
        name = re.sub(r"(down|up)\.(\d+)\.resnets\.", r"\1.\2.block.", name)
        found[_renamed(name, _VAE)] = value[..., None, None] if attention else value
    return _under("first_stage_model.", found)


def _open_clip(states: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Names of OpenCLIP, with Q, K and V in one tensor."""
    found: dict[str, Tensor] = {}
    for name, value in states.items():
        if ".q_proj." in name:
            parts = [value, *(states[name.replace(".q_proj.", f".{other}_proj.")] for other in "kv")]
            new = name.replace("self_attn.q_proj.", "attn.in_proj_")
            found[_renamed(new, _OPEN_CLIP)] = torch.cat(parts)
        elif ".k_proj." not in name and ".v_proj." not in name:
            found[_renamed(name, _OPEN_CLIP)] = value
    return found


def _renamed(name: str, rules: Rules) -> str:
    for own, theirs in rules:
        name = name.replace(own, theirs)
    return name


def _under(prefix: str, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {prefix + name: value for name, value in tensors.items()}
