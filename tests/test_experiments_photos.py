"""The claims on photos: the whole way on a tiny random Stable Diffusion, and what is said of mistakes."""

from __future__ import annotations

import json
import os
import re
from pathlib import Path
from typing import Any

import pytest

from experiments import paper
from experiments.photo_protocols import PROTOCOLS, read_photos
from experiments.photos import PhotoOptions, Photos
from experiments.settings import FIVE_PICTURES, ONE_PICTURE, PERFUSION, Setting, config_of
from perfusion.cli import run_cli
from perfusion.config import ConfigError
from perfusion.manifest import read_manifest
from perfusion.training.run_folder import RunFolder, read_config
from tests.pipelines import RESOLUTION, tiny_pipeline_folder
from tests.scored import noise
from tests.scorers import DINO, DINO_SETTINGS, make_dino, make_scorer
from tests.test_experiments import Inline

SUBJECTS = {"rex": "dog", "old mug": "mug", "tiger": "cat"}
OF_PHOTOS = ("data", "path", "device", "scorer")
PROTOCOL = """
based_on: study
classes: {rex: dog, old mug: mug, tiger: cat}
live: [dog, cat]
prompts:
  object: ["a photo of a {} on the beach", "a {} in the snow"]
  live: ["a {} wearing a hat", "a {} in the city"]
seeds: 1
steps: 1
"""


def photo(file: Path, seed: int) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    noise(seed, RESOLUTION).save(file)


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Photos of three subjects with a protocol, pictures of superclasses, a model and a scorer."""
    folder = tmp_path_factory.mktemp("photos")
    for k, name in enumerate(SUBJECTS):
        for number in range(2):
            photo(folder / "data" / name / f"{number}.png", 10 * k + number)
    (folder / "data" / "protocol.yaml").write_text(PROTOCOL)
    for number in range(2):
        photo(folder / "prior" / f"{number}.png", 100 + number)
    tiny_pipeline_folder(folder)
    make_scorer(folder / "scorer")
    return folder


def words(home: Path, *further: str, **others: Any) -> list[str]:
    changes = [
        "method.steps=2",
        "method.batch_size=1",
        f"backbone.resolution={RESOLUTION}",
        "backbone.covariance.count=20",
        f"backbone.covariance.cache={home}/covariance",
        f"concept.prior={home}/prior",
        *further,
    ]
    given: dict[str, Any] = {
        "world": "photos",
        "data": home / "data",
        "path": home / "pipeline",
        "device": "cpu",
        "workers": os.cpu_count(),  # which share the cores: each has one thread
        "scorer": home / "scorer",
        "concepts": 2,
        "prompts": 1,
        "resamples": 20,
        "runs": home / "runs",
        "changes": f"[{','.join(changes)}]",
        "report": "false",
    }
    return [f"{key}={value}" for key, value in (given | others).items() if value is not None]


def run(home: Path, *changes: str, **others: Any) -> int:
    return run_cli(paper.main, words(home, *changes, **others))


@pytest.fixture(scope="module")
def ran(home: Path) -> Path:
    """Some claims, in this process; the folder of all that was made."""
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(paper, "Pool", Inline)
        assert run(home, only="pareto,one_shot", report="true") == 0
    (root,) = (home / "runs").glob("data-*")
    return root


def test_results_are_as_toyland_s_with_clip_in_the_places_of_its_scores(ran: Path) -> None:
    found = {file.stem: json.loads(file.read_text()) for file in (ran / "small" / "results").glob("*.json")}
    assert {*found} == {"pareto", "one_shot"}
    pareto = found["pareto"]
    assert (pareto["world"], pareto["axes"], pareto["weights"]) == ("photos", ["clip_t", "clip_i"], ran.name[-12:])
    assert "how much more CLIP-I has" in pareto["test"] and "(less 0.005, a twentieth" in pareto["test"]
    assert {"clip_t", "clip_i"} <= pareto["series"][0]["settings"][0]["scores"].keys()
    assert not {"identity", "prompt"} & pareto["series"][0]["settings"][0]["scores"].keys()
    drawn = pareto["protocol"]
    assert (drawn["scheduler"], drawn["steps"], drawn["guidance"], drawn["seeds"]) == ("DDIMScheduler", 1, 6.0, [0])
    assert [one["name"] for one in drawn["concepts"]] == ["rex", "old mug"]
    assert [series["label"] for series in found["one_shot"]["series"]] == ["1 picture", "all pictures", "base"]
    assert {*found["one_shot"]["runs"]} == {"perfusion", "perfusion, 1 picture"}
    (decisive,) = (check for check in found["one_shot"]["checks"] if check["decides"])
    assert decisive["expected"] == "below 0.0125" and "CLIP-T lost" in decisive["what"]


def test_published_numbers_stand_beside_and_are_not_judged(ran: Path) -> None:
    found = json.loads((ran / "small" / "results" / "pareto.json").read_text())
    reported = {row["method"]: row["scores"] for row in found["published"] if row["concepts"] == 47}
    assert reported["perfusion"] == {"clip_t": 0.273, "clip_i": 0.691} and len(reported) == 4
    assert not json.loads((ran / "small" / "results" / "one_shot.json").read_text())["published"]
    page = (ran / "small" / "docs" / "results.md").read_text()
    assert (
        page.startswith("# Results on photos") and "| Perfusion, published | 47 subjects, ViT-B/32 (a published" in page
    )
    assert "Toyland" not in page and "](images/results/pareto.png)" in page and "pareto-clip" not in page
    table = (ran / "small" / "results" / "pareto.tex").read_text()
    assert r"Perfusion (published) & 47 subjects, ViT-B/32 & 47 & -- & 0.691 & 0.273" in table and r"\toprule" in table
    assert (ran / "small" / "docs" / "images" / "results" / "pareto.png").is_file()
    assert "The paper&#x27;s claims on photos" in (ran / "report" / "index.html").read_text()[:1000]


def test_runs_and_pictures_are_of_the_photos(ran: Path, home: Path) -> None:
    configs = [read_config(run / "config.yaml") for run in (ran / "trained").iterdir() if RunFolder(run).finished]
    assert len(configs) == 2 * 6, "five methods on all photos, and one on the first"
    perfusion = [config for config in configs if config.method["name"] == "perfusion"]
    images = {config.concept.images for config in perfusion if config.concept.name == "rex"}
    assert images == {str(home / "data" / "rex"), str(home / "data" / "rex" / "0.png")}
    assert {config.method["beta"] for config in perfusion} == {0.75}, "the published settings, not Toyland's"
    assert {config.concept.placeholder for config in perfusion} == {"<rex*>", "<old_mug*>"}
    records = [r for file in (ran / "pictures").rglob("manifest.json") for r in read_manifest(file.parent)]
    prompts = {record.concept: record.prompt for record in records if record.method == "base"}
    assert prompts["rex"] == "a dog wearing a hat" and prompts["old mug"] == "a photo of a mug on the beach"
    assert {record.scheduler for record in records} == {"DDIMScheduler"}
    assert {record.backbone for record in records} == {"stable_diffusion"}


def test_neighbours_are_drawn_together(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(paper, "Pool", Inline)
    # Custom Diffusion merges words that differ: in two steps they have to come far.
    assert run(home, "method.embedding_rate=0.5", only="multi_concept", concepts=3, out=home / "pairs") == 0
    found = json.loads((home / "pairs" / "results" / "multi_concept.json").read_text())
    assert found["protocol"]["groups"] == 1, "the third has no neighbour"
    assert [len(series["settings"]) for series in found["series"]] == [6, 3, 3, 1] and not found["published"]
    (root,) = (home / "runs").glob("data-*")
    records = [r for file in (root / "pictures").rglob("manifest.json") for r in read_manifest(file.parent)]
    (both, *_) = (r for r in records if r.concept == "rex + old mug" and r.method == "custom_diffusion")
    assert both.prompt == "a photo of a <rex*> and a <old_mug*>" and both.superclass == "dog + mug"
    assert [*found["runs"]] == ["perfusion", "custom_diffusion", "custom_diffusion, trained together"]


def test_it_says_beforehand_what_it_takes_and_does_nothing_twice(
    ran: Path, home: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(paper, "Pool", Inline)
    before = {file: file.stat().st_mtime_ns for file in (ran / "pictures").rglob("*.png")}
    assert run(home, only="one_shot") == 0
    assert {file: file.stat().st_mtime_ns for file in (ran / "pictures").rglob("*.png")} == before
    said = capsys.readouterr().out
    assert "0 trainings and 0 pictures, of 2 subjects, 1 prompts and 1 seeds; timing a picture" in said
    assert "tasks for one_shot; about 0 minutes" in said

    class Counting(Inline):
        def run(self, tasks: Any, done: Any = None) -> list[str]:
            return ["it is enough"] if tasks[0].kind == "time" else super().run(tasks, done)

    monkeypatch.setattr(paper, "Pool", Counting)
    assert run(home, only="pareto,key_lock", seeds=2, runs=home / "others", prompts=None, concepts=3) == 2
    said = capsys.readouterr()
    assert f"{3 * 6} trainings and {3 * 2 * 2 * (20 + 6)} pictures, of 3 subjects, 2 prompts and 2 seeds" in said.out
    assert "nothing was begun: it is enough" in said.err


def test_dino_is_scored_where_it_is_named(
    ran: Path, home: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    timm = pytest.importorskip("timm")
    make_dino(home / "dino", timm.create_model(DINO, num_classes=0, **DINO_SETTINGS))
    monkeypatch.setattr(paper, "Pool", Inline)
    assert run(home, only="one_shot", dino=home / "dino", out=home / "dino-out") == 0
    found = json.loads((home / "dino-out" / "results" / "one_shot.json").read_text())
    assert "dino" in found["series"][0]["settings"][0]["scores"]
    assert "](images/results/one_shot-dino.png)" in (home / "dino-out" / "docs" / "results.md").read_text()
    assert "& DINO" in (home / "dino-out" / "results" / "one_shot.tex").read_text()
    assert run(home, world="toyland", only="size", out=home / "dino-out", **dict.fromkeys(OF_PHOTOS)) == 2
    assert "out: found results of world=photos there, expected none, or those of toyland" in capsys.readouterr().err


def photos(home: Path, **others: Any) -> Photos:
    given: dict[str, Any] = {"data": str(home / "data"), "path": str(home / "pipeline"), "scorer": "s"}
    return read_photos(PhotoOptions(**(given | others)), 1)


def listed(folder: Path, **entry: Any) -> Path:
    """A data folder laid out like CustomConcept101."""
    photo(folder / "benchmark_dataset" / "pet_cat1" / "1.png", 1)
    (folder / "prompts").mkdir(parents=True)
    (folder / "prompts" / "cat.txt").write_text("Photo of a {}.\n{} in times square. \n\n{} in times square.\n")
    cat = {
        "instance_prompt": "photo of a <new1> cat",
        "class_prompt": "cat",
        "instance_data_dir": "./benchmark_dataset/pet_cat1",
        "class_data_dir": "./regularization/pet_cat",
        "prompt_filename": "prompts/cat.txt",
    }
    (folder / "dataset.json").write_text(json.dumps([cat | entry]))
    return folder


def test_a_list_like_that_of_customconcept101(home: Path, tmp_path: Path) -> None:
    world = photos(home, data=str(listed(tmp_path / "data")))
    (cat,) = world.subjects
    assert (cat.name, cat.superclass, cat.placeholder, cat.count) == ("pet_cat1", "cat", "<pet_cat1*>", 1)
    assert world.templates(cat) == ("Photo of a {}.", "{} in times square."), "each once, without spaces"
    assert len(world.seeds) == 4 and (world.steps, world.guidance, world.protocol) == (50, 6.0, "customconcept101")
    assert {row.concepts for row in world.published} == {47, 101}, "a study's, and the data set's own"


def test_dreambench_s_protocol(home: Path, tmp_path: Path) -> None:
    for name in ("dog6", "teapot", "backpack"):
        photo(tmp_path / name / "00.png", 0)
    world = photos(home, data=str(tmp_path))
    backpack, dog, teapot = world.subjects
    assert (dog.superclass, teapot.superclass, backpack.superclass) == ("dog", "teapot", "backpack")
    assert len(dog.prompts) == len(teapot.prompts) == 25 and len({*dog.prompts} & {*teapot.prompts}) == 15
    assert "a {} in a firefighter outfit" in dog.prompts and "a {} floating in an ocean of milk" in teapot.prompts
    assert world.pairs == ((backpack, dog),) and len(world.templates(backpack, dog)) == 6
    assert {file.stem for file in PROTOCOLS.glob("*.yaml")} == {"study", "dreambench", "customconcept101"}


def test_two_of_one_class_are_no_pair(home: Path, tmp_path: Path) -> None:
    for name in ("cat", "cat2", "dog", "dog2", "dog3"):
        photo(tmp_path / name / "00.png", 0)
    pairs = photos(home, data=str(tmp_path)).pairs
    assert [(one.name, other.name) for one, other in pairs] == [("cat", "dog"), ("cat2", "dog2")]


def test_trainings_that_are_the_same_on_photos_become_one(home: Path, tmp_path: Path) -> None:
    world = photos(home, masks="clipseg")
    assert world.training(FIVE_PICTURES) == world.training(PERFUSION) != world.training(ONE_PICTURE)
    assert world.training(world.training(ONE_PICTURE)) == world.training(ONE_PICTURE)
    unmasked = FIVE_PICTURES.changed("perfusion, 5 pictures, no mask", "method.masked_loss=false")
    assert world.training(unmasked).label == "perfusion, no mask"
    kept = world.training(PERFUSION.changed("perfusion, best step", "callbacks=select"))
    config = config_of(kept, world.subjects[0], tmp_path, words=world.words)
    assert config.callbacks["select"]["scorer"] == "s" and world.training(kept) == kept
    assert (config.concept.masks, config.backbone.name) == ("clipseg", "stable_diffusion")
    assert world.lacks([Setting(unmasked)]) is None and photos(home).lacks([Setting(unmasked)])


def test_a_subject_without_photos(home: Path, tmp_path: Path) -> None:
    (tmp_path / "dog").mkdir()
    with pytest.raises(ConfigError, match=r"data: dog='.*dog': no JPEG, PNG or WebP file there"):
        photos(home, data=str(tmp_path))


def test_mistakes_in_a_list(home: Path, tmp_path: Path) -> None:
    for k, (entry, message) in enumerate(
        [
            ({"class_prompt": ""}, "entry 0: class_prompt: found '', expected text"),
            ({"instance_data_dir": "gone"}, "data: found no folder .*gone, expected the photos of gone"),
            ({"prompt_filename": "gone.txt"}, "prompt_filename: .*gone.txt cannot be read"),
        ]
    ):
        with pytest.raises(ConfigError, match=message):
            photos(home, data=str(listed(tmp_path / str(k), **entry)))
    file = listed(tmp_path / "places") / "prompts" / "cat.txt"
    file.write_text("{0} and {1}\n")
    with pytest.raises(ConfigError, match=re.escape("found the prompt '{0} and {1}', expected 1 {} in it")):
        photos(home, data=str(tmp_path / "places"))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[a]", "expected the keys based_on, classes"),
        ("classes: {rex: dog}\nprompt: {}", "prompt: unknown key; did you mean 'prompts'"),
        ("based_on: nothing", "protocol: found 'nothing', expected one of customconcept101"),
        ("based_on: study", "mine.yaml has neither classes and listed_in, expected one"),
        ("classes: {rex: dog, old mug: mug, tiger: cat}", "prompts.object: found None, expected the prompts of a dog"),
        ("based_on: study\nlisted_in: none.json", "none.json is not readable as JSON"),
    ],
)
def test_mistakes_in_a_protocol(text: str, message: str, home: Path, tmp_path: Path) -> None:
    (tmp_path / "mine.yaml").write_text(text)
    with pytest.raises(ConfigError, match=message):
        photos(home, protocol=str(tmp_path / "mine.yaml"))


def test_a_model_that_cannot_be_loaded_is_found_before_anything_begins(
    home: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(home, only="one_shot", scorer="ViT-B-3200", workers=1, runs=home / "broken") == 2
    assert "nothing was begun: time a picture of the base model: scorer 'ViT-B-3200'" in capsys.readouterr().err
    assert not list((home / "broken").rglob("*.png"))
