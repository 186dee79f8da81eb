"""What can be measured of Toyland's models one by one: autoencoder, reader, scorer, and how the UNet takes to a toy.

Each function gives numbers, `report` holds them against the bars. Scenes are of seeds that no model was trained on.
"""

from __future__ import annotations

import copy
import time
from collections.abc import Sequence
from statistics import fmean, median
from typing import Any

import numpy as np
import torch
from diffusers import AutoencoderKL, DPMSolverMultistepScheduler
from PIL import Image

from perfusion.bars import Bar
from perfusion.toyland.build.counting import followed, identity_share
from perfusion.toyland.build.reconstructions import reconstruct
from perfusion.toyland.build.shipped import BATCH, GUIDANCE, Scorer, Toyland, encode, generate
from perfusion.toyland.build.train_autoencoder import draw_scenes
from perfusion.toyland.build.train_diffusion import denoising_loss
from perfusion.toyland.captions import caption, parse
from perfusion.toyland.draw import render
from perfusion.toyland.models import scheduler
from perfusion.toyland.reader import Reader, accuracy, as_options, as_pixels, label_tensors, shown
from perfusion.toyland.world import PLACES, Scene, concept_scene, pick, sample_instance, sample_scene

FIRST_SCENE = 400_000
FEW_STEPS = 12  # of DPM-Solver++, as experiments draw
VARIED_PROMPTS = (
    ("a photo of a cat on the beach", {"place": "beach"}),
    ("a photo of a cat in the city", {"place": "city"}),
    ("a photo of a cat wearing a crown", {"object0_worn": "crown"}),
    ("a photo of a cat wearing sunglasses", {"object0_worn": "sunglasses"}),
    ("a photo of a cat on a skateboard", {"object0_support": "skateboard"}),
    ("a photo of a cat in a box", {"object0_support": "box"}),
    ("a sketch of a cat", {"style": "sketch"}),
    ("a mosaic of a cat", {"style": "mosaic"}),
)


def fresh_scenes(count: int, **fixed: Any) -> list[Scene]:
    """Scenes of the seeds from FIRST_SCENE on."""
    return [sample_scene(FIRST_SCENE + i, **fixed) for i in range(count)]


def picture(scene: Scene) -> Image.Image:
    """The render of a scene."""
    return Image.fromarray(render(scene).image)


def read(reader: Reader, images: Sequence[Image.Image]) -> list[dict[str, str]]:
    """What the reader finds in each picture."""
    return as_options(reader.read(as_pixels(images)))


# ----------------------------------------------------------------- autoencoder, reader, scorer


def autoencoder_error(vae: AutoencoderKL, count: int = 256) -> float:
    """Mean squared error on [-1, 1] over fresh renders."""
    pixels = draw_scenes(fresh_scenes(count))[0]
    return float((reconstruct(vae, pixels) / 127.5 - 1 - pixels).square().mean())


def reader_accuracy(toyland: Toyland, count: int = 2000) -> tuple[dict[str, float], dict[str, float]]:
    """Share of right readings for each attribute, on fresh renders and on their reconstructions."""
    scenes = fresh_scenes(count)
    renders, right = draw_scenes(scenes)[0], label_tensors(map(shown, scenes))
    back = reconstruct(toyland.pipe.vae, renders) / 127.5 - 1
    return accuracy(toyland.reader.read(renders), right), accuracy(toyland.reader.read(back), right)


def retrieval(scorer: Scorer, batches: int = 5, size: int = 100) -> float:
    """Share of renders whose own caption is the nearest of `size` captions."""
    right = 0
    for batch in range(batches):
        scenes = [sample_scene(FIRST_SCENE + batch * size + i) for i in range(size)]
        rng = np.random.default_rng(batch)
        texts = [caption(scene, rng).text for scene in scenes]
        similarity = scorer.image_embeddings([picture(scene) for scene in scenes]) @ scorer.text_embeddings(texts).T
        right += int((similarity.argmax(1) == torch.arange(size)).sum())
    return right / (batches * size)


# ----------------------------------------------------------------- speed


def images_per_second(pipe: Any, batch: int = BATCH, rounds: int = 3) -> float:
    """Pictures per second of one call with `batch` prompts and FEW_STEPS of DPM-Solver++ on two threads: the median of
    `rounds` after one to warm up."""
    fast = copy.copy(pipe)
    fast.scheduler = DPMSolverMultistepScheduler.from_config(pipe.scheduler.config)
    seconds = []
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    for _ in range(rounds + 1):
        started = time.perf_counter()
        fast(["a photo of a cat on the beach"] * batch, num_inference_steps=FEW_STEPS, guidance_scale=GUIDANCE)
        seconds.append(time.perf_counter() - started)
    torch.set_num_threads(before)
    return batch / median(seconds[1:])


# ----------------------------------------------------------------- fit for personalization


def identity_on_renders(reader: Reader, count: int = 500) -> dict[str, float]:
    """Mean identity of instances' own pictures, and of pictures of other instances of their superclass (chance)."""
    rng = np.random.default_rng(FIRST_SCENE + 3)
    own, other = [], []
    for i in range(count):
        instance = sample_instance(rng)
        stranger = sample_instance(rng, instance.superclass)
        place = pick(rng, PLACES)
        scenes = [concept_scene(x, FIRST_SCENE + i, place=place) for x in (instance, stranger)]
        of_own, of_other = read(reader, [picture(scene) for scene in scenes])
        own.append(identity_share(scenes[0], of_own))
        other.append(identity_share(scenes[0], of_other))
    return {"own": fmean(own), "chance": fmean(other)}


def fine_tuning_curve(
    toyland: Toyland, steps: Sequence[int] = (0, 25, 50, 100, 200), rate: float = 2e-4, images: int = 32
) -> list[dict[str, float]]:
    """Naive full fine-tuning of the UNet on one picture, with the loss that it was trained with.

    One row per number of steps: `identity` over "a photo of a cat", and `prompts`, the share of what prompts with
    places, worn things, supports and styles asked for.
    """
    pipe: Any = copy.copy(toyland.pipe)
    pipe.unet = copy.deepcopy(toyland.pipe.unet).train()
    schedule = scheduler()
    instance = sample_instance(np.random.default_rng(FIRST_SCENE + 4), "cat", pattern="patched")
    with torch.no_grad():
        scene = concept_scene(instance, 0)
        latent = pipe.vae.encode(draw_scenes([scene])[0]).latent_dist.mode()
        latents = (latent * pipe.vae.config.scaling_factor).expand(8, -1, -1, -1)
        context = encode(pipe, [parse("a photo of a cat")]).expand(8, -1, -1)
    optimizer = torch.optim.AdamW(pipe.unet.parameters(), lr=rate)
    generator = torch.Generator().manual_seed(0)
    wanted = [VARIED_PROMPTS[i % len(VARIED_PROMPTS)] for i in range(images)]
    rows = []
    for step in Bar(range(steps[-1] + 1), desc="fine-tuning"):
        if step in steps:
            pipe.unet.eval()
            of_cat = read(toyland.reader, generate(pipe, ["a photo of a cat"] * images, 3))
            found = read(toyland.reader, generate(pipe, [text for text, _ in wanted], 4))
            hits = [hit for (_, asks), seen in zip(wanted, found, strict=True) for hit in followed(asks, seen).values()]
            share = fmean(identity_share(scene, seen) for seen in of_cat)
            rows.append({"steps": float(step), "identity": share, "prompts": fmean(hits)})
            pipe.unet.train()
        denoising_loss(pipe.unet, schedule, latents, context, generator).backward()
        optimizer.step()
        optimizer.zero_grad()
    return rows
