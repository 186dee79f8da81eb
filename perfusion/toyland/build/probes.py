"""What Toyland's noun says: which looks the encoding of its own token holds, and which the UNet reads there.

Personalization methods write at a word's own token. So a toy has to be said there, and read there.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from perfusion.toyland.build.measure import FIRST_SCENE
from perfusion.toyland.build.train_autoencoder import draw_scenes
from perfusion.toyland.build.train_scorer import changed
from perfusion.toyland.build.train_words import at_nouns, said, training_scene
from perfusion.toyland.captions import Caption, caption, looks_said
from perfusion.toyland.models import LATENT_SIZE
from perfusion.toyland.world import PATTERNS, Scene, sample_scene

FITTED_SCENE = 600_000  # as FIRST_SCENE, a seed that no model was trained on, and other ones
LOOKS = ("pattern", "second", "detail")  # with the body, all that makes a toy of its superclass an individual
STEPS = (100, 300, 500, 700)  # of the noise schedule's 1000
_AT_ONCE = 64


# ----------------------------------------------------------------- what the encoding of a noun's token holds


def noun_says(encode: Callable[[Sequence[Caption]], Tensor], count: int = 2000) -> dict[str, dict[str, float]]:
    """How often a linear probe of the noun's own token is right, for each look: of `one` toy, and of either of `two`.

    The probe is fitted on 3 * `count` captions, one in five with two toys, and tested on `count` others of each kind. A
    look counts in those captions that name it before the noun.

    encode: captions to (n, N, d), word i at position i + 1.
    """
    rng = np.random.default_rng(FIRST_SCENE)
    fitted = _read_off(encode, [caption(training_scene(FITTED_SCENE + i), rng) for i in range(3 * count)])
    heads = {look: fit_linear(*found) for look, found in fitted.items()}
    shares = {}
    for name, objects in (("one", 1), ("two", 2)):
        scenes = [sample_scene(FIRST_SCENE + i, objects=objects) for i in range(count)]
        tested = _read_off(encode, [caption(scene, rng) for scene in scenes])
        shares[name] = {
            look: float((heads[look](x).argmax(1) == right).float().mean()) for look, (x, right) in tested.items()
        }
    return shares


@torch.no_grad()
def _read_off(
    encode: Callable[[Sequence[Caption]], Tensor], captions: Sequence[Caption]
) -> dict[str, tuple[Tensor, Tensor]]:
    """For each look, encodings (m, d) of the nouns that it is said of, and the option's index (m,)."""
    encoded = torch.cat([encode(captions[i : i + _AT_ONCE]) for i in range(0, len(captions), _AT_ONCE)])
    return {look: (encoded[at[:, 0], at[:, 1]], right) for look, (at, right) in said(captions).items()}


def fit_linear(features: Tensor, right: Tensor, decay: float = 1e-4) -> Callable[[Tensor], Tensor]:
    """Multinomial logistic regression: from features (m, d) and classes (m,) to a function of (n, d) to logits."""
    mean, scale = features.mean(0), features.std(0).clamp_min(1e-6)
    inputs = (features - mean) / scale
    weight = torch.zeros(int(right.max()) + 1, inputs.shape[1] + 1, requires_grad=True)

    def logits(x: Tensor) -> Tensor:
        return F.linear(x, weight[:, 1:], weight[:, 0])

    optimizer = torch.optim.LBFGS([weight], max_iter=200, line_search_fn="strong_wolfe")

    def loss() -> Tensor:
        optimizer.zero_grad()
        value = F.cross_entropy(logits(inputs), right) + decay * weight[:, 1:].square().sum()
        value.backward()
        return value

    with torch.enable_grad():
        optimizer.step(loss)  # type: ignore[arg-type]
    weight.requires_grad_(False)
    return lambda x: logits((x - mean) / scale)


# ----------------------------------------------------------------- what the UNet reads there


def read_at_noun(pipe: Any, encode: Callable[[Sequence[Caption]], Tensor], count: int = 192) -> dict[str, float]:
    """Share of the loss from a wrong look that comes from the noun's own token, for each of LOOKS.

    Captions name all looks of a toy. Of the denoising error in its cells: how much more it is when one look is wrong in
    the noun's token alone, over how much more when it is wrong in the whole caption. 0: the UNet reads the look
    elsewhere. NaN: a wrong look costs nothing.
    """
    rng = np.random.default_rng(FIRST_SCENE)
    scenes = _scenes_with_all_looks(count)
    captions = [_saying_all(scene) for scene in scenes]
    pixels, masks = draw_scenes(scenes)
    cells = F.adaptive_avg_pool2d(masks, LATENT_SIZE)
    with torch.no_grad():
        latents = torch.cat([pipe.vae.encode(part).latent_dist.mode() for part in pixels.split(_AT_ONCE)])
        latents *= pipe.vae.config.scaling_factor
    right = encode(captions)
    nouns = [c.nouns[0] for c in captions]
    least = denoising_error(pipe, latents, cells, right)
    shares = {}
    for look in LOOKS:
        # Striped becomes spotted or patched, never plain: the second colour stays to be seen.
        wrong = encode([_saying_all(changed(scene, 0, look, rng, PATTERNS[1:])) for scene in scenes])
        everywhere = denoising_error(pipe, latents, cells, wrong) - least
        at_noun = denoising_error(pipe, latents, cells, at_nouns(nouns, wrong, right)) - least
        shares[look] = at_noun / everywhere if everywhere > 0 else float("nan")
    return shares


@torch.no_grad()
def denoising_error(pipe: Any, latents: Tensor, cells: Tensor, context: Tensor) -> float:
    """Mean squared error of what the UNet predicts, in the object's cells, over STEPS and always the same noise.

    Args:
        latents, cells: (n, c, 8, 8), and how much of each cell is object (n, 1, 8, 8).
        context: encodings (n, N, d) of what each picture is said to be.
    """
    schedule = pipe.scheduler
    generator = torch.Generator().manual_seed(0)
    total = 0.0
    for step in STEPS:
        noise = torch.randn(latents.shape, generator=generator)
        steps = torch.full((len(latents),), step)
        noisy, velocity = (make(latents, noise, steps) for make in (schedule.add_noise, schedule.get_velocity))
        parts = zip(*(x.split(_AT_ONCE) for x in (noisy, steps, context)), strict=True)
        predicted = torch.cat([pipe.unet(*part).sample for part in parts])
        error = (predicted - velocity).square().mean(1, keepdim=True)
        total += float((error * cells).sum() / cells.sum())
    return total / len(STEPS)


def _scenes_with_all_looks(count: int) -> list[Scene]:
    """Photos of one toy with a pattern, whose eyes can be seen."""
    seeds = range(FIRST_SCENE, FIRST_SCENE + 2 * count)
    scenes = (sample_scene(i, objects=1, style="photo", pattern=PATTERNS[1 + i % 3]) for i in seeds)
    return [scene for scene in scenes if scene.objects[0].worn != "sunglasses"][:count]


def _saying_all(scene: Scene) -> Caption:
    """The scene's first caption that names all looks; of scenes that differ in a look alone, the same but for it."""
    captions = (caption(scene, np.random.default_rng(i)) for i in range(1000))
    return next(c for c in captions if len(looks_said([c.words[a] for a in c.adjectives[0]])) == len(LOOKS) + 1)
