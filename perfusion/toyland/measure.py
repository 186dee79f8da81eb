"""What Toyland's builder measures: the autoencoder's error, the scorer's retrieval, and how prompts are followed.

Prompts are judged by the scorer: of the sentences that name each option of an attribute, the one nearest to the image
counts as its reading. The same reading on renders is reported beside it, since it bounds what can be seen.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import open_clip
import torch
from diffusers import StableDiffusionPipeline
from PIL import Image
from torch import Tensor
from tqdm import tqdm

from perfusion.toyland.captions import PLACE_PHRASES, caption
from perfusion.toyland.train_autoencoder import draw_batch
from perfusion.toyland.world import PLACES, SUPERCLASSES, SUPPORTS, WORN, pick, sample_scene

FIRST_SCENE = 400_000  # seeds that nothing was trained on

# One sentence per option; the noun is filled in, so that only the attribute differs.
QUESTIONS: dict[str, dict[str, str]] = {
    "superclass": {s: f"a photo of a {s}" for s in SUPERCLASSES},
    "place": {p: f"a photo of a {{}} {PLACE_PHRASES[p][0]}" for p in PLACES if p != "plain"},
    "worn": {
        w: "a photo of a {} wearing " + ("sunglasses" if w == "sunglasses" else f"a {w}") for w in WORN if w != "none"
    },
    "support": {s: f"a photo of a {{}} {'on' if s == 'skateboard' else 'in'} a {s}" for s in SUPPORTS if s != "none"},
    "style": {"photo": "a photo of a {}", "sketch": "a sketch of a {}", "mosaic": "a mosaic of a {}"},
}


class _Scorer:
    def __init__(self, folder: Path) -> None:
        name = f"local-dir:{folder}"
        loaded: Any = open_clip.create_model_and_transforms(name)
        self.model, _, self.preprocess = loaded
        self.model.eval()
        self.tokenizer: Any = open_clip.get_tokenizer(name)

    @torch.no_grad()
    def images(self, images: Sequence[Image.Image]) -> Tensor:
        pixels = torch.stack([self.preprocess(image) for image in images])
        return torch.cat([self.model.encode_image(p, normalize=True) for p in pixels.split(64)])

    @torch.no_grad()
    def texts(self, texts: Sequence[str]) -> Tensor:
        return self.model.encode_text(self.tokenizer(list(texts)), normalize=True)


def as_images(pixels: Tensor) -> list[Image.Image]:
    """(B, 3, H, W) in [-1, 1] to PIL images."""
    array = ((pixels.clamp(-1, 1) + 1) * 127.5).round().byte().permute(0, 2, 3, 1).numpy()
    return [Image.fromarray(a) for a in array]


def reconstruction_error(vae: Any, count: int = 256) -> float:
    """Mean squared error of an `AutoencoderKL` on [-1, 1] over fresh renders."""
    pixels, _ = draw_batch(list(range(FIRST_SCENE, FIRST_SCENE + count)))
    with torch.no_grad():
        back = torch.cat([vae.decode(vae.encode(p).latent_dist.mode()).sample for p in pixels.split(32)])
    return float((back - pixels).square().mean())


def retrieval(scorer: _Scorer, batches: int = 5, size: int = 100) -> float:
    """Share of renders whose own caption is the nearest of `size` captions."""
    right = 0
    for batch in range(batches):
        seeds = list(range(FIRST_SCENE + batch * size, FIRST_SCENE + (batch + 1) * size))
        rng = np.random.default_rng(batch)
        texts = [caption(sample_scene(seed), rng).text for seed in seeds]
        similarity = scorer.images(as_images(draw_batch(seeds)[0])) @ scorer.texts(texts).T
        right += int((similarity.argmax(1) == torch.arange(size)).sum())
    return right / (batches * size)


def prompt_following(pipe: Any, scorer: _Scorer, each: int = 40) -> dict[str, float]:
    """Share of a `StableDiffusionPipeline`'s images in which the scorer reads the attribute that was asked for."""
    pipe.set_progress_bar_config(disable=True)
    result = {}
    for attribute, options in tqdm(QUESTIONS.items(), desc="prompts"):
        rng = np.random.default_rng(len(result))
        asked = [pick(rng, tuple(options)) for _ in range(each)]
        nouns = [pick(rng, SUPERCLASSES) for _ in range(each)]
        prompts = [options[a].format(n) for a, n in zip(asked, nouns, strict=True)]
        generator = torch.Generator().manual_seed(len(result))
        images = pipe(prompts, num_inference_steps=25, guidance_scale=4.0, generator=generator).images
        embeddings = scorer.images(images)
        right = 0
        for embedding, answer, noun in zip(embeddings, asked, nouns, strict=True):
            texts = scorer.texts([sentence.format(noun) for sentence in options.values()])
            right += list(options)[int((texts @ embedding).argmax())] == answer
        result[attribute] = right / each
    return result


def measurements(weights: Path) -> dict[str, object]:
    """All of the above for the folder that the builder wrote."""
    pipe = StableDiffusionPipeline.from_pretrained(weights / "pipeline", safety_checker=None)
    scorer = _Scorer(weights / "scorer")
    return {
        "autoencoder_mse": round(reconstruction_error(pipe.vae), 5),
        "scorer_right_of_100": round(retrieval(scorer), 3),
        "prompt_followed": prompt_following(pipe, scorer),
        "megabytes": round(sum(f.stat().st_size for f in weights.rglob("*") if f.is_file()) / 1e6, 2),
    }
