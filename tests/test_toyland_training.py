"""What Toyland's stages learn from: scenes, steps, wrong captions, reconstructions; and what stays frozen."""

from __future__ import annotations

from collections import Counter
from dataclasses import fields
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from perfusion.toyland import reconstructions, train_diffusion
from perfusion.toyland.captions import asked, caption
from perfusion.toyland.models import autoencoder, scheduler
from perfusion.toyland.reconstructions import Pool, judged_scene
from perfusion.toyland.train_autoencoder import draw_batch
from perfusion.toyland.train_decoder import decoding_loss, train_decoder
from perfusion.toyland.train_diffusion import denoising_loss, scene_weights, training_caption, training_scene
from perfusion.toyland.train_reader import fresh_scene
from perfusion.toyland.train_scorer import altered, captions, contrastive_loss
from perfusion.toyland.world import HELD_OUT, LIVING, STYLES, is_held_out, sample_scene


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
        for said, counts in ((training_caption(scene, rng), False), (caption(scene, rng), True)):
            wishes = asked(said) if said.nouns else {}
            for k in range(len(said.nouns)):
                kind = wishes[f"object{k}_superclass"]
                pairs = {(kind, wishes.get("place")), (kind, wishes.get(f"object{k}_worn"))}
                assert counts or not pairs & HELD_OUT
                named += counts and bool(pairs & HELD_OUT)
    assert named > len(scenes) / 3  # what else is said of the same scenes


def test_half_of_the_steps_are_among_the_350_of_least_noise(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[torch.Tensor] = []

    class Spy(nn.Module):
        def forward(self, noisy: torch.Tensor, steps: torch.Tensor, context: torch.Tensor):
            seen.append(steps)
            return type("Out", (), {"sample": torch.zeros_like(noisy)})

    latents = torch.randn(4000, 1, 1, 1, generator=torch.Generator().manual_seed(0))
    loss = denoising_loss(Spy(), scheduler(), latents, latents, torch.Generator().manual_seed(1))
    steps = seen[0]
    assert int(steps.min()) >= 0 and int(steps.max()) <= 999
    assert float((steps < 350).float().mean()) == pytest.approx(0.35 ** (1 / train_diffusion.LOW_NOISE), abs=0.03)
    # A prediction of zero misses the velocity, of variance one here: what is left is the mean weight.
    alpha = scheduler().alphas_cumprod[steps]
    snr = alpha / (1 - alpha)
    assert float(loss) == pytest.approx(float((snr.clamp(1, 20) / (snr + 1)).mean()), rel=0.1)


def test_the_reader_practises_what_it_mistakes() -> None:
    scenes = [fresh_scene(seed) for seed in range(400)]
    shares = Counter((len(scene.objects), scene.style) for scene in scenes)
    assert shares == {(n, s): 100 if s == "photo" else 50 for n in (1, 2) for s in STYLES}


@pytest.mark.parametrize("seed", range(40))
def test_an_altered_scene_differs_in_one_thing(seed: int) -> None:
    scene = sample_scene(seed)
    other = altered(scene, np.random.default_rng(seed))
    changed = [
        f.name for f in fields(scene) if f.name != "objects" and getattr(scene, f.name) != getattr(other, f.name)
    ]
    for before, after in zip(scene.objects, other.objects, strict=True):
        for old, new in ((before, after), (before.instance, after.instance)):
            names = [f.name for f in fields(old) if f.name != "instance"]
            changed += [name for name in names if getattr(old, name) != getattr(new, name)]
    assert len(changed) == 1
    kinds = [p.instance.superclass for p in other.objects]
    assert len({*kinds}) == len(kinds)
    assert all(p.instance.body != p.instance.second for p in other.objects)
    if changed == ["detail"]:
        assert any(p.instance.superclass in LIVING for p in scene.objects)


def test_wrong_captions_use_the_right_one_s_words_but_for_what_is_wrong() -> None:
    scenes = [sample_scene(seed) for seed in range(200)]
    right, wrong = captions(scenes, [0])
    assert right == [caption(s, np.random.default_rng([0, i, 1])).text for i, s in enumerate(scenes)]
    pairs = [(a.split(), b.split()) for a, b in zip(right, wrong, strict=True) if a != b]
    assert len(pairs) > 80  # the others do not name what was altered
    near = [sum(x != y for x, y in zip(a, b, strict=True)) for a, b in pairs if len(a) == len(b)]
    assert len(near) > 60 and np.median(near) == 1


def test_a_wrong_caption_costs_as_much_as_it_is_believed() -> None:
    class Fake(nn.Module):
        """Pictures and captions are unit vectors already; token ids are their rows."""

        def forward(self, pixels: torch.Tensor, tokens: torch.Tensor):
            return pixels, self.encode_text(tokens), torch.tensor(2.0)

        def encode_text(self, tokens: torch.Tensor, normalize: bool = True) -> torch.Tensor:
            return torch.eye(4)[tokens[:, 0]]

    pixels, tokens = torch.eye(4)[:2], torch.tensor([[0], [1]])
    model: object = Fake()
    believed = contrastive_loss(model, pixels, tokens, torch.tensor([[0], [2]]))  # type: ignore[arg-type]
    e2 = float(torch.tensor(2.0).exp())
    images = (-np.log(e2 / (e2 + 1)) - np.log(e2 / (e2 + 1 + 1))) / 2  # the first has no wrong caption
    texts = -np.log(e2 / (e2 + 1))
    assert float(believed) == pytest.approx((images + texts) / 2, rel=1e-5)


def test_reconstructions_are_made_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    vae = autoencoder()
    vae.save_pretrained(tmp_path / "autoencoder")
    pool = Pool.of(tmp_path, 3)
    assert pool.pixels.shape == (3, 3, 64, 64) and pool.pixels.dtype == torch.uint8
    assert pool.scenes == [judged_scene(reconstructions.FIRST_SCENE + i) for i in range(3)]
    monkeypatch.setattr(reconstructions, "reconstructions", None)  # not called again
    assert torch.equal(Pool.of(tmp_path, 3).pixels, pool.pixels)
    taken = pool.take([2, 0])
    assert taken.shape == (2, 3, 64, 64) and float(taken.abs().max()) <= 1


def test_only_the_decoder_learns_and_its_loss_falls(tmp_path: Path) -> None:
    torch.manual_seed(0)
    autoencoder().save_pretrained(tmp_path / "autoencoder")
    from diffusers import AutoencoderKL

    before = AutoencoderKL.from_pretrained(tmp_path / "autoencoder")
    train_decoder(tmp_path, 3.0)
    after = AutoencoderKL.from_pretrained(tmp_path / "autoencoder")
    for name, value in before.state_dict().items():
        same = torch.equal(value, after.state_dict()[name])
        assert same == name.startswith(("encoder.", "quant_conv.")), name
    pixels, masks = draw_batch(list(range(8)))
    losses = [decoding_loss(m, pixels, masks, torch.Generator().manual_seed(0)).item() for m in (before, after)]
    assert losses[1] < losses[0]
