"""Scoring models in the folder formats of open_clip and timm, tiny and with random weights."""

from __future__ import annotations

import json
from pathlib import Path

import open_clip
import torch
from safetensors.torch import save_file

from perfusion.toyland.tokenizer import build_tokenizer

WORDS = ("a", "cat", "dog", "photo", "of", "on", "in", "the", "beach", "hat", "snow")
SIZE, POSITIONS, DIMENSION = 64, 16, 24


def make_scorer(folder: Path, seed: int = 0) -> str:
    """Write the model into `folder`, which is made; returns the name that `ClipScorer` takes."""
    tokenizer = build_tokenizer(WORDS, POSITIONS)
    shape = {
        "embed_dim": DIMENSION,
        "vision_cfg": {"image_size": SIZE, "layers": 1, "width": 16, "head_width": 8, "patch_size": 16},
        "text_cfg": {
            "context_length": POSITIONS,
            "vocab_size": len(tokenizer),
            "hf_tokenizer_name": "local",  # open_clip then takes the tokenizer that lies in the folder
            "width": 16,
            "heads": 2,
            "layers": 1,
        },
    }
    config = {"model_cfg": shape, "preprocess_cfg": {"size": [SIZE, SIZE], "mean": [0.5] * 3, "std": [0.5] * 3}}
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = open_clip.CLIP(shape["embed_dim"], shape["vision_cfg"], shape["text_cfg"])
    folder.mkdir(parents=True)
    save_file(model.state_dict(), folder / "open_clip_model.safetensors")
    (folder / "open_clip_config.json").write_text(json.dumps(config))
    tokenizer.save_pretrained(folder)
    return f"local-dir:{folder}"


DINO = "test_vit"  # of timm's own tests: 0.4 M parameters
DINO_SETTINGS = {"embed_dim": 24, "depth": 1, "num_heads": 2, "mlp_ratio": 2, "img_size": SIZE}


def make_dino(folder: Path, model: torch.nn.Module) -> Path:
    """Write a model of DINO_SETTINGS into `folder`, which is made."""
    pretrained = {"num_classes": 0, "input_size": [3, SIZE, SIZE]}
    config = {"architecture": DINO, "num_classes": 0, "model_args": DINO_SETTINGS, "pretrained_cfg": pretrained}
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(config))
    save_file(model.state_dict(), folder / "model.safetensors")
    return folder
