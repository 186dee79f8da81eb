"""The step with the best harmonic mean of CLIP-I and CLIP-T is the one that training ends with."""

from __future__ import annotations

import csv
import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback, Trainer
from lightning.pytorch.callbacks import EarlyStopping
from PIL import Image
from torch import Tensor

from perfusion.backbones import backbone_class, default_config
from perfusion.backbones.base import Backbone, TokenError
from perfusion.config import TrainConfig
from perfusion.data.images import Examples
from perfusion.data.prompts import PromptError
from perfusion.drawing import sample
from perfusion.methods.base import Method, Word, build
from perfusion.scoring.clip import ClipScorer, ScorerError
from perfusion.training.checkpoint import Checkpoints
from perfusion.training.module import ConceptData, PersonalizationModule
from perfusion.training.run_folder import RunFolder
from perfusion.training.selection import SelectBestStep
from perfusion.training.trainer import build as build_trainer
from perfusion.training.trainer import results
from tests.pipelines import toyland_folder
from tests.scorers import make_scorer
from tests.training import same

STEPS = 6
TEMPLATES = ["a photo of a {} on the beach", "a {} in a box"]
WORD = Word("<toy*>", "cat")


@pytest.fixture(scope="module")
def scorer(tmp_path_factory: pytest.TempPathFactory) -> str:
    return make_scorer(tmp_path_factory.mktemp("scorer") / "model", seed=10)  # one that gives cosines above 0


@pytest.fixture(scope="module")
def backbone(tmp_path_factory: pytest.TempPathFactory) -> Backbone:
    folder = toyland_folder(tmp_path_factory.mktemp("pipeline"))
    config = dataclasses.replace(default_config("toyland"), path=str(folder), device="cpu", resolution=32)
    config.covariance.count = 50
    config.covariance.cache = str(tmp_path_factory.mktemp("covariance"))
    return backbone_class("toyland").load(config)


@pytest.fixture
def method(backbone: Backbone):
    made = build({"name": "perfusion", "steps": STEPS, "batch_size": 2, "sample_beta": 0.3, "value_rate": 0.1}, WORD)
    made.attach(backbone)
    yield made
    made.detach()


class Scripted(SelectBestStep):
    """Gives each step the score that a test wants."""

    def __init__(self, scores: Mapping[int, float], **settings: Any) -> None:
        super().__init__(prompts=TEMPLATES, steps=1, batch_size=1, **settings)
        self.script, self.looked_at = scores, []

    def setup(self, trainer: Trainer, pl_module: Any, stage: str) -> None:
        super().setup(trainer, pl_module, stage)
        self.trainer = trainer

    def scores(self, images: Any) -> dict[str, float]:
        self.looked_at.append(self.trainer.global_step)
        return {"harmonic": self.script[self.trainer.global_step]}


class States(Callback):
    """The method's state after each step, before the next one moves i*."""

    def __init__(self) -> None:
        self.after: dict[int, dict[str, Tensor]] = {}

    def on_train_batch_end(self, trainer: Trainer, pl_module: Any, *_: Any) -> None:
        self.after.setdefault(trainer.global_step, pl_module.method.state())


def fit(
    method: Method, backbone: Backbone, folder: Path, *callbacks: Callback, resume: Path | None = None, **more: Any
):
    draw = torch.Generator().manual_seed(0)
    examples = Examples(torch.rand(2, 3, 32, 32, generator=draw) * 2 - 1, None, ["a", "b"])
    config = TrainConfig(trainer={"enable_progress_bar": False, "log_every_n_steps": 1, **more})
    trainer: Any = build_trainer(config, RunFolder(folder), STEPS, backbone.device, 0)
    trainer.callbacks.extend(callbacks)
    data = ConceptData(examples, backbone, method.options, WORD.placeholder, seed=0)
    trainer.fit(PersonalizationModule(method, backbone), datamodule=data, ckpt_path=resume)
    return trainer


@pytest.mark.parametrize(
    ("script", "every", "parts", "best"),
    [
        ({2: 0.2, 4: 0.5, 6: 0.5}, 2, 1, 4),  # of equal ones the first
        ({4: 0.1, 6: 0.2}, 4, 1, 6),  # the last step counts, too
        ({2: 0.2, 4: 0.5, 6: 0.1}, 2, 2, 4),  # although two batches make a step
    ],
)
def test_the_best_step_is_kept(
    method, backbone, scorer, tmp_path, script: dict[int, float], every: int, parts: int, best: int
) -> None:
    select, states = Scripted(script, every=every, scorer=scorer), States()
    trainer = fit(method, backbone, tmp_path, select, states, accumulate_grad_batches=parts)
    assert select.looked_at == [*script], "each of them once, and not step 0"
    assert (select.best_step, select.best_scores) == (best, {"harmonic": script[best]})
    assert same(method.state(), states.after[best]) and not same(states.after[4], states.after[6])
    assert results(trainer) == {"step_kept": best, "scores": {"harmonic": script[best]}}


def test_other_callbacks_can_watch_the_scores(method, backbone, scorer, tmp_path) -> None:
    select = Scripted({2: 0.5, 4: 0.4, 6: 0.9}, every=2, scorer=scorer)
    trainer = fit(method, backbone, tmp_path, select, EarlyStopping("harmonic", mode="max", patience=1))
    assert select.looked_at == [2, 4] and trainer.global_step == 4
    assert results(trainer) == {"step_kept": 2, "scores": {"harmonic": 0.5}}


@pytest.mark.parametrize(
    ("saved", "every", "script", "best"),
    [
        (3, 2, {2: 0.9, 4: 0.5, 6: 0.4}, 2),  # the best step lies before the checkpoint: only that can know it
        (4, 2, {2: 0.5, 4: 0.9, 6: 0.4}, 4),  # it is the one that was saved
        (6, 4, {4: 0.5, 6: 0.9}, 6),  # it is the last one, and nothing is left to train
    ],
)
def test_a_resumed_run_chooses_like_one_that_never_stopped(
    method, backbone, scorer, tmp_path, saved: int, every: int, script: dict[int, float], best: int
) -> None:
    whole = Scripted(script, every=every, scorer=scorer)
    fit(method, backbone, tmp_path, whole, Checkpoints(every=saved))
    expected = method.state()
    method.load_state({name: value * 0 + 1 for name, value in expected.items()})
    resumed = Scripted(script, every=every, scorer=scorer)
    fit(method, backbone, tmp_path, resumed, resume=tmp_path / f"checkpoints/step-{saved:06d}.safetensors")
    assert resumed.looked_at == [step for step in script if step > saved]
    assert (resumed.best_step, resumed.best_scores) == (best, {"harmonic": script[best]})
    assert same(method.state(), expected)


def test_scores_of_the_samples_that_the_concept_gives(method, backbone, scorer, tmp_path) -> None:
    """The whole way: samples at the best step, drawn again and scored in float64, give the scores that were logged."""
    seen: list[tuple[bool, float]] = []
    select = SelectBestStep(every=3, scorer=scorer, prompts=TEMPLATES, steps=2, guidance=2.0, seed=11, batch_size=2)
    with backbone.denoiser.register_forward_pre_hook(lambda *_: seen.append((method.training, method.beta))):
        fit(method, backbone, tmp_path, select)
    trained, sampled = (True, 0.75), (False, 0.3)
    assert seen == ([trained] * 3 + [sampled] * 2) * 2, "sampling has the method's settings for it, training its own"
    assert method.training and method.beta == 0.75

    method.eval()
    prompts = [template.replace("{}", "<toy*>") for template in TEMPLATES]
    images = sample(backbone.pipe, prompts, [11, 12], 2, 2.0, 2, size=32, exact=False)
    model = ClipScorer(scorer)
    draw = torch.Generator().manual_seed(0)
    pixels = (torch.rand(2, 3, 32, 32, generator=draw) * 255).round().to(torch.uint8).permute(0, 2, 3, 1).numpy()
    references = model.image_embeddings([Image.fromarray(p) for p in pixels]).double()
    generated = model.image_embeddings(images).double()
    texts = model.text_embeddings([template.replace("{}", "cat") for template in TEMPLATES]).double()
    i, t = (generated @ references.T).mean().item(), (generated * texts).sum(-1).mean().item()
    assert i > 0 and t > 0, "else the mean is 0 whatever they are"
    expected = {"clip_i": i, "clip_t": t, "harmonic": 2 * i * t / (i + t)}
    assert select.best_scores == pytest.approx(expected, abs=1e-6)
    with open(tmp_path / "metrics.csv", newline="") as file:
        rows = [row for row in csv.DictReader(file) if row["harmonic"]]
    assert [row["step"] for row in rows] == ["3", "6"]
    kept = next(row for row in rows if row["step"] == str(select.best_step))
    assert {key: float(kept[key]) for key in expected} == pytest.approx(expected, abs=1e-6)
    assert select.summary() == {"step_kept": select.best_step, "scores": select.best_scores}

    strips = sorted((tmp_path / "progress").iterdir())
    assert [path.name for path in strips] == ["step-00003.png", "step-00006.png"]
    strip = Image.open(tmp_path / "progress" / f"step-{select.best_step:05d}.png")
    assert strip.size == (2 * 32 + 2, 32) and strip.crop((34, 0, 66, 32)).tobytes() == images[1].tobytes()


def test_watching_changes_nothing_in_training(method, backbone, scorer, tmp_path) -> None:
    alone, watched = States(), States()
    start = method.state()
    fit(method, backbone, tmp_path, alone)
    method.load_state(start)
    fit(method, backbone, tmp_path, watched, SelectBestStep(every=2, scorer=scorer, prompts=TEMPLATES, steps=1))
    assert same(watched.after[STEPS], alone.after[STEPS]) and not same(start, alone.after[STEPS])


def test_the_prompts_are_those_that_go_with_the_backbone(method, backbone, scorer, tmp_path) -> None:
    counted: list[int] = []

    class Count(SelectBestStep):
        def on_validation_end(self, trainer: Trainer, pl_module: Any) -> None:
            counted.append(len(pl_module.drawn))

    fit(method, backbone, tmp_path, Count(every=STEPS, scorer=scorer, steps=1))
    assert counted == [8]


def test_a_mistake_is_found_before_the_first_step(method, backbone, scorer, tmp_path, monkeypatch) -> None:
    start = method.state()
    with pytest.raises(ScorerError, match="no such folder"):
        fit(method, backbone, tmp_path, SelectBestStep(scorer="local-dir:nowhere"))
    with (
        monkeypatch.context() as patched,
        pytest.raises(ScorerError, match=r"callbacks\.select\.scorer: not given, and"),
    ):
        patched.setattr(type(backbone), "family", "stable_diffusion")
        fit(method, backbone, tmp_path, SelectBestStep())
    with pytest.raises(PromptError, match=r"expected one \{\}"):
        fit(method, backbone, tmp_path, SelectBestStep(scorer=scorer, prompts=["a cat"]))
    with pytest.raises(TokenError, match=r"prompt 'dog .* <toy\*>': '<toy\*>' would be cut off"):
        fit(method, backbone, tmp_path, SelectBestStep(scorer=scorer, prompts=["dog " * 24 + "{}"]))
    assert same(method.state(), start)


def test_pictures() -> None:
    pixels = torch.tensor([-1.0, 0.0, 1.0, 1.2]).view(1, 1, 2, 2).expand(1, 3, 2, 2)
    (image,) = Examples(pixels, None, ["x"]).pictures()
    assert image.mode == "RGB" and list(image.tobytes()[::3]) == [0, 128, 255, 255]
