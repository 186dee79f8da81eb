"""Which pictures are meant, what is known of each, and what they are held against."""

from __future__ import annotations

from pathlib import Path

import pytest

from eval.folders import (
    DRAWN,
    Base,
    References,
    find_folders,
    plain_prompt,
    read_folder,
    same_prompt,
    setting_of,
    shows_concept,
)
from eval.record import ScoreError
from perfusion.config import ConceptConfig, ToylandConcept, TrainConfig
from perfusion.data.images import ConceptImageError
from perfusion.manifest import ImageRecord
from perfusion.training.module import examples_of
from perfusion.training.run_folder import RunFolder
from tests.scored import folder, noise, record


def test_every_manifest_below_a_folder_is_found(tmp_path: Path):
    for name in ("a/x", "a/y", "b"):
        folder(tmp_path / name, [record("0.png")])
    assert find_folders(str(tmp_path / "a")) == [tmp_path / "a" / "x", tmp_path / "a" / "y"]
    assert find_folders([str(tmp_path / "b"), str(tmp_path)]) == [tmp_path / "b", tmp_path / "a/x", tmp_path / "a/y"]
    (tmp_path / "empty").mkdir()
    for spec, message in (
        (str(tmp_path / "none"), "images=.*none: no such folder"),
        (str(tmp_path / "empty"), r"images=.*empty: no manifest\.json there"),
        ([], r"images: found \[\], expected a folder"),
        (None, "images: found None, expected a folder"),
    ):
        with pytest.raises(ScoreError, match=message):
            find_folders(spec)


def test_the_command_line_fills_what_the_manifest_leaves_open(tmp_path: Path):
    bare = ImageRecord("0.png", "a photo of sks")
    path = folder(tmp_path / "my_lora", [bare, record("1.png", method="perfusion", setting="x")])
    said = {"concept": "dog", "superclass": "dog", "placeholder": "sks", "setting": "rank 8"}
    first, second = read_folder(path, **said).records
    assert first == ImageRecord("0.png", "a photo of sks", None, "dog", None, "sks", "dog", "my_lora", setting="rank 8")
    assert (second.method, second.concept, second.setting) == ("perfusion", "cat", "x")
    assert plain_prompt(first) == "a photo of dog"
    with pytest.raises(ScoreError, match=r"manifest\.json: 0\.png: which concept is it\?"):
        read_folder(path)
    with pytest.raises(ScoreError, match="has the placeholder 'sks', expected its superclass, too"):
        read_folder(path, concept="dog", placeholder="sks")
    two = folder(tmp_path / "two", [record("0.png", placeholder="<cat*> + <dog*>")])
    with pytest.raises(ScoreError, match=r"found concept 'cat', placeholder .* expected as many of each"):
        read_folder(two)


def test_prompts_name_concepts_or_do_not():
    both = record("0", "<cat*> and <dog*>", placeholder="<cat*> + <dog*>", superclass="cat + dog", concept="cat + dog")
    assert plain_prompt(both) == "cat and dog" and shows_concept(both)
    assert not shows_concept(record("0", "a photo of a mug"))
    assert shows_concept(ImageRecord("0", "anything")), "taken for granted where the placeholder is not known"


def test_what_sets_pictures_apart():
    one = record("0", beta=0.4, tau=0.1, key_lock="local", scale=0.5, steps=50, guidance=4.0, setting="x", instance=3)
    told = {"beta": 0.4, "tau": 0.1, "key_lock": "local", "scale": 0.5, "steps": 50, "guidance": 4.0, "setting": "x"}
    assert setting_of(one) == told
    given = [
        record("0", seed=0), record("1", seed=1), record("2", seed=2, beta=0.1), record("3", "other <cat*>"),
        record("4", concept_hash="x"), record("5", seed=3), record("6", concept="dog"), record("7", method="lora"),
    ]  # fmt: skip
    assert list(same_prompt(given)) == [(0, 1), (0, 5), (1, 5)]


# --- references -------------------------------------------------------------------------------------------------------


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    for k, name in enumerate(("cat", "dog")):
        (tmp_path / "photos" / name).mkdir(parents=True)
        for i in range(2):
            noise(10 * k + i).save(tmp_path / "photos" / name / f"{i}.png")
    return tmp_path / "photos"


def target(tmp_path: Path, references: References, **known):
    if not (tmp_path / "made").exists():
        folder(tmp_path / "made", [record("0.png", **known)])
    read = read_folder(tmp_path / "made")
    return references.targets(read, read.records[0])


def test_references_of_each_concept(tmp_path: Path, photos: Path):
    cat, dog = (tuple(noise(10 * k + i).tobytes() for i in range(2)) for k in (0, 1))
    both = {"concept": "cat + dog", "placeholder": "<cat*> + <dog*>", "superclass": "cat + dog"}
    for spec in (str(photos), {"cat": str(photos / "cat"), "dog": [str(photos / "dog" / "*.png")]}):
        references = References(spec)
        found = target(tmp_path, references, **both)
        assert [tuple(i.tobytes() for i in t.images) for t in found] == [cat, dog]
        assert found[0].digest != found[1].digest and found[0].instance is None
        assert references.shown.keys() == {"cat", "dog"}


def test_one_folder_of_references_is_of_one_concept(tmp_path: Path, photos: Path):
    references = References(str(photos / "cat"))
    made = read_folder(folder(tmp_path / "a", [record("0.png"), record("1.png", concept="dog")]))
    (first,) = references.targets(made, made.records[0])
    assert len(first.images) == 2
    with pytest.raises(ScoreError, match=r"pictures of 'cat' and of 'dog'\? Expected a sub-folder for each"):
        references.targets(made, made.records[1])


def drawn(superclass: str, instance: int, count: int) -> list[bytes]:
    concept = ConceptConfig("x", superclass, "<x>", toyland=ToylandConcept(instance, count))
    return [image.tobytes() for image in examples_of(concept, 64).pictures()]


def test_a_known_toy_is_drawn(tmp_path: Path):
    for k, (references, known) in enumerate(
        ((References(instance=3), {}), (References(instance={"cat": 3}), {}), (References(), {"instance": 3}),
         (References(instance=99), {"instance": 3}))
    ):  # fmt: skip
        (found,) = target(tmp_path / str(k), references, **known)
        assert [i.tobytes() for i in found.images] == drawn("cat", 3, DRAWN) and found.instance == 3


def test_references_of_the_run_that_the_folder_lies_in(tmp_path: Path, photos: Path):
    config = TrainConfig(concept=ConceptConfig("cat", "cat", "<cat*>", toyland=ToylandConcept(7, 2)))
    config.backbone.name = "toyland"
    config.run.dir, config.backbone.resolution = str(tmp_path), 32
    RunFolder.of(config).begin(config)
    (found,) = target(tmp_path, References())
    assert found.instance == 7 and [i.tobytes() for i in found.images] == drawn("cat", 7, DRAWN)
    (found,) = target(tmp_path, References(str(photos)))
    assert found.instance == 7 and found.images[0].tobytes() == noise(0).tobytes()
    (tmp_path / "config.yaml").unlink()
    config.concept.images = str(photos / "dog")
    RunFolder.of(config).begin(config)
    (found,) = target(tmp_path, References())
    assert found.instance is None and [i.tobytes() for i in found.images] == [noise(10).tobytes(), noise(11).tobytes()]


def test_what_is_missing_is_asked_for(tmp_path: Path, photos: Path):
    with pytest.raises(ScoreError, match=r"nothing to hold pictures of 'cat' against\. Give references="):
        target(tmp_path, References())
    with pytest.raises(ScoreError, match="references: found pictures of dog, expected 'cat', too"):
        target(tmp_path, References({"dog": str(photos)}))
    with pytest.raises(ConceptImageError, match="references='nowhere': no such file or folder"):
        target(tmp_path, References("nowhere"))
    for wrong in ("16", True, {"cat": "16"}, [16]):
        with pytest.raises(ScoreError, match="instance: found"):
            References(instance=wrong)
    with pytest.raises(ScoreError, match="references: found 3"):
        References(3)
    bare = read_folder(folder(tmp_path / "b", [ImageRecord("0.png", "x", concept="cat")]))
    with pytest.raises(ScoreError, match=r"instance=3 of which superclass\? Give superclass"):
        References(instance=3).targets(bare, bare.records[0])


def test_the_base_models_pictures_are_found_by_prompt_and_seed(tmp_path: Path):
    made = [record("0.png", "a dog", 3), record("1.png", "a dog", 4)]
    base = Base(read_folder(folder(tmp_path / "base", made)))
    assert base.file(record("x.png", "a dog", 4)) == tmp_path / "base" / "1.png"
    with pytest.raises(ScoreError, match=r"base=.*base: has no picture of 'a cat' with seed 3"):
        base.file(record("x.png", "a cat", 3))
    twice = folder(tmp_path / "twice", [record("0.png", "a dog", 3), record("1.png", "a dog", 3)])
    with pytest.raises(ScoreError, match=r"base=.*twice: has two pictures of 'a dog' with seed 3"):
        Base(read_folder(twice))
