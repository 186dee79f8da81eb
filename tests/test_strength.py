"""The β that the scores speak for, on its own and as beta=auto."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from eval.strength import main
from perfusion import strength
from perfusion.backbones.base import Backbone
from perfusion.concept import Attached, Concept, save_concept
from perfusion.config import ConceptConfig, ToylandConcept, TrainConfig
from perfusion.data.prompts import fill, validation_prompts
from perfusion.drawing import sample
from perfusion.generate import GenerateConfig, generate
from perfusion.manifest import read_manifest
from perfusion.methods.base import Word
from perfusion.scoring.clip import ClipScorer, ScorerError
from perfusion.scoring.metrics import clip_scores
from perfusion.strength import GRID, Strength, best, measure, reference_pictures, table
from perfusion.training.run_folder import RunFolder
from tests.concepts import tiny_backbone, toyland_backbone, untrained_concept
from tests.pipelines import toyland_folder
from tests.scorers import make_scorer

STEPS = 2


@pytest.fixture(scope="module")
def backbone(tmp_path_factory: pytest.TempPathFactory) -> Backbone:
    pipeline = toyland_folder(tmp_path_factory.mktemp("pipeline"))
    return toyland_backbone(pipeline, tmp_path_factory.mktemp("covariance"))


@pytest.fixture(scope="module")
def scorer(tmp_path_factory: pytest.TempPathFactory) -> str:
    return make_scorer(tmp_path_factory.mktemp("scorer") / "model", seed=10)


@pytest.fixture(scope="module")
def file(backbone: Backbone, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A concept in a run folder, whose config says what it was trained on."""
    run = tmp_path_factory.mktemp("run")
    config = TrainConfig(
        concept=ConceptConfig("toy", "cat", "<cat*>", toyland=ToylandConcept(instance=3, count=2)),
    )
    config.run.dir = str(run)
    config.backbone.name = "toyland"
    RunFolder.of(config).begin(config)
    save_concept(run / "concept.safetensors", untrained_concept(backbone, Word("<cat*>", "cat"), 0))
    return run / "concept.safetensors"


@pytest.fixture
def attached(backbone: Backbone, file: Path) -> Iterator[Attached]:
    with Concept.load(file).attach(backbone, beta=0.33) as held:
        yield held


def colours(folder: Path, count: int) -> list[Image.Image]:
    folder.mkdir()
    made = [Image.new("RGB", (64, 64), (40 * k, 0, 200)) for k in range(count)]
    for k, image in enumerate(made):
        image.save(folder / f"{k}.png")
    return made


def test_each_strength_is_scored_as_its_own_pictures_are(attached: Attached, scorer: str, tmp_path: Path) -> None:
    references = colours(tmp_path / "references", 2)
    found = measure(attached, str(tmp_path / "references"), [0.1, 0.9], scorer, steps=STEPS, seed=5)
    assert [one.beta for one in found] == [0.1, 0.9] and found[0].clip_i != found[1].clip_i
    assert attached.beta == 0.33, "its own strength is put back"

    clip, config = ClipScorer(scorer), attached.backbone.config
    templates = validation_prompts("toyland")
    attached.beta = 0.9
    prompts = [fill(template, "<cat*>") for template in templates]
    seeds = range(5, 5 + len(prompts))
    images = sample(attached.backbone.pipe, prompts, seeds, STEPS, config.guidance, size=config.resolution, exact=False)
    texts = clip.text_embeddings([fill(template, "cat") for template in templates])
    alone = clip_scores(clip.image_embeddings(images), clip.image_embeddings(references), texts)
    assert alone == pytest.approx({"clip_i": found[1].clip_i, "clip_t": found[1].clip_t, "harmonic": found[1].harmonic})


def test_the_best_has_the_highest_harmonic_mean_and_the_table_says_so() -> None:
    found = [Strength(0.2, 0.9, 0.1, 0.18), Strength(0.4, 0.6, 0.3, 0.4), Strength(0.6, 0.6, 0.3, 0.4)]
    assert best(found) is found[1], "the first of equals"
    assert [line.endswith("<- best") for line in table(found).splitlines()] == [False, False, True, False]


def test_references_are_what_the_concept_was_trained_on_unless_given(attached: Attached, tmp_path: Path) -> None:
    assert len(reference_pictures(attached, None)) == 2
    colours(tmp_path / "three", 3)
    assert len(reference_pictures(attached, str(tmp_path / "three"))) == 3


def test_a_scorer_must_be_given_where_there_is_none(tmp_path: Path) -> None:
    stable = tiny_backbone(tmp_path / "cache")
    concept = untrained_concept(stable, Word("<toy*>", "cat"), 0)
    with (
        concept.attach(stable) as held,
        pytest.raises(ScorerError, match="scorer: not given, and this is stable_diffusion"),
    ):
        measure(held, None, [0.5])


@pytest.fixture
def loaded(monkeypatch: pytest.MonkeyPatch, backbone: Backbone, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(type(backbone), "load", classmethod(lambda cls, config: backbone))


@pytest.mark.usefixtures("loaded")
def test_the_command_prints_the_table_and_writes_it(file: Path, scorer: str, capsys: Any) -> None:
    main([f"concept={file}", f"scorer={scorer}", "grid=[0.2,0.8]", f"steps={STEPS}", "out=found.json"])
    written = json.loads(Path("found.json").read_text())
    assert [one["beta"] for one in written["strengths"]] == [0.2, 0.8] and written["best"] in (0.2, 0.8)
    assert f"{written['best']:5.2f}" in next(x for x in capsys.readouterr().out.splitlines() if "best" in x)


@pytest.mark.usefixtures("loaded")
def test_auto_draws_with_the_best_and_says_which(
    file: Path, scorer: str, capsys: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[Sequence[float]] = []

    def scripted(attached: Attached, references: Any, grid: Sequence[float] = GRID, **_: Any) -> list[Strength]:
        asked.append(grid)
        return [Strength(beta, 0.5, 0.5, 1 - abs(beta - 0.7)) for beta in grid]

    monkeypatch.setattr(strength, "measure", scripted)
    out = generate(GenerateConfig(str(file), "a photo of <cat*>", {"beta": "auto"}, num=1, steps=STEPS, out="pictures"))
    (record,) = read_manifest(out)
    assert asked == [GRID] and record.dials["beta"] == 0.7
    assert "beta=auto: 0.7 has the best harmonic mean" in capsys.readouterr().out
