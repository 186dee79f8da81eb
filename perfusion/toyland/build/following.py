"""What Toyland's pipeline draws for prompts: each function gives numbers, `report` holds them against the bars.

Pictures are judged by the attribute reader, whose own mistakes on renders are measured first. Scenes are of seeds that
no model was trained on.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from statistics import fmean

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torchmetrics.functional.regression import spearman_corrcoef

from perfusion.contact_sheet import image_grid
from perfusion.toyland.build.counting import hits_by_row, identity_share, share_right
from perfusion.toyland.build.measure import FIRST_SCENE, fresh_scenes, picture, read
from perfusion.toyland.build.shipped import Scorer, Toyland
from perfusion.toyland.build.train_autoencoder import draw_scenes
from perfusion.toyland.build.train_words import at_nouns
from perfusion.toyland.captions import (
    PLACE_PHRASES,
    SUPPORT_PHRASES,
    Caption,
    asked,
    caption,
    described,
    possible_nouns,
    renamed,
)
from perfusion.toyland.reader import Wish, as_pixels, judge
from perfusion.toyland.world import (
    HELD_OUT,
    PLACES,
    STYLES,
    SUPERCLASSES,
    SUPPORTS,
    WORN,
    Scene,
    pick,
    sample_instance,
    sample_scene,
)

EDGES = 0.05  # share of a picture that is outlines


@dataclass(frozen=True)
class Drawn:
    """Scenes, a caption of each, what is drawn for it, and what the reader finds there."""

    scenes: list[Scene]
    captions: list[Caption]
    images: list[Image.Image]
    shown: list[dict[str, str]]


def draw_captions(toyland: Toyland, count: int = 1000) -> Drawn:
    """One picture for a caption of each of `count` fresh scenes."""
    scenes = fresh_scenes(count)
    rng = np.random.default_rng(FIRST_SCENE)
    captions = [caption(scene, rng) for scene in scenes]
    images = toyland.draw([c.text for c in captions], 0, "prompts")
    return Drawn(scenes, captions, images, read(toyland.reader, images))


def prompt_following(drawn: Drawn) -> dict[str, float]:
    """Share of the pictures that show what was asked, for each row of `hits_by_row`, and their numbers."""
    hits = hits_by_row(drawn.captions, drawn.shown)
    shares = {name: sum(right) / len(right) for name, right in hits.items()}
    return shares | {f"{name} (pictures)": float(len(right)) for name, right in hits.items()}


def scorer_agreement(scorer: Scorer, drawn: Drawn) -> dict[str, float]:
    """Whether the scorer likes what the reader finds right: Spearman's correlations over the pictures.

    `clip_t_correlation`: of the image-text similarity with the share of what was asked that is right, whichever object
    stands where. Captions differ in similarity by themselves, so `clip_t_correlation, less the render's` takes that of
    the caption's own render off it. `clip_i_correlation`: of the similarity with this render with the share of the
    toy's looks that is right.
    """
    embedded = scorer.image_embeddings(drawn.images)
    renders = scorer.image_embeddings([picture(scene) for scene in drawn.scenes])
    texts = scorer.text_embeddings([c.text for c in drawn.captions])
    clip_t, at_best, clip_i = ((a * b).sum(1) for a, b in ((embedded, texts), (renders, texts), (embedded, renders)))
    share = torch.tensor([share_right(asked(c), shown) for c, shown in zip(drawn.captions, drawn.shown, strict=True)])
    identity = torch.tensor([identity_share(s, shown) for s, shown in zip(drawn.scenes, drawn.shown, strict=True)])
    return {
        "clip_t_correlation": float(spearman_corrcoef(clip_t, share)),
        "clip_t_correlation, less the render's": float(spearman_corrcoef(clip_t - at_best, share)),
        "clip_i_correlation": float(spearman_corrcoef(clip_i, identity)),
    }


def sharpness(drawn: Drawn) -> float:
    """How steep outlines are in photos, over how steep they are in the renders of the same scenes (`edge_gradient`).

    A drawn toy may stand elsewhere than the render's, so both are taken where the picture itself has its outlines.
    """
    photos = [i for i, scene in enumerate(drawn.scenes) if scene.style == "photo"]
    made = edge_gradient(as_pixels([drawn.images[i] for i in photos]))
    return made / edge_gradient(draw_scenes([drawn.scenes[i] for i in photos])[0])


def edge_gradient(pixels: Tensor) -> float:
    """Mean over pictures (n, 3, h, w) of the mean gradient magnitude in the EDGES of its pixels where it is largest."""
    across = pixels[..., :-1, 1:] - pixels[..., :-1, :-1]
    down = pixels[..., 1:, :-1] - pixels[..., :-1, :-1]
    size = (across.square() + down.square()).sum(1).sqrt().flatten(1)
    return float(size.topk(max(1, round(EDGES * size.shape[1]))).values.mean())


def told_all_looks(toyland: Toyland, count: int = 256) -> dict[str, float]:
    """`identity` and `prompt` of `judge`, of toys that are described in words, with one thing more to draw each:
    a place, something worn, something to be on or in, or a style."""
    rng = np.random.default_rng(FIRST_SCENE + 5)
    templates = [told_template(i, rng) for i in range(count)]
    toys = [sample_instance(rng, kind) for kind, _ in templates]
    images = toyland.draw([t.format(described(toy)) for toy, (_, t) in zip(toys, templates, strict=True)], 5, "told")
    wishes = [Wish(t.format(kind), {kind: toy}) for toy, (kind, t) in zip(toys, templates, strict=True)]
    scores = judge(toyland.reader, images, wishes)
    return {name: fmean(score[name] for score in scores) for name in ("identity", "prompt", "superclass")}


def told_template(index: int, rng: np.random.Generator) -> tuple[str, str]:
    """A superclass, and a prompt with `{}` for it that asks for one thing more; no HELD_OUT pair."""
    kind = pick(rng, SUPERCLASSES)
    place, worn = (pick(rng, [o for o in options[1:] if (kind, o) not in HELD_OUT]) for options in (PLACES, WORN))
    more = (pick(rng, PLACE_PHRASES[place]), _wearing(worn), SUPPORT_PHRASES[pick(rng, SUPPORTS[1:])])
    if index % 4 < len(more):
        return kind, f"a photo of a {{}} {more[index % 4]}"
    return kind, f"a {pick(rng, STYLES[1:])} of a {{}}"


def _wearing(thing: str) -> str:
    return "wearing sunglasses" if thing == "sunglasses" else f"wearing a {thing}"


def swapped(toyland: Toyland, count: int = 200) -> dict[str, float]:
    """Of captions of one object whose noun's encoding, and nothing else, was replaced by another noun's.

    other: the other superclass is drawn. own: the caption's own is drawn all the same.
    """
    rng = np.random.default_rng(FIRST_SCENE + 1)
    sources = [caption(scene, rng) for scene in fresh_scenes(count, objects=1)]
    others = [renamed(source, 0, pick(rng, possible_nouns(source, 0))) for source in sources]
    encoded = toyland.encode(sources)
    mixed = at_nouns([source.nouns[0] for source in sources], toyland.encode(others), encoded)
    images = toyland.draw(mixed, 1, "swaps")
    found = [shown["object0_superclass"] for shown in read(toyland.reader, images)]

    def share(captions: Sequence[Caption]) -> float:
        return fmean(c.words[c.nouns[0]] == kind for c, kind in zip(captions, found, strict=True))

    return {"other": share(others), "own": share(sources)}


def compositions(toyland: Toyland, each: int = 20) -> dict[str, float]:
    """Share of pictures with both halves of a pair, superclass and place or worn thing, right.

    unseen: the pairs that no caption of the pipeline's training names. seen: the same places and worn things with other
    superclasses. `unseen, reader on renders`: what the reader makes of renders of the unseen pairs, the most that it
    could find.
    """
    rng = np.random.default_rng(FIRST_SCENE + 2)
    unseen = [pair for pair in sorted(HELD_OUT) for _ in range(each)]
    seen = [(pick(rng, [s for s in SUPERCLASSES if (s, thing) not in HELD_OUT]), thing) for _, thing in unseen]
    renders = []
    for i, (kind, thing) in enumerate(unseen):
        asks = {"superclass": kind, "style": "photo", "place" if thing in PLACES else "worn": thing}
        renders.append(picture(sample_scene(FIRST_SCENE + i, objects=1, held_out=True, **asks)))
    result = {"unseen, reader on renders": _pairs_read(toyland, renders, unseen)}
    for name, pairs in (("unseen", unseen), ("seen", seen)):
        said = [(kind, PLACE_PHRASES[thing][0] if thing in PLACES else _wearing(thing)) for kind, thing in pairs]
        images = toyland.draw([f"a photo of a {kind} {more}" for kind, more in said], 2, f"{name} compositions")
        result[name] = _pairs_read(toyland, images, pairs)
    return result


def _pairs_read(toyland: Toyland, images: Sequence[Image.Image], pairs: Sequence[tuple[str, str]]) -> float:
    return fmean(
        found["object0_superclass"] == kind and found["place" if thing in PLACES else "object0_worn"] == thing
        for found, (kind, thing) in zip(read(toyland.reader, images), pairs, strict=True)
    )


def renders_beside_pictures(toyland: Toyland, count: int = 64, columns: int = 8) -> Image.Image:
    """`count` renders on the left, and on the right, place by place, what is drawn for their captions."""
    drawn = draw_captions(toyland, count)
    halves = ([picture(scene) for scene in drawn.scenes], drawn.images)
    return image_grid([image_grid(half, columns) for half in halves], columns=2, gap=16)
