"""What Toyland's stages learn from: scenes, steps, wrong captions, reconstructions; and what stays frozen."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from types import MappingProxyType

import numpy as np
import pytest
import torch
from diffusers import AutoencoderKL
from torch import nn

from perfusion.toyland.build import reconstructions, train_diffusion
from perfusion.toyland.build.reconstructions import Pool, judged_scene
from perfusion.toyland.build.train_autoencoder import draw_scenes, weighted_error
from perfusion.toyland.build.train_decoder import STEPS, Denoiser, decoded, discriminator, hinge_loss, train_decoder
from perfusion.toyland.build.train_diffusion import OBJECT_WEIGHT, denoising_loss, scene_weights
from perfusion.toyland.build.train_reader import fresh_scene
from perfusion.toyland.build.train_scorer import altered, captions, matching_loss
from perfusion.toyland.build.train_words import LOOKS, Saying, said, training_caption, training_scene
from perfusion.toyland.captions import Caption, asked, caption, parse, vocabulary
from perfusion.toyland.models import (
    LATENT_CHANNELS,
    TEXT_POSITIONS,
    TEXT_WIDTH,
    autoencoder,
    scheduler,
    text_encoder,
    unet,
)
from perfusion.toyland.reader import HEADS, NOT_SHOWN, OBJECT_HEADS, label_tensors
from perfusion.toyland.tokenizer import build_tokenizer
from perfusion.toyland.world import HELD_OUT, STYLES, is_held_out, sample_scene


def test_pairs_and_worn_things_are_practised_more() -> None:
    scenes = [training_scene(seed) for seed in range(500)]
    assert sum(len(scene.objects) == 2 for scene in scenes) == 100
    weights = scene_weights(scenes)
    assert weights.sum() == pytest.approx(1)
    worn = [sum(p.worn != "none" for p in scene.objects) for scene in scenes]
    assert all(weights[i] == pytest.approx(weights[worn.index(0)] * (1 + n)) for i, n in enumerate(worn))


def test_held_out_pairs_are_seen_and_never_named() -> None:
    scenes = [scene for seed in range(3000) if is_held_out(scene := training_scene(seed))]
    assert len(scenes) > 50
    rng = np.random.default_rng(0)
    named = 0
    for scene in scenes:
        for source, counts in ((training_caption(scene, rng), False), (caption(scene, rng), True)):
            wishes = asked(source) if source.nouns else {}
            for k in range(len(source.nouns)):
                kind = wishes[f"object{k}_superclass"]
                pairs = {(kind, wishes.get("place")), (kind, wishes.get(f"object{k}_worn"))}
                assert counts or not pairs & HELD_OUT
                named += counts and bool(pairs & HELD_OUT)
    assert named > len(scenes) / 3  # what else is said of the same scenes


class Zero(nn.Module):
    """A UNet that predicts zero, and keeps the steps that it is asked at."""

    def forward(self, noisy: torch.Tensor, steps: torch.Tensor, context: torch.Tensor):
        self.steps = steps
        return type("Out", (), {"sample": torch.zeros_like(noisy)})


def test_half_of_the_steps_are_among_the_350_of_least_noise() -> None:
    latents, model = torch.randn(4000, 1, 1, 1, generator=torch.Generator().manual_seed(0)), Zero()
    loss = denoising_loss(model, scheduler(), latents, latents, torch.Generator().manual_seed(1))
    steps = model.steps
    assert int(steps.min()) >= 0 and int(steps.max()) <= 999
    assert float((steps < 350).float().mean()) == pytest.approx(0.35 ** (1 / train_diffusion.LOW_NOISE), abs=0.03)
    # A prediction of zero misses the velocity, of variance one here: what is left is the mean weight.
    alpha = scheduler().alphas_cumprod[steps]
    snr = alpha / (1 - alpha)
    assert float(loss) == pytest.approx(float((snr.clamp(1, 20) / (snr + 1)).mean()), rel=0.1)


def test_the_object_s_cells_count_more_and_the_whole_as_much() -> None:
    latents, cells = torch.zeros(500, 1, 8, 8), torch.zeros(500, 1, 8, 8)
    cells[..., :4] = 1
    losses = [
        float(denoising_loss(Zero(), scheduler(), latents, latents, torch.Generator().manual_seed(0), c))
        for c in (None, torch.zeros_like(cells), torch.ones_like(cells), cells)
    ]
    assert losses[1] == pytest.approx(losses[0]) and losses[2] == pytest.approx(losses[0])
    assert losses[3] == pytest.approx(losses[0], rel=0.05) and losses[3] != losses[0] and OBJECT_WEIGHT > 1


def test_what_is_said_at_which_noun() -> None:
    two = parse("a green-eyed red striped blue cat and a spotted mug with a hat")
    short = parse("a photo of a cat with green eyes")
    found = said([short, Caption((), (), ()), two])
    assert found.keys() == {*LOOKS}

    def rows(name: str) -> dict[tuple[int, int], str]:
        at, right = found[name]
        return {(int(i), int(k)): OBJECT_HEADS[name][int(o)] for (i, k), o in zip(at, right, strict=True)}

    cat, mug = two.nouns[0] + 1, two.nouns[1] + 1
    assert rows("superclass") == {(0, short.nouns[0] + 1): "cat", (2, cat): "cat", (2, mug): "mug"}
    assert rows("pattern") == {(2, cat): "striped", (2, mug): "spotted"}
    assert rows("body") == {(2, cat): "blue"} and rows("second") == {(2, cat): "red"}
    assert rows("detail") == {(2, cat): "green"}, "eyes behind the noun are not known at it"
    assert all(len(at) == 0 for name, (at, _) in said([short]).items() if name != "superclass")


def test_saying_costs_nothing_where_the_noun_says_it_all() -> None:
    torch.manual_seed(0)
    captions = [parse("a green-eyed red striped blue cat"), Caption((), (), ())]
    saying = Saying()
    encoded = torch.randn(2, TEXT_POSITIONS, TEXT_WIDTH)
    noun = captions[0].nouns[0] + 1
    right = {name: int(option) for name, (_, (option,)) in said(captions[:1]).items()}
    expected = [
        nn.functional.cross_entropy(saying.heads[name](encoded[0, noun]), torch.tensor(option))
        for name, option in right.items()
    ]
    assert float(saying(encoded, captions)) == pytest.approx(float(torch.stack(expected).mean()), rel=1e-5)
    elsewhere = encoded.clone()
    elsewhere[:, torch.arange(TEXT_POSITIONS) != noun] = 0
    assert torch.equal(saying(elsewhere, captions), saying(encoded, captions)), "read at the noun alone"
    with torch.no_grad():
        for name, option in right.items():
            saying.heads[name].bias[option] = 100
    assert float(saying(encoded, captions)) < 1e-6


def test_the_reader_practises_what_it_mistakes() -> None:
    scenes = [fresh_scene(seed) for seed in range(400)]
    shares = Counter((len(scene.objects), scene.style) for scene in scenes)
    assert shares == {(n, s): 100 if s == "photo" else 50 for n in (1, 2) for s in STYLES}


def test_an_altered_scene_differs_in_one_thing_and_that_may_be_any() -> None:
    names = set()
    for seed in range(300):
        scene = sample_scene(seed)
        other = altered(scene, np.random.default_rng(seed))
        assert (other.place, other.style) == (scene.place, scene.style)
        pairs = [*zip(scene.objects, other.objects, strict=True)]
        parts = [*pairs, *((before.instance, after.instance) for before, after in pairs)]
        (changed,) = (n for old, new in parts for n in vars(old) if n != "instance" and vars(old)[n] != vars(new)[n])
        names.add(changed)
        assert len({p.instance.superclass for p in other.objects}) == len(other.objects)
        assert all(p.instance.body != p.instance.second for p in other.objects)
    assert names == {"superclass", "body", "second", "pattern", "detail", "worn", "support"}


def test_wrong_captions_use_the_right_one_s_words_but_for_what_is_wrong() -> None:
    scenes = [sample_scene(seed) for seed in range(200)]
    right, wrong = captions(scenes, [0])
    assert right == [caption(s, np.random.default_rng([0, i, 1])).text for i, s in enumerate(scenes)]
    pairs = [(a.split(), b.split()) for a, b in zip(right, wrong, strict=True) if a != b]
    assert len(pairs) > 0.95 * len(wrong)  # the others do not name what was altered
    near = [sum(x != y for x, y in zip(a, b, strict=True)) for a, b in pairs if len(a) == len(b)]
    assert len(near) > 0.7 * len(pairs) and np.median(near) == 1


def test_a_wrong_caption_costs_as_much_as_it_is_believed() -> None:
    embedded, scale, bias = torch.eye(4), torch.tensor(2.0), torch.tensor(-1.5)
    wrong, differ = embedded[[0, 2]], torch.tensor([False, True])
    loss = float(matching_loss(embedded[:2], embedded[:2], wrong, differ, scale, bias))
    contrast = -np.log(np.exp(2) / (np.exp(2) + 1))
    believed = np.log(1 + np.exp(-(2 - 1.5))) + np.log(1 + np.exp(0 - 1.5))
    assert loss == pytest.approx(contrast + believed, rel=1e-5)


def test_a_caption_s_labels_are_what_it_asks_for() -> None:
    text = "a photo of a red striped blue cat and a mug on the beach"
    found = {name: int(value) for name, (_, value) in label_tensors([{}, asked(parse(text))]).items()}
    said = {name: HEADS[name][k] for name, k in found.items() if k != NOT_SHOWN}
    assert said == asked(parse(text)) and said["object0_second"] == "red" and "object1_body" not in said


def test_reconstructions_are_made_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    vae = autoencoder()
    vae.save_pretrained(tmp_path / "autoencoder")
    pool = Pool.of(tmp_path, 3)
    assert pool.pixels.shape == (3, 3, 64, 64) and pool.pixels.dtype == torch.uint8
    assert pool.scenes == [judged_scene(reconstructions.FIRST_SCENE + i) for i in range(3)]
    monkeypatch.setattr(reconstructions, "reconstructions", None)  # not called again
    assert torch.equal(Pool.of(tmp_path, 3).pixels, pool.pixels)
    fresh = [sample_scene(7), sample_scene(8)]
    scenes, pixels = pool.beside(fresh, np.random.default_rng(3))
    assert scenes[:2] == fresh and scenes[2] != scenes[3] and all(scene in pool.scenes for scene in scenes[2:])
    assert pixels.shape == (4, 3, 64, 64) and float(pixels.abs().max()) < 1.001
    sharp = torch.cat([draw_scenes(fresh)[0], pool.pixels[[pool.scenes.index(s) for s in scenes[2:]]] / 127.5 - 1])
    assert 0 < float((pixels - sharp).abs().mean()) < 0.1, "a little softer"


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A builder's folder with everything that the decoder's training needs, of random weights."""
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("build")
    words = build_tokenizer(vocabulary(), TEXT_POSITIONS)
    autoencoder().save_pretrained(folder / "autoencoder")
    unet().save_pretrained(folder / "unet")
    text_encoder(words).save_pretrained(folder / "text_encoder")
    words.save_pretrained(folder / "tokenizer")
    return folder


@pytest.mark.slow
def test_only_the_decoder_learns_and_its_loss_falls(finished: Path) -> None:
    before = AutoencoderKL.from_pretrained(finished / "autoencoder")
    train_decoder(finished, 5.0)
    after = AutoencoderKL.from_pretrained(finished / "autoencoder")
    for name, value in before.state_dict().items():
        same = torch.equal(value, after.state_dict()[name])
        assert same == name.startswith(("encoder.", "quant_conv.")), name
    scenes = [sample_scene(seed) for seed in range(8)]
    pixels, masks = draw_scenes(scenes)
    denoiser = Denoiser(finished)
    losses = []
    for model in (before, after):
        made = decoded(model, denoiser, scenes, pixels, torch.Generator().manual_seed(0))
        losses.append(float(weighted_error(made - pixels, masks).detach()))
    assert losses[1] < losses[0]


def test_every_second_latent_is_what_the_denoiser_leaves() -> None:
    """The others are the encoder's own, and no gradient goes to the encoder."""

    class Still(nn.Module):
        config = MappingProxyType({"scaling_factor": 0.5})

        def encode(self, pixels: torch.Tensor):
            return type("Out", (), {"latent_dist": type("D", (), {"mode": lambda _: pixels})()})

        def decode(self, latents: torch.Tensor):
            return type("Out", (), {"sample": latents})

    def denoiser(latents: torch.Tensor, scenes: list, generator: torch.Generator) -> torch.Tensor:
        assert float(latents.detach().unique()) == 1.0  # scaled, as the UNet knows them
        assert scenes == [0, 2]
        return latents + 10

    pixels = torch.full((4, 4, 8, 8), 2.0, requires_grad=True)
    model, told = Still(), [0, 1, 2, 3]
    made = decoded(model, denoiser, told, pixels, torch.Generator())  # type: ignore[arg-type]
    assert not made.requires_grad
    assert made[:, 0, 0, 0].tolist() == [22.0, 2.0, 22.0, 2.0]


def test_a_perfect_denoiser_gives_back_the_latents(finished: Path) -> None:
    denoiser = Denoiser(finished)
    latents = torch.randn(3, LATENT_CHANNELS, 8, 8, generator=torch.Generator().manual_seed(0))
    seen: list[torch.Tensor] = []

    class Perfect(nn.Module):
        def forward(self, noisy: torch.Tensor, steps: torch.Tensor, context: torch.Tensor):
            seen.append(steps)
            alpha = denoiser.schedule.alphas_cumprod[steps].view(-1, 1, 1, 1)
            return type("Out", (), {"sample": (alpha.sqrt() * noisy - latents) / (1 - alpha).sqrt()})

    denoiser.unet = Perfect()
    given = denoiser(latents, [sample_scene(seed) for seed in range(3)], torch.Generator().manual_seed(1))
    torch.testing.assert_close(given, latents, atol=1e-4, rtol=1e-4)
    assert int(seen[0].max()) < STEPS and len(seen[0].unique()) == 3


def test_the_discriminator_learns_to_tell_pictures_and_the_decoder_to_pass() -> None:
    """It judges patches; its loss pushes the two apart until they are a margin apart, and never moves the decoder."""
    torch.manual_seed(0)
    judge = discriminator()
    real, made = draw_scenes([sample_scene(i) for i in range(6)])[0], torch.zeros(6, 3, 64, 64, requires_grad=True)
    assert judge(real).shape == (6, 1, 14, 14)
    optimizer = torch.optim.AdamW(judge.parameters(), 5e-3, betas=(0.5, 0.9))
    losses = []
    for _ in range(60):
        optimizer.zero_grad()
        loss = hinge_loss(judge, real, made)
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    assert made.grad is None
    assert losses[0] == pytest.approx(2, abs=0.5) and losses[-1] < 0.7 * losses[0]
    assert float(judge(real).detach().mean()) > float(judge(made).detach().mean())
    (-judge(made).mean()).backward()
    assert made.grad is not None and float(made.grad.abs().sum()) > 0

    class Constant(nn.Module):
        def forward(self, pixels: torch.Tensor) -> torch.Tensor:
            return pixels.mean((1, 2, 3))

    ones = torch.ones(2, 3, 4, 4)
    assert float(hinge_loss(Constant(), 2 * ones, -3 * ones)) == 0
    assert float(hinge_loss(Constant(), 0 * ones, 0.5 * ones)) == 2.5
