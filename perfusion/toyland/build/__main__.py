"""`python -m perfusion.toyland.build`: trains every model of Toyland from nothing and writes the shipped folders."""

from __future__ import annotations

import json
import os
import shutil
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from diffusers import AutoencoderKL, DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import CLIPTextModel, CLIPTokenizer

from perfusion.cli import parse_key_values, run_cli
from perfusion.config import ConfigError
from perfusion.files import atomic_path, atomic_write_text
from perfusion.provenance import provenance
from perfusion.toyland.build import card
from perfusion.toyland.build.budget import START, run_workers
from perfusion.toyland.build.reconstructions import COUNT
from perfusion.toyland.build.report import REPORT, write
from perfusion.toyland.build.train_autoencoder import train_autoencoder
from perfusion.toyland.build.train_decoder import train_decoder
from perfusion.toyland.build.train_diffusion import train_diffusion
from perfusion.toyland.build.train_reader import train_reader
from perfusion.toyland.build.train_scorer import train_scorer
from perfusion.toyland.build.train_words import train_words
from perfusion.toyland.captions import vocabulary
from perfusion.toyland.models import TEXT_POSITIONS
from perfusion.toyland.tokenizer import build_tokenizer

# Of the minutes.
SHARES = {"autoencoder": 0.18, "words": 0.04, "diffusion": 0.5, "decoder": 0.08, "scorer": 0.08, "reader": 0.12}
STAGES = (*SHARES, "assemble")

USAGE = """
Train Toyland from nothing: autoencoder, text encoder, text encoder and UNet together, the decoder once more against a
discriminator, scorer, attribute reader. only= takes one of these stages: autoencoder, words, diffusion, decoder,
scorer, reader, assemble.

  python -m perfusion.toyland.build minutes=90 folder=toyland-build out=toyland-weights

Interrupt it whenever you like: the same command goes on where it stopped. A GPU is used when there is one, else one
process per core. The shipped weights are only replaced if you name their folder as out=. Afterwards

  python -m perfusion.toyland.build.report weights=toyland-weights

measures what came of it.
"""


@dataclass
class BuildConfig:
    """Command line of the builder."""

    minutes: float = 90.0  # training time in all, shared out over the stages
    folder: str = "toyland-build"  # state while training (some hundred MB); can be deleted afterwards
    out: str = "toyland-weights"  # the finished pipeline/, reader/, scorer/ and report.json
    scenes: int = 40_000  # training scenes of the UNet; at most 16,000 of others are kept as reconstructions
    processes: int | None = None  # null: one per core, or one with a GPU
    seed: int = 0
    start: str | None = None  # folder of finished weights, like `out`, to go on from; null: from nothing
    only: str | None = None  # one stage alone; null: all, in this order


def assemble(folder: Path, out: Path) -> StableDiffusionPipeline:
    """Put the trained parts together as a plain diffusers pipeline in `out/pipeline`; copy reader and scorer.

    UNet and autoencoder are stored in float16, which stock diffusers loads as float32. The text encoder stays float32:
    transformers loads a model in the type of its file, and a half-precision encoder would not fit the others.
    """
    pipe = StableDiffusionPipeline(
        vae=AutoencoderKL.from_pretrained(folder / "autoencoder"),
        text_encoder=CLIPTextModel.from_pretrained(folder / "text_encoder"),
        tokenizer=CLIPTokenizer.from_pretrained(folder / "tokenizer"),
        unet=UNet2DConditionModel.from_pretrained(folder / "unet"),
        scheduler=DDIMScheduler.from_pretrained(folder / "scheduler"),  # type: ignore[arg-type]
        safety_checker=None,  # type: ignore[arg-type]
        feature_extractor=None,  # type: ignore[arg-type]
        requires_safety_checker=False,
    )
    for part in (pipe.unet, pipe.vae):
        nn.Module.to(part, torch.float16)
    pipe.save_pretrained(out / "pipeline", safe_serialization=True)
    for file in (out / "pipeline").glob("*/config.json"):  # diffusers notes the folder that a part was loaded from
        config = json.loads(file.read_text())
        config.pop("_name_or_path", None)
        atomic_write_text(file, json.dumps(config, indent=2, sort_keys=True) + "\n")
    for part in ("reader", "scorer"):
        shutil.copytree(folder / part, out / part, dirs_exist_ok=True)
    return pipe


def begin_from(weights: Path, folder: Path) -> None:
    """Make the state that all stages start from, of the finished weights in a folder that `assemble` wrote.

    Words keep their embeddings where the vocabulary has changed; what does not fit the models of today is left out.
    """
    vocab = build_tokenizer(vocabulary(), TEXT_POSITIONS).get_vocab()
    tokens = sorted(vocab, key=vocab.__getitem__)
    parts = {
        "vae": ("pipeline/vae/diffusion_pytorch_model", None),
        "unet": ("pipeline/unet/diffusion_pytorch_model", None),
        "text": ("pipeline/text_encoder/model", "pipeline/tokenizer"),
        "reader": ("reader/reader", None),
        "clip": ("scorer/open_clip_model", "scorer"),
    }
    state = {}
    for name, (file, words) in parts.items():
        for key, value in load_file(weights / f"{file}.safetensors").items():
            if words and key.endswith("token_embedding.weight"):
                known = CLIPTokenizer.from_pretrained(weights / words).get_vocab()
                value = torch.stack([value[known.get(token, 0)] for token in tokens])
            state[f"ema/{name}.{key}"] = value.float().contiguous()
    with atomic_path(folder / f"{START}.safetensors") as beside:
        save_file(state, beside)
    shutil.copytree(weights / "pipeline" / "vae", folder / "autoencoder", dirs_exist_ok=True)


def training_record(folder: Path) -> dict[str, dict[str, float]]:
    """Steps, seconds and final loss of every stage, from the states that training left."""
    record = {}
    for stage in SHARES:
        with safe_open(folder / f"{stage}.safetensors", "pt") as state:
            record[stage] = json.loads(state.metadata()["progress"])
    return record


def build(config: BuildConfig) -> None:
    """Run the stages that `config` asks for."""
    if config.only is not None and config.only not in STAGES:
        raise ConfigError(f"only: found {config.only!r}, expected one of {', '.join(STAGES)}")
    folder, out = Path(config.folder), Path(config.out)
    folder.mkdir(parents=True, exist_ok=True)
    if config.start is not None and not (folder / f"{START}.safetensors").exists():
        begin_from(Path(config.start).expanduser(), folder)
    pool = min(COUNT, config.scenes)
    trainings: dict[str, tuple[Callable[..., None], *tuple[int, ...]]] = {
        "autoencoder": (train_autoencoder, config.seed),
        "words": (train_words, config.seed),
        "diffusion": (train_diffusion, config.seed, config.scenes),
        "decoder": (train_decoder, config.seed),
        "scorer": (train_scorer, config.seed + 1, pool),
        "reader": (train_reader, config.seed + 2, pool),
    }
    for stage, (train, *settings) in trainings.items():
        if config.only in (None, stage):
            seconds = 60 * config.minutes * SHARES[stage]
            run_workers(train, folder, seconds, *settings, processes=config.processes)
    if config.only in (None, "assemble"):
        out.mkdir(parents=True, exist_ok=True)
        assemble(folder, out)
        (out / REPORT).unlink(missing_ok=True)  # it may hold measurements of former weights
        settings = {"scenes": config.scenes, "seed": config.seed}
        report = write(out / REPORT, training=training_record(folder), settings=settings, built_with=provenance())
        atomic_write_text(out / card.FILE_NAME, card.card(report))
        print(f"Toyland is in {out}")


def main(argv: Sequence[str]) -> None:
    """Command line entry point."""
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    build(parse_key_values(argv, BuildConfig, USAGE))


if __name__ == "__main__":
    sys.exit(run_cli(main))
