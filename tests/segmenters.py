"""Small models for tests that draw masks."""

from __future__ import annotations

from pathlib import Path

import torch
from transformers import CLIPSegConfig, CLIPSegForImageSegmentation, CLIPSegProcessor, ViTImageProcessor

from perfusion.toyland.tokenizer import build_tokenizer


def clipseg_folder(tmp_path: Path) -> Path:
    """CLIPSeg's architecture with few and random weights, in `tmp_path`/clipseg, as transformers saves it."""
    folder = tmp_path / "clipseg"
    tokenizer = build_tokenizer(["cat", "dog", "teddy", "bear"], positions=16)
    layers = {"num_hidden_layers": 2, "num_attention_heads": 2, "hidden_size": 16, "intermediate_size": 32}
    ends = {"bos_token_id": tokenizer.bos_token_id, "eos_token_id": tokenizer.eos_token_id}
    config = CLIPSegConfig(
        text_config={**layers, **ends, "vocab_size": len(tokenizer), "max_position_embeddings": 16},
        vision_config={**layers, "image_size": 64, "patch_size": 16},
        projection_dim=16,
        extract_layers=[0, 1],
        reduce_dim=8,
        decoder_num_attention_heads=2,
        decoder_intermediate_size=16,
    )
    with torch.random.fork_rng():
        torch.manual_seed(0)
        network = CLIPSegForImageSegmentation(config)
        with torch.no_grad():
            for parameter in network.parameters():
                parameter.copy_(torch.randn_like(parameter) * 0.3)
    network.save_pretrained(folder)
    CLIPSegProcessor(ViTImageProcessor(size={"height": 64, "width": 64}), tokenizer).save_pretrained(folder)
    return folder
