"""Toyland draws the same pixels for the same seed, its masks are exact, and its captions stay in their vocabulary."""

from dataclasses import replace

import numpy as np
import pytest

from perfusion.toyland import world
from perfusion.toyland.backdrops import backdrop
from perfusion.toyland.captions import MAX_WORDS, caption, swap_object, vocabulary
from perfusion.toyland.draw import render
from perfusion.toyland.pen import SUPERSAMPLE
from perfusion.toyland.shapes import SHAPES
from perfusion.toyland.world import (
    COLOURS,
    HELD_OUT,
    LIVING,
    SUPERCLASSES,
    concept_scene,
    sample_instance,
    sample_scene,
)


@pytest.fixture(scope="module")
def scenes() -> list[world.Scene]:
    return [sample_scene(seed) for seed in range(3000)]


def _grown(mask: np.ndarray, by: int) -> np.ndarray:
    """Boolean mask grown by `by` pixels in every direction."""
    padded = np.pad(mask, by)
    size = mask.shape[0]
    shifts = [padded[dy : dy + size, dx : dx + size] for dy in range(2 * by + 1) for dx in range(2 * by + 1)]
    return np.logical_or.reduce(shifts)


def test_same_seed_same_pixels():
    for seed in range(20):
        first, second = render(sample_scene(seed)), render(sample_scene(seed))
        assert np.array_equal(first.image, second.image)
        assert np.array_equal(first.masks, second.masks)
    assert not np.array_equal(render(sample_scene(1)).image, render(sample_scene(2)).image)


def test_images_and_masks_have_their_shape(scenes):
    for scene in scenes[:150]:
        out = render(scene)
        assert out.image.shape == (64, 64, 3) and out.image.dtype == np.uint8
        assert out.masks.shape == (len(scene.objects), 64, 64) and out.masks.dtype == np.uint8
        assert all((m == 255).sum() > 80 for m in out.masks)
        assert out.image.std() > 3


@pytest.mark.parametrize("superclass", SUPERCLASSES)
@pytest.mark.parametrize("worn, support", [("none", "none"), ("hat", "box"), ("scarf", "boat")])
def test_mask_is_where_the_body_colour_shows(superclass, worn, support):
    rng = np.random.default_rng(5)
    instance = sample_instance(rng, superclass, body="green", pattern="plain")
    scene = concept_scene(instance, 3, place="meadow", worn=worn, support=support)
    other = concept_scene(replace(instance, body="purple", second="red"), 3, place="meadow", worn=worn, support=support)
    one, two = render(scene), render(other)
    assert np.array_equal(one.masks, two.masks)
    differs = (one.image != two.image).any(axis=2)
    inside = one.masks[0] == 255
    assert differs[inside].mean() > 0.45  # the rest is eyes, windows, wheels and the like
    assert not differs[~_grown(one.masks[0] > 0, 1)].any()


def test_two_objects_have_their_own_masks():
    for seed in range(30):
        scene = sample_scene(seed, objects=2, style="photo", body="green", second="red", pattern="plain")
        masks = render(scene).masks.astype(int)
        assert masks.sum(axis=0).max() <= 255 + 2  # rounding of the reduction at shared edges
        left, right = (np.average(np.arange(64), weights=m.sum(axis=0)) for m in masks)
        assert left < right
        recoloured = replace(scene.objects[1], instance=replace(scene.objects[1].instance, body="blue"))
        changed = render(replace(scene, objects=(scene.objects[0], recoloured)))
        differs = (changed.image != render(scene).image).any(axis=2)
        assert not differs[~_grown(masks[1] > 0, 1)].any()


def test_everything_occurs_and_held_out_never(scenes):
    seen: dict[str, set] = {k: set() for k in ("superclass", "place", "worn", "support", "style", "pattern", "detail")}
    for scene in scenes:
        assert not world.is_held_out(scene)
        seen["place"].add(scene.place)
        seen["style"].add(scene.style)
        for placed in scene.objects:
            assert (placed.instance.superclass, scene.place) not in HELD_OUT
            assert (placed.instance.superclass, placed.worn) not in HELD_OUT
            assert placed.instance.body != placed.instance.second
            for name in ("worn", "support"):
                seen[name].add(getattr(placed, name))
            for name in ("superclass", "pattern", "detail"):
                seen[name].add(getattr(placed.instance, name))
    assert seen == {
        "superclass": set(SUPERCLASSES),
        "place": set(world.PLACES),
        "worn": set(world.WORN),
        "support": set(world.SUPPORTS),
        "style": set(world.STYLES),
        "detail": set(world.DETAILS),
        "pattern": set(world.PATTERNS),
    }
    share = np.mean([len(s.objects) == 2 for s in scenes])
    assert 0.14 < share < 0.22


def test_held_out_pairs_are_named_in_the_world_and_need_asking():
    for superclass, other in HELD_OUT:
        field = "place" if other in world.PLACES else "worn"
        assert superclass in SUPERCLASSES and (other in world.PLACES or other in world.WORN)
        with pytest.raises(ValueError):
            sample_scene(0, objects=1, superclass=superclass, **{field: other})
        assert world.is_held_out(sample_scene(0, objects=1, superclass=superclass, held_out=True, **{field: other}))


def test_captions_use_the_vocabulary_and_point_at_their_words(scenes):
    words = vocabulary()
    assert len(set(words)) == len(words)
    assert all(w == "-" or (w.isascii() and w.islower() and w.isalpha()) for w in words)
    rng = np.random.default_rng(0)
    used: set[str] = set()
    for scene in scenes:
        said = caption(scene, rng)
        used.update(said.words)
        assert 1 <= len(said.words) <= MAX_WORDS
        assert tuple(said.words[n] for n in said.nouns) == tuple(p.instance.superclass for p in scene.objects)
        for placed, noun, adjectives in zip(scene.objects, said.nouns, said.adjectives, strict=True):
            toy = placed.instance
            had = {"-", "eyed" if toy.superclass in LIVING else "trimmed"}
            assert {said.words[i] for i in adjectives} <= had | {toy.body, toy.second, toy.pattern, toy.detail}
            assert all(i < noun for i in adjectives)
            assert placed.worn != "sunglasses" or not {"eyed", "eyes"} & {said.words[i] for i in adjectives}
        if scene.style != "photo":
            assert {"sketch", "drawing", "mosaic"} & set(said.words)
        for a, b in zip(said.words, said.words[1:], strict=False):
            assert a not in ("a", "an") or (a == "an") == (b[0] in "aeiou")
        assert not any({s, o} <= set(said.words) for s, o in HELD_OUT if len(said.nouns) == 1)
    assert used == set(words)


def test_swap_keeps_the_length_and_changes_the_object(scenes):
    rng = np.random.default_rng(1)
    words = set(vocabulary())
    for scene in scenes[:600]:
        said = caption(scene, rng)
        for index, noun in enumerate(said.nouns):
            swapped = swap_object(said, index, rng)
            assert len(swapped.words) == len(said.words) and set(swapped.words) <= words
            assert (swapped.nouns, swapped.adjectives) == (said.nouns, said.adjectives)
            assert swapped.words[noun] in SUPERCLASSES and swapped.words[noun] != said.words[noun]
            assert all(said.words[i] != swapped.words[i] for i in said.adjectives[index] if said.words[i] in COLOURS)
            touched = {noun, *said.adjectives[index]}
            kept = [i for i in range(len(said.words)) if i not in touched and said.words[i] not in ("a", "an")]
            assert all(swapped.words[i] == said.words[i] for i in kept)


def test_concept_scenes_keep_the_instance_and_vary_in_place_and_crop_alone():
    instance = sample_instance(np.random.default_rng(9), "cat")
    views = [concept_scene(instance, seed, place="beach", worn="hat") for seed in range(60)]
    (first, *_), placed = views, [view.objects[0] for view in views]
    assert {p.x for p in placed} == {*world.ALONE} and {v.backdrop for v in views} == {*range(world.CROPS)}
    same = [replace(v, backdrop=0, relation="and", objects=(replace(v.objects[0], x=0.0),)) for v in views]
    assert {*same} == {replace(first, backdrop=0, relation="and", objects=(replace(first.objects[0], x=0.0),))}
    assert first.objects[0].instance == instance and (first.place, first.objects[0].worn) == ("beach", "hat")


def test_what_no_caption_says_hardly_varies(scenes):
    poses = {(len(s.objects), i, p.x, p.y, p.scale) for s in scenes for i, p in enumerate(s.objects)}
    assert len(poses) == 4, "two places for one object, one for each of two"
    assert {s.backdrop for s in scenes} == {*range(world.CROPS)} and world.CROPS <= 3
    for place in world.PLACES:
        crops = {np.asarray(backdrop(place, crop)[0]).tobytes() for crop in range(world.CROPS)}
        assert len(crops) == world.CROPS
    wide = np.asarray(backdrop("beach", 0)[0]), np.asarray(backdrop("beach", 1)[0])
    cells = 2 * 8 * SUPERSAMPLE  # whole latent cells apart
    assert np.array_equal(wide[0][:, cells:], wide[1][:, :-cells])


@pytest.mark.parametrize("superclass", SUPERCLASSES)
@pytest.mark.parametrize("pattern", world.PATTERNS[1:])
def test_the_body_s_colour_keeps_the_majority(superclass, pattern, monkeypatch):
    """Else the two colours changed round would be as good a name. Of the body, without the face that comes on top."""
    bare = replace(SHAPES[superclass], features=())
    monkeypatch.setitem(SHAPES, superclass, bare)
    toy = sample_instance(np.random.default_rng(0), superclass, body="green", second="red", pattern=pattern)
    drawn = render(concept_scene(toy, 0))
    inside = drawn.image[drawn.masks[0] == 255].astype(int)
    body, second = (np.abs(inside - COLOURS[name]).max(1) < 8 for name in ("green", "red"))
    assert body.mean() + second.mean() > 0.8
    assert body.sum() > second.sum() > 0.1 * body.sum()


@pytest.mark.parametrize("superclass", SUPERCLASSES)
def test_every_detail_is_a_latent_cell_large_at_least(superclass):
    """Eyes and trims: the pixels that change with their colour are as many as a cell of 8 x 8 has, at least half."""
    toy = sample_instance(np.random.default_rng(0), superclass, body="yellow", second="brown", detail="blue")
    scenes = [concept_scene(replace(toy, detail=detail), 0) for detail in ("blue", "red")]
    one, two = (render(scene).image.astype(int) for scene in scenes)
    assert (np.abs(one - two).max(axis=2) > 60).sum() >= 32
