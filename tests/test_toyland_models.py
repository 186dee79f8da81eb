"""The parts that Toyland's builder trains: tokenizer, swapped captions, resumable training, assembled folders."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import StableDiffusionPipeline
from safetensors.torch import load_file, save_file
from torch import nn

from perfusion.toyland.build import train_diffusion
from perfusion.toyland.build.budget import START, BudgetedTraining, rank, run_workers, world_size
from perfusion.toyland.build.muon import Muon, orthogonalise
from perfusion.toyland.build.train_diffusion import contexts
from perfusion.toyland.build.train_words import token_ids
from perfusion.toyland.captions import Caption, caption, vocabulary
from perfusion.toyland.draw import render
from perfusion.toyland.models import LATENT_CHANNELS, TEXT_POSITIONS, autoencoder, scheduler, text_encoder, unet
from perfusion.toyland.tokenizer import build_tokenizer, word_merges
from perfusion.toyland.world import sample_scene


@pytest.fixture(scope="module")
def tokenizer():
    return build_tokenizer(vocabulary(), TEXT_POSITIONS)


def test_every_word_is_one_token_and_other_text_still_encodes(tokenizer) -> None:
    assert all(len(tokenizer.tokenize(word)) == 1 for word in vocabulary())
    assert tokenizer.tokenize("a green-eyed cat") == ["a</w>", "green</w>", "-</w>", "eyed</w>", "cat</w>"]
    assert len({tokenizer.tokenize(word)[0] for word in vocabulary()}) == len(vocabulary())
    ids = tokenizer("a zebra, ünder the sun!").input_ids
    assert tokenizer.decode(ids, skip_special_tokens=True).replace(" ", "") == "azebra,ünderthesun!"
    assert tokenizer("a cat", padding="max_length").input_ids[3:] == [tokenizer.eos_token_id] * (TEXT_POSITIONS - 3)


def test_merges_survive_words_inside_words() -> None:
    words = ("at", "boat", "oat", "boa", "eyes", "yes", "ye")
    built = build_tokenizer(words, 8)
    assert [built.tokenize(word) for word in words] == [[word + "</w>"] for word in words]
    assert len(word_merges(words)) == len(set(word_merges(words)))


def test_the_noun_is_true_and_the_words_around_it_are_another_objects(tokenizer, monkeypatch) -> None:
    monkeypatch.setattr(train_diffusion, "SWAPPED", 1.0)
    encoder = text_encoder(tokenizer).eval()
    written = caption(sample_scene(3, objects=1, style="photo"), np.random.default_rng(0))
    empty = Caption((), (), ())
    with torch.no_grad():
        plain, mixed = contexts(encoder, tokenizer, [written, empty], np.random.default_rng(1))
    assert torch.equal(plain, encoder(token_ids(tokenizer, [written, empty])).last_hidden_state)
    noun = written.nouns[0] + 1
    assert tokenizer.convert_ids_to_tokens(token_ids(tokenizer, [written])[0])[noun] == f"{written.words[noun - 1]}</w>"
    assert torch.equal(mixed[0, noun], plain[0, noun])
    assert not torch.allclose(mixed[0, noun + 1 :], plain[0, noun + 1 :], atol=1e-3)  # a causal encoder carries it on
    assert torch.equal(mixed[1], plain[1])
    monkeypatch.setattr(train_diffusion, "SWAPPED", 0.0)
    assert torch.equal(*contexts(encoder, tokenizer, [written, empty], np.random.default_rng(1)))


@pytest.mark.parametrize("shape", [(12, 40), (40, 12), (16, 16)])
def test_muon_s_update_has_the_singular_vectors_of_the_gradient_and_nearly_equal_singular_values(shape) -> None:
    matrix = torch.randn(shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    left, values, right = torch.linalg.svd(matrix, full_matrices=False)
    ours = orthogonalise(matrix)
    inside = left.T @ ours @ right.T
    assert (inside - torch.diag(inside.diagonal())).abs().max() < 1e-9  # a function of the singular values alone
    assert ours.shape == shape
    strong = inside.diagonal()[values > 0.01 * matrix.norm()]
    assert len(strong) > 10 and strong.min() > 0.65
    assert strong.max() < 1.25
    assert torch.equal(orthogonalise(torch.zeros(shape)), torch.zeros(shape))


def test_muon_moves_a_convolution_by_its_rate_in_every_direction() -> None:
    weight = nn.Parameter(torch.zeros(8, 4, 3, 3).to(memory_format=torch.channels_last))
    weight.grad = torch.randn(8, 4, 3, 3, generator=torch.Generator().manual_seed(0))
    Muon([weight], lr=0.5).step()
    assert torch.linalg.svdvals(weight.detach().flatten(1)).sub(0.5).abs().max() < 0.2
    assert (weight * weight.grad).sum() < 0


def two_steps(folder: Path) -> None:
    """A worker: both processes see the same batches, so that averaging their gradients changes nothing."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(6, 8), nn.Linear(8, 5), nn.Linear(5, 1))
    run = BudgetedTraining("net", {"net": net}, folder / str(rank()), 1e6, rate=0.1, batch=4)
    for step in run:
        x = torch.randn(4, 6, generator=torch.Generator().manual_seed(step))
        run.update((net(x) - x.sum(1, keepdim=True)).square().mean())
        if step == 1:
            run.seconds = 0.0
    folder.mkdir(exist_ok=True)
    save_file(net.state_dict(), folder / f"net-{world_size()}-{rank()}.safetensors")


@pytest.mark.slow
def test_processes_that_share_the_work_do_what_one_does(tmp_path: Path) -> None:
    run_workers(two_steps, tmp_path, processes=2)
    run_workers(two_steps, tmp_path / "alone", processes=1)
    first, second = (load_file(tmp_path / f"net-2-{i}.safetensors") for i in range(2))
    alone = load_file(tmp_path / "alone" / "net-1-0.safetensors")
    assert all(torch.equal(first[name], second[name]) for name in first)
    torch.testing.assert_close(first, alone)


def test_training_goes_on_where_it_stopped(tmp_path: Path) -> None:
    def steps(folder: Path, limit: int) -> tuple[BudgetedTraining, nn.Module]:
        torch.manual_seed(0)
        net = nn.Sequential(nn.Linear(6, 8), nn.Linear(8, 1))
        run = BudgetedTraining("line", {"line": net}, folder, 1e6, rate=0.1, batch=4)
        for step in run:
            x = torch.randn(4, 6, generator=torch.Generator().manual_seed(step))
            run.update((net(x) - x.sum(1, keepdim=True)).square().mean())
            if step + 1 >= limit:
                run.seconds = 0.0  # the budget is spent
        return run, net

    steps(tmp_path / "halted", 20)
    again, resumed = steps(tmp_path / "halted", 25)
    _, straight = steps(tmp_path / "straight", 25)
    assert again.step == 25 and again.samples == 100
    torch.testing.assert_close(resumed.state_dict(), straight.state_dict())
    muon, adam = (type(o).__name__ for o in again.optimizers)
    assert (muon, adam) == ("Muon", "AdamW")
    assert again.parameters["line.0.weight"] in again.optimizers[0].state  # a matrix
    assert float(again.optimizers[1].state[again.parameters["line.1.weight"]]["step"]) == 25  # a vector


def test_training_starts_from_earlier_averages_where_they_fit(tmp_path: Path) -> None:
    def line(width: int, start: tuple[str, ...] = ()) -> tuple[BudgetedTraining, nn.Module]:
        torch.manual_seed(1)
        net = nn.Sequential(nn.Linear(6, width), nn.Linear(width, 1))
        return BudgetedTraining("next", {"net": net}, tmp_path, 1e6, rate=0.1, batch=4, start=start), net

    first, later = torch.full((8, 6), 2.0), torch.full((1, 8), 3.0)
    save_file({"ema/net.0.weight": first, "ema/net.1.weight": later * 2, "weight/net.0.bias": torch.ones(8)},
              tmp_path / f"{START}.safetensors")  # fmt: skip
    save_file({"ema/net.1.weight": later, "ema/other.0.bias": torch.ones(8)}, tmp_path / "words.safetensors")
    _, plain = line(8)
    run, net = line(8, (START, "words", "missing"))
    assert torch.equal(net[0].weight, first) and torch.equal(net[1].weight, later), "the later over the earlier"
    assert torch.equal(net[0].bias, plain[0].bias) and torch.equal(net[1].bias, plain[1].bias)
    assert torch.equal(run.ema["net.0.weight"], first), "averages begin there, too"
    _, narrow = line(4, (START, "words"))
    assert not (narrow[0].weight == 2).any() and not (narrow[1].weight == 3).any(), "of another shape"
    run.save()
    save_file({"ema/net.0.weight": 0 * first}, tmp_path / "words.safetensors")
    _, resumed = line(8, (START, "words"))
    assert torch.equal(resumed[0].weight, first), "its own state goes before all others"


def test_the_parts_make_a_pipeline_that_stock_diffusers_loads_and_runs(tokenizer, tmp_path: Path) -> None:
    from perfusion.toyland.build.__main__ import assemble

    torch.manual_seed(0)
    folder = tmp_path / "build"
    autoencoder().save_pretrained(folder / "autoencoder")
    unet().save_pretrained(folder / "unet")
    text_encoder(tokenizer).save_pretrained(folder / "text_encoder")
    tokenizer.save_pretrained(folder / "tokenizer")
    scheduler().save_pretrained(folder / "scheduler")
    for part in ("reader", "scorer"):
        (folder / part).mkdir()
    assemble(folder, tmp_path / "out")
    configs = [file.read_text() for file in (tmp_path / "out" / "pipeline").rglob("*.json")]
    assert not any(str(tmp_path) in config for config in configs), "where they were built is nobody's business"
    pipe = StableDiffusionPipeline.from_pretrained(tmp_path / "out" / "pipeline")  # nothing but the folder
    pipe.set_progress_bar_config(disable=True)
    image = pipe("a photo of a cat", num_inference_steps=2, generator=torch.Generator().manual_seed(0)).images[0]
    assert image.size == (64, 64)
    assert np.asarray(image).std() > 0
    assert sum(f.stat().st_size for f in (tmp_path / "out" / "pipeline").rglob("*.safetensors")) < 24e6


def test_finished_weights_can_be_trained_on(tokenizer, tmp_path: Path) -> None:
    """Words keep their embeddings where they have other ids; models that have changed keep what fits."""
    from perfusion.toyland.build.__main__ import begin_from

    torch.manual_seed(0)
    words = [word for word in vocabulary() if word not in ("eyed", "trimmed", "-")]
    earlier = build_tokenizer(words, TEXT_POSITIONS)
    out, folder = tmp_path / "out", tmp_path / "build"
    encoder, net, vae = text_encoder(earlier), unet(), autoencoder()
    for part, model in (("text_encoder", encoder), ("unet", net), ("vae", vae)):
        model.save_pretrained(out / "pipeline" / part)
    earlier.save_pretrained(out / "pipeline" / "tokenizer")
    (out / "scorer").mkdir()
    earlier.save_pretrained(out / "scorer")
    table = torch.rand(len(earlier), 5)
    save_file({"token_embedding.weight": table}, out / "scorer" / "open_clip_model.safetensors")
    (out / "reader").mkdir()
    save_file({"heads.sleep.weight": torch.ones(2, 256)}, out / "reader" / "reader.safetensors")
    folder.mkdir()
    begin_from(out, folder)

    state = load_file(folder / f"{START}.safetensors")
    known = encoder.get_input_embeddings().weight
    (moved,) = (value for key, value in state.items() if key.startswith("ema/text") and "token_embedding" in key)
    assert len(moved) == len(tokenizer)
    for word in ("cat", "striped", "beach"):
        then, now = (t.convert_tokens_to_ids(f"{word}</w>") for t in (earlier, tokenizer))
        assert torch.equal(moved[now], known[then])
        assert torch.equal(state["ema/clip.token_embedding.weight"][now], table[then])
    again: Any = unet()
    BudgetedTraining("diffusion", {"unet": again}, folder, 1.0, rate=0.1, batch=1)
    torch.testing.assert_close(again.state_dict(), net.state_dict())
    assert torch.equal(
        type(vae).from_pretrained(folder / "autoencoder").post_quant_conv.weight, vae.post_quant_conv.weight
    )


def test_latents_of_scenes_can_be_saved_and_have_the_model_s_shape(tmp_path: Path) -> None:
    torch.manual_seed(0)
    vae = autoencoder().to(memory_format=torch.channels_last).eval()
    scenes = [sample_scene(seed) for seed in (7, 8, 9)]
    made = train_diffusion.scene_latents(vae, scenes)
    latents, cells = made["latents"], made["cells"]
    assert latents.shape == (3, LATENT_CHANNELS, 8, 8) and cells.shape == (3, 1, 8, 8)
    assert latents.dtype == cells.dtype == torch.float16
    save_file(made, tmp_path / "latents.safetensors")
    alone = train_diffusion.scene_latents(vae, scenes[1:2])
    torch.testing.assert_close(latents[1:2], alone["latents"], atol=0.02, rtol=0.02)  # batches round differently
    masks = [render(scene).masks.max(0) for scene in scenes]
    shares = [mask.reshape(8, 8, 8, 8).mean((1, 3)) / 255 for mask in masks]
    assert np.abs(cells[:, 0].float().numpy() - np.stack(shares)).max() < 1e-3
