"""What can be measured of Toyland's models: each function gives numbers, `report` holds them against the bars.

Generated pictures are judged by the attribute reader, whose own mistakes on renders are measured first. Everything is
drawn from seeds that no model was trained on, with 50 DDIM steps and guidance 4.
"""

from __future__ import annotations

import copy
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import permutations
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import open_clip
import torch
from diffusers import AutoencoderKL, StableDiffusionPipeline
from PIL import Image
from torch import Tensor
from torchmetrics.functional.regression import spearman_corrcoef
from tqdm import tqdm

from perfusion.contact_sheet import image_grid
from perfusion.toyland.captions import PLACE_PHRASES, asked, caption, possible_nouns
from perfusion.toyland.draw import render
from perfusion.toyland.models import TEXT_POSITIONS, scheduler
from perfusion.toyland.reader import HEADS, NOT_SHOWN, OBJECTS, Reader, accuracy, as_pixels, label_tensors, labels
from perfusion.toyland.train_autoencoder import draw_batch
from perfusion.toyland.train_diffusion import denoising_loss
from perfusion.toyland.world import (
    HELD_OUT,
    PLACES,
    SUPERCLASSES,
    Scene,
    concept_scene,
    pick,
    sample_instance,
    sample_scene,
)

FIRST_SCENE = 400_000
STEPS, GUIDANCE = 50, 4.0
BATCH = 16


class Scorer:
    """The open_clip model that the builder trained, loaded as anyone would."""

    def __init__(self, folder: Path) -> None:
        name = f"local-dir:{folder}"
        loaded: Any = open_clip.create_model_and_transforms(name)
        self.model, _, self.preprocess = loaded
        self.model.eval()
        self.tokenizer: Any = open_clip.get_tokenizer(name)

    @torch.no_grad()
    def images(self, images: Sequence[Image.Image]) -> Tensor:
        """Unit vectors (n, d)."""
        pixels = torch.stack([self.preprocess(image) for image in images])
        return torch.cat([self.model.encode_image(p, normalize=True) for p in pixels.split(64)])

    @torch.no_grad()
    def texts(self, texts: Sequence[str]) -> Tensor:
        """Unit vectors (n, d)."""
        parts = [self.tokenizer(list(texts[i : i + 64])) for i in range(0, len(texts), 64)]
        return torch.cat([self.model.encode_text(part, normalize=True) for part in parts])


@dataclass(frozen=True)
class Toyland:
    """The shipped models, loaded."""

    pipe: StableDiffusionPipeline
    reader: Reader
    scorer: Scorer

    @classmethod
    def load(cls, weights: Path) -> Toyland:
        """From the folder that the builder wrote."""
        pipe = StableDiffusionPipeline.from_pretrained(weights / "pipeline")
        pipe.set_progress_bar_config(disable=True)
        return cls(pipe, Reader.load(weights / "reader"), Scorer(weights / "scorer"))


def fresh_scenes(count: int, **fixed: Any) -> list[Scene]:
    """Scenes of the seeds from FIRST_SCENE on."""
    return [sample_scene(FIRST_SCENE + i, **fixed) for i in range(count)]


def pixels_of(scenes: Sequence[Scene]) -> Tensor:
    """Renders (n, 3, 64, 64) in [-1, 1]."""
    return as_pixels([picture(scene) for scene in scenes])


def picture(scene: Scene) -> Image.Image:
    """The render of a scene."""
    return Image.fromarray(render(scene).image)


@torch.no_grad()
def reconstruct(vae: Any, pixels: Tensor) -> Tensor:
    """Through an `AutoencoderKL` and back, rounded to what a picture can hold."""
    back = torch.cat([vae.decode(vae.encode(p).latent_dist.mode()).sample for p in pixels.split(32)])
    return ((back.clamp(-1, 1) + 1) * 127.5).round() / 127.5 - 1


def generate(pipe: Any, prompts: Sequence[str] | Tensor, seed: int, what: str = "") -> list[Image.Image]:
    """One picture per prompt, or per encoded prompt of a tensor (n, N, d); the same `seed`, the same pictures."""
    generator = torch.Generator().manual_seed(seed)
    images: list[Image.Image] = []
    for start in tqdm(range(0, len(prompts), BATCH), desc=what, disable=not what):
        part: Any = prompts[start : start + BATCH]
        given = {"prompt_embeds": part} if isinstance(part, Tensor) else {"prompt": list(part)}
        images += pipe(num_inference_steps=STEPS, guidance_scale=GUIDANCE, generator=generator, **given).images
    return images


# ----------------------------------------------------------------- autoencoder, reader, scorer


def autoencoder_error(vae: AutoencoderKL, count: int = 256) -> float:
    """Mean squared error on [-1, 1] over fresh renders."""
    pixels, _ = draw_batch(list(range(FIRST_SCENE, FIRST_SCENE + count)))
    return float((reconstruct(vae, pixels) - pixels).square().mean())


def reader_accuracy(toyland: Toyland, count: int = 2000) -> tuple[dict[str, float], dict[str, float]]:
    """Share of right readings for each attribute, on fresh renders and on their reconstructions."""
    scenes = fresh_scenes(count)
    pixels, right = pixels_of(scenes), label_tensors(scenes)
    on_renders = accuracy(toyland.reader.read(pixels), right)
    return on_renders, accuracy(toyland.reader.read(reconstruct(toyland.pipe.vae, pixels)), right)


def retrieval(scorer: Scorer, batches: int = 5, size: int = 100) -> float:
    """Share of renders whose own caption is the nearest of `size` captions."""
    right = 0
    for batch in range(batches):
        seeds = range(FIRST_SCENE + batch * size, FIRST_SCENE + (batch + 1) * size)
        rng = np.random.default_rng(batch)
        scenes = [sample_scene(seed) for seed in seeds]
        texts = [caption(scene, rng).text for scene in scenes]
        similarity = scorer.images([picture(scene) for scene in scenes]) @ scorer.texts(texts).T
        right += int((similarity.argmax(1) == torch.arange(size)).sum())
    return right / (batches * size)


# ----------------------------------------------------------------- prompts


def followed(wanted: Sequence[Mapping[str, str]], read: Mapping[str, Tensor]) -> list[dict[str, bool]]:
    """For each picture and each attribute that its prompt asked for: whether the reader finds it."""
    return [
        {name: HEADS[name].index(option) == int(read[name][i]) for name, option in asks.items()}
        for i, asks in enumerate(wanted)
    ]


def prompt_following(toyland: Toyland, count: int = 1000) -> dict[str, float]:
    """Over `count` fresh captions: the share of pictures that show what was asked, and what the scorer thinks of them.

    Attributes are counted over the captions with one object that ask for them; `both superclasses` over those with two,
    whichever stands where; `colours bound` over those that give both objects a colour: each superclass is there with
    its own. `clip_t_correlation` is Spearman's, of the scorer's image-text similarity with the share of what was asked
    that is right, whichever object stands where. Captions differ in similarity by themselves, so `clip_t_correlation,
    less the render's` takes that of the caption's own render off it. `clip_i_correlation` is that of the similarity
    with this render with the share of the scene's identity that is right.
    """
    scenes = fresh_scenes(count)
    rng = np.random.default_rng(FIRST_SCENE)
    captions = [caption(scene, rng) for scene in scenes]
    wanted = [asked(c) for c in captions]
    images = generate(toyland.pipe, [c.text for c in captions], 0, "prompts")
    read = toyland.reader.read(as_pixels(images))
    found = followed(wanted, read)
    hits: dict[str, list[bool]] = {}
    for i, (asks, hit) in enumerate(zip(wanted, found, strict=True)):
        if asks["objects"] == "one":
            for name, right in hit.items():
                if name == "style":  # a photo is what is drawn unless something else is asked for
                    name = "photo" if asks["style"] == "photo" else "sketch or mosaic"
                hits.setdefault(name.removeprefix("object0_"), []).append(right)
        else:
            _count_two(asks, {name: int(index[i]) for name, index in read.items()}, hits)
    result = {name: sum(right) / len(right) for name, right in hits.items()}
    result |= {f"{name} (pictures)": float(len(right)) for name, right in hits.items()}

    embedded = toyland.scorer.images(images)
    drawn = toyland.scorer.images([picture(scene) for scene in scenes])
    texts = toyland.scorer.texts([c.text for c in captions])
    clip_t, at_best = (embedded * texts).sum(1), (drawn * texts).sum(1)
    share = torch.tensor(
        [share_right(asks, {name: int(index[i]) for name, index in read.items()}) for i, asks in enumerate(wanted)]
    )
    result["clip_t_correlation"] = float(spearman_corrcoef(clip_t, share))
    result["clip_t_correlation, less the render's"] = float(spearman_corrcoef(clip_t - at_best, share))
    clip_i = (embedded * drawn).sum(1)
    identity = torch.tensor([identity_share(read, i, scene) for i, scene in enumerate(scenes)])
    result["clip_i_correlation"] = float(spearman_corrcoef(clip_i, identity))
    return result


def share_right(asks: Mapping[str, str], read: Mapping[str, int]) -> float:
    """Share of what was asked that is read in a picture, its objects taken in the order that fits better."""

    def share(order: Sequence[int]) -> float:
        right = 0
        for name, option in asks.items():
            if name.startswith("object") and "_" in name:
                index, _, attribute = name.removeprefix("object").partition("_")
                name = f"object{order[int(index)]}_{attribute}"
            right += HEADS[name].index(option) == read[name]
        return right / len(asks)

    orders = [range(OBJECTS)] if asks["objects"] == "one" else permutations(range(OBJECTS))
    return max(share(tuple(order)) for order in orders)


def _count_two(asks: Mapping[str, str], read: Mapping[str, int], hits: dict[str, list[bool]]) -> None:
    """Objects are found by their superclass, so that it does not matter which one stands on the left."""
    kinds = [asks[f"object{i}_superclass"] for i in range(OBJECTS)]
    there = [SUPERCLASSES[read[f"object{i}_superclass"]] for i in range(OBJECTS)]
    both = Counter(kinds) == Counter(there) and read["objects"] == OBJECTS - 1
    hits.setdefault("both superclasses", []).append(both)
    colours = [asks.get(f"object{i}_body") for i in range(OBJECTS)]
    if None not in colours:
        shown = dict(zip(there, (HEADS["object0_body"][read[f"object{i}_body"]] for i in range(OBJECTS)), strict=True))
        bound = both and all(shown[kind] == colour for kind, colour in zip(kinds, colours, strict=True))
        hits.setdefault("colours bound", []).append(bound)


def swapped(toyland: Toyland, count: int = 200) -> dict[str, float]:
    """Of captions of one object whose noun's encoding, and nothing else, was replaced by another noun's.

    other: the other superclass is drawn. own: the caption's own is drawn all the same.
    """
    pipe: Any = toyland.pipe
    rng = np.random.default_rng(FIRST_SCENE + 1)
    mixed, owns, others = [], [], []
    for scene in fresh_scenes(count, objects=1):
        source = caption(scene, rng)
        noun = source.nouns[0]
        own = source.words[noun]
        other = pick(rng, possible_nouns(source, 0))
        words = tuple(other if i == noun else word for i, word in enumerate(source.words))
        encoded = _encode(pipe, [source.text, replace(source, words=words).text])
        mixed.append(encoded[0].index_copy(0, torch.tensor([noun + 1]), encoded[1][noun + 1][None]))
        owns.append(SUPERCLASSES.index(own))
        others.append(SUPERCLASSES.index(other))
    images = generate(pipe, torch.stack(mixed), 1, "swaps")
    found = toyland.reader.read(as_pixels(images))["object0_superclass"]
    return {
        "other": float((found == torch.tensor(others)).float().mean()),
        "own": float((found == torch.tensor(owns)).float().mean()),
    }


@torch.no_grad()
def _encode(pipe: Any, prompts: list[str]) -> Tensor:
    tokens = pipe.tokenizer(prompts, padding="max_length", max_length=TEXT_POSITIONS, return_tensors="pt")
    return pipe.text_encoder(tokens.input_ids).last_hidden_state


def compositions(toyland: Toyland, each: int = 20) -> dict[str, float]:
    """Share of pictures with both halves of a pair, superclass and place or worn thing, right.

    unseen: the pairs that no caption of the pipeline's training names. seen: the same places and worn things with other
    superclasses. `unseen, reader on renders`: what the reader makes of renders of the unseen pairs, the most that it
    could find.
    """
    rng = np.random.default_rng(FIRST_SCENE + 2)
    result = {}
    for group in ("unseen", "seen"):
        pairs: list[tuple[str, str]] = []
        for superclass, thing in sorted(HELD_OUT):
            for _ in range(each):
                free = tuple(s for s in SUPERCLASSES if (s, thing) not in HELD_OUT)
                pairs.append((superclass if group == "unseen" else pick(rng, free), thing))
        images = generate(toyland.pipe, [_pair_prompt(*pair) for pair in pairs], 2, f"{group} compositions")
        result[group] = _pairs_read(toyland.reader.read(as_pixels(images)), pairs)
        if group == "unseen":
            renders = [_pair_scene(kind, thing, FIRST_SCENE + i) for i, (kind, thing) in enumerate(pairs)]
            result["unseen, reader on renders"] = _pairs_read(toyland.reader.read(pixels_of(renders)), pairs)
    return result


def _pairs_read(read: Mapping[str, Tensor], pairs: Sequence[tuple[str, str]]) -> float:
    right = 0
    for i, (superclass, thing) in enumerate(pairs):
        head = "place" if thing in PLACES else "object0_worn"
        of_thing = HEADS[head].index(thing) == int(read[head][i])
        right += of_thing and SUPERCLASSES[int(read["object0_superclass"][i])] == superclass
    return right / len(pairs)


def _pair_scene(superclass: str, thing: str, seed: int) -> Scene:
    asks = {"place": thing} if thing in PLACES else {"worn": thing}
    return sample_scene(seed, objects=1, held_out=True, superclass=superclass, style="photo", **asks)


def _pair_prompt(superclass: str, thing: str) -> str:
    if thing in PLACES:
        return f"a photo of a {superclass} {PLACE_PHRASES[thing][0]}"
    return f"a photo of a {superclass} wearing {'' if thing == 'sunglasses' else 'a '}{thing}"


def images_per_second(pipe: Any, batch: int = BATCH, rounds: int = 3) -> float:
    """Pictures per second of one call with `batch` prompts: the median of `rounds` after one to warm up."""
    seconds = []
    for _ in range(rounds + 1):
        started = time.perf_counter()
        generate(pipe, ["a photo of a cat on the beach"] * batch, 0)
        seconds.append(time.perf_counter() - started)
    return batch / median(seconds[1:])


def renders_beside_pictures(toyland: Toyland, count: int = 64, columns: int = 8) -> Image.Image:
    """`count` renders on the left, and on the right, place by place, what is drawn for their captions."""
    scenes = fresh_scenes(count)
    rng = np.random.default_rng(FIRST_SCENE)
    drawn = generate(toyland.pipe, [caption(scene, rng).text for scene in scenes], 0, "sheet")
    halves = [[picture(scene) for scene in scenes], drawn]
    grids = [image_grid(half, columns) for half in halves]
    gap = 16
    sheet = Image.new("RGB", (grids[0].width * 2 + gap, grids[0].height), "white")
    for i, grid in enumerate(grids):
        sheet.paste(grid, (i * (grid.width + gap), 0))
    return sheet


# ----------------------------------------------------------------- fit for personalization


def identity_share(read: Mapping[str, Tensor], index: int, scene: Scene) -> float:
    """Share of what makes the first object of `scene` an individual, as far as it is to be seen in such a scene, that
    was read in picture `index`."""
    right = labels(scene)
    heads = [f"object0_{name}" for name in ("body", "second", "pattern", "detail")]
    shown = [head for head in heads if right[head] != NOT_SHOWN]
    return sum(int(read[head][index]) == right[head] for head in shown) / len(shown)


def identity_on_renders(reader: Reader, count: int = 500) -> dict[str, float]:
    """Mean identity of instances' own pictures, and of pictures of other instances of their superclass (chance)."""
    rng = np.random.default_rng(FIRST_SCENE + 3)
    own, other = [], []
    for i in range(count):
        instance = sample_instance(rng)
        stranger = sample_instance(rng, instance.superclass)
        place = pick(rng, PLACES)
        scenes = [concept_scene(x, FIRST_SCENE + i, place=place) for x in (instance, stranger)]
        read = reader.read(pixels_of(scenes))
        own.append(identity_share(read, 0, scenes[0]))
        other.append(identity_share(read, 1, scenes[0]))
    return {"own": float(np.mean(own)), "chance": float(np.mean(other))}


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
        latent = pipe.vae.encode(pixels_of([scene])).latent_dist.mode()
        latents = (latent * pipe.vae.config.scaling_factor).expand(8, -1, -1, -1)
        context = _encode(pipe, ["a photo of a cat"]).expand(8, -1, -1)
    optimizer = torch.optim.AdamW(pipe.unet.parameters(), lr=rate)
    generator = torch.Generator().manual_seed(0)
    wanted = _varied_prompts(images)
    rows = []
    for step in tqdm(range(steps[-1] + 1), desc="fine-tuning"):
        if step in steps:
            pipe.unet.eval()
            of_cat = toyland.reader.read(as_pixels(generate(pipe, ["a photo of a cat"] * images, 3)))
            read = toyland.reader.read(as_pixels(generate(pipe, [text for text, _ in wanted], 4)))
            hits = [right for hit in followed([asks for _, asks in wanted], read) for right in hit.values()]
            share = float(np.mean([identity_share(of_cat, i, scene) for i in range(images)]))
            rows.append({"steps": float(step), "identity": share, "prompts": sum(hits) / len(hits)})
            pipe.unet.train()
        denoising_loss(pipe.unet, schedule, latents, context, generator).backward()
        optimizer.step()
        optimizer.zero_grad()
    return rows


def _varied_prompts(count: int) -> list[tuple[str, dict[str, str]]]:
    texts = [
        ("a photo of a cat on the beach", {"place": "beach"}),
        ("a photo of a cat in the city", {"place": "city"}),
        ("a photo of a cat wearing a crown", {"object0_worn": "crown"}),
        ("a photo of a cat wearing sunglasses", {"object0_worn": "sunglasses"}),
        ("a photo of a cat on a skateboard", {"object0_support": "skateboard"}),
        ("a photo of a cat in a box", {"object0_support": "box"}),
        ("a sketch of a cat", {"style": "sketch"}),
        ("a mosaic of a cat", {"style": "mosaic"}),
    ]
    return [texts[i % len(texts)] for i in range(count)]
