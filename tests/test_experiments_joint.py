"""Custom Diffusion of two concepts that are trained together."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest
import torch

from experiments.joint import train_together
from experiments.protocol import TABLE_TOYS, Protocol
from experiments.runner import Runner, Wanted
from experiments.settings import CUSTOM_DIFFUSION, JOINT_CUSTOM_DIFFUSION, Setting, snapshot_file
from perfusion.backbones.toyland import WEIGHTS
from perfusion.concept import Concept
from perfusion.config import TrainConfig
from perfusion.methods.base import Batch
from perfusion.methods.custom_diffusion import CustomDiffusion
from perfusion.methods.weights import projection_places
from perfusion.training.run_folder import RunFolder
from tests.concepts import toyland_backbone
from tests.test_experiments import Inline

CHANGES = ("method.steps=3", "method.batch_size=1", "method.prior_images=0")
PAIR = TABLE_TOYS[:2]


@pytest.fixture(scope="module")
def configs(tmp_path_factory: pytest.TempPathFactory) -> list[TrainConfig]:
    runner = Runner(tmp_path_factory.mktemp("runs"), Protocol(), CHANGES)
    return [runner.config(JOINT_CUSTOM_DIFFUSION, toy) for toy in PAIR]


@pytest.fixture(scope="module")
def asked(configs: list[TrainConfig]) -> Iterator[list[str]]:
    """The prompts of all steps, in their order; the concepts are trained then."""
    prompts: list[str] = []
    loss = CustomDiffusion.loss

    def watched(self: CustomDiffusion, backbone: object, batch: Batch) -> dict[str, torch.Tensor]:
        prompts.extend(batch.prompts)
        return loss(self, backbone, batch)  # type: ignore[arg-type]

    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(CustomDiffusion, "loss", watched)
        train_together(configs)
    yield prompts


def test_steps_take_turns_and_each_leaves_a_run(asked: list[str], configs: list[TrainConfig]) -> None:
    assert [("<cat*>" in prompt, "<dog*>" in prompt) for prompt in asked] == [(True, False), (False, True)] * 3
    folders = [RunFolder.of(config) for config in configs]
    assert all(folder.finished for folder in folders)
    assert [folder.path.parent.name for folder in folders] == ["trained-with-dog-102", "trained-with-cat-101"]
    assert all(snapshot_file(folder.path, step).is_file() for folder in folders for step in (1, 2))


def test_they_have_words_of_their_own_and_the_projections_in_common(
    asked: list[str], configs: list[TrainConfig]
) -> None:
    folders = [RunFolder.of(config) for config in configs]
    early, late = (
        [Concept.load(file) for file in files]
        for files in ([snapshot_file(folder.path, 1) for folder in folders], [folder.concept for folder in folders])
    )
    for pair in (early, late):
        one, other = (concept.tensors for concept in pair)
        words = [name for name in one if name.startswith("embedding")]
        assert words and all(torch.equal(one[name], other[name]) for name in one if name not in words)
        assert not any(torch.equal(one[name], other[name]) for name in words)
    for a, b in zip(early, late, strict=True):
        assert not any(torch.equal(a.tensors[name], b.tensors[name]) for name in a.tensors)


def test_a_batch_in_parts_makes_the_same_steps(tmp_path: Path) -> None:
    files = []
    for parts in (1, 2):
        words = ("method.batch_size=2", f"trainer.accumulate_grad_batches={parts}")
        runner = Runner(tmp_path / f"{parts}", Protocol(), (*CHANGES, *words))
        configs = [runner.config(JOINT_CUSTOM_DIFFUSION, toy) for toy in PAIR]
        train_together(configs)
        files.append([Concept.load(RunFolder.of(config).concept) for config in configs])
    for whole, in_parts in zip(*files, strict=True):
        for name, tensor in whole.tensors.items():
            torch.testing.assert_close(in_parts.tensors[name], tensor, rtol=0, atol=1e-3)


def test_the_model_that_draws_both_has_these_projections(
    asked: list[str], configs: list[TrainConfig], tmp_path: Path
) -> None:
    backbone = toyland_backbone(WEIGHTS, tmp_path)
    concepts = [Concept.load(RunFolder.of(config).concept) for config in configs]
    with ExitStack() as stack:
        for concept in concepts:
            stack.enter_context(concept.attach(backbone))
        for place in projection_places(backbone):
            assert torch.equal(place.now, concepts[0].tensors[f"{place.name}.weight"].float())


def test_pairs_are_trained_together_and_drawn(tmp_path: Path) -> None:
    protocol = Protocol(prompts=Protocol.prompts[:1], pair_prompts=Protocol.pair_prompts[:2], steps=2)
    runner = Runner(tmp_path, protocol, CHANGES)
    wanted = [Wanted(Setting(training), PAIR) for training in (JOINT_CUSTOM_DIFFUSION, CUSTOM_DIFFUSION)]
    tasks = runner.tasks(wanted)
    assert [task.name for task in tasks if task.kind == "train"] == [
        "train custom_diffusion, trained together, cat-101 and dog-102",
        "train custom_diffusion, cat-101",
        "train custom_diffusion, dog-102",
    ]
    assert runner.amount(tasks) == (3, 4, 0)
    pool: Any = Inline(1, tmp_path)
    pool.run(tasks, runner.keep)
    together, apart = (runner.points[one] for one in wanted)
    assert together.pictures[0].file != apart.pictures[0].file and together.method != apart.method
    assert runner.tasks(wanted[:1])[0].kind != "train"
