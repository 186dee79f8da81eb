"""`python -m eval.score` from folders to the record, against the definitions written out."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from eval import folder_scores
from eval.record import ScoreError, read_scores
from eval.score import main, table
from perfusion.cli import run_cli
from perfusion.manifest import ImageRecord, write_manifest
from perfusion.scoring.clip import ClipScorer, ScorerError
from perfusion.scoring.metrics import clip_scores
from perfusion.toyland.reader import Reader
from tests.scored import folder, noise, record
from tests.scorers import make_scorer


@pytest.fixture(scope="module")
def scorer(tmp_path_factory: pytest.TempPathFactory) -> str:
    return make_scorer(tmp_path_factory.mktemp("scorer") / "model", seed=10).removeprefix("local-dir:")


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    for k, name in enumerate(("cat", "dog")):
        Path("photos", name).mkdir(parents=True)
        for i in range(2):
            noise(1000 + 10 * k + i).save(Path("photos", name, f"{i}.png"))
    return tmp_path


@pytest.fixture
def run(here: Path, scorer: str):
    """Scores `images` with the tiny model, and gives the record that was written."""

    def score(*words: str, **changed: str) -> dict:
        given = {"images": "images", "references": "photos", "scorer": scorer, "cache": "cache", "resamples": "50"}
        main([*(f"{key}={value}" for key, value in {**given, **changed}.items() if value), "progress=false", *words])
        return json.loads(Path("scores.json").read_text())

    return score


def open_all(files: list[Path]) -> list[Image.Image]:
    return [Image.open(file) for file in files]


def test_one_folder_scores_what_the_definitions_say(run, scorer: str) -> None:
    prompts = ["a photo of <cat*> on the beach", "<cat*> in the snow"]
    records = [record(f"{p}{s}.png", prompt, s, beta=0.4) for p, prompt in enumerate(prompts) for s in (0, 1)]
    folder(Path("images"), records)
    (point,) = run()["points"]
    assert [point[key] for key in ("method", "concept", "setting", "images")] == ["perfusion", "cat", {"beta": 0.4}, 4]
    clip = ClipScorer(scorer)
    seen = clip.image_embeddings(open_all([Path("images", r.file) for r in records])).double()
    wanted = clip.image_embeddings(open_all(sorted(Path("photos/cat").iterdir()))).double()
    texts = clip.text_embeddings([r.prompt.replace("<cat*>", "cat") for r in records]).double()
    for name, value in clip_scores(seen, wanted, texts).items():
        assert point["scores"][name]["mean"] == pytest.approx(value, abs=1e-6)
    cosines = (seen * texts).sum(1)
    scaled = (2.5 * cosines.clamp_min(0)).mean().item()
    assert point["scores"]["clip_t_scaled"]["mean"] == pytest.approx(scaled, abs=1e-6)
    apart = 1 - (seen[[0, 2]] * seen[[1, 3]]).sum(1)
    assert point["scores"]["diversity"]["mean"] == pytest.approx(apart.mean().item(), abs=1e-6)
    assert [[i, j] for i, j, _ in point["pairs"]] == [[0, 1], [2, 3]]
    assert [row["prompt"] for row in point["prompts"]] == prompts
    assert [p["scores"]["clip_t"] for p in point["pictures"]] == pytest.approx(cosines.tolist(), abs=1e-6)
    low, high = (point["scores"]["clip_i"][end] for end in ("low", "high"))
    assert low <= point["scores"]["clip_i"]["mean"] <= high and low < high
    assert set(point["scores"]) == {"clip_i", "clip_t", "clip_t_scaled", "harmonic", "diversity"}


def test_a_sweep_is_one_table(run, capsys: pytest.CaptureFixture) -> None:
    for method, betas in (("perfusion", (0.3, 0.5)), ("lora", (None,))):
        for concept in ("cat", "dog"):
            known = {"method": method, "concept": concept, "placeholder": f"<{concept}*>", "superclass": concept}
            records = [
                record(f"{beta}-{s}.png", f"a <{concept}*>", s, beta=beta, **known) for beta in betas for s in (0, 1)
            ]
            folder(Path("images", method, concept), records, first=len(method) * 40 + len(betas) * 20)
    content = run()
    assert [(s["method"], s["setting"], s["concepts"], s["images"]) for s in content["summary"]] == [
        ("lora", {}, ["cat", "dog"], 4),
        ("perfusion", {"beta": 0.3}, ["cat", "dog"], 4),
        ("perfusion", {"beta": 0.5}, ["cat", "dog"], 4),
    ]
    both = [p["scores"]["clip_i"]["mean"] for p in content["points"] if p["setting"] == {"beta": 0.3}]
    assert content["summary"][1]["scores"]["clip_i"]["mean"] == pytest.approx(np.mean(both), abs=1e-6)
    said = capsys.readouterr().out
    assert "folders: 4, of which 0 had been measured before" in said and "scores: scores.json" in said
    names = [line.split("  ")[0] for line in said.splitlines()[1:5]]
    assert names == ["method", "lora", "perfusion, β 0.3", "perfusion, β 0.5"]
    assert set(content["references"]) == {"cat", "dog"}
    assert all(uri.startswith("data:image/webp") for uri in content["references"]["cat"])


def test_only_what_changed_is_measured_again(run, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture):
    for name in "ab":
        folder(Path("images", name), [record("0.png", beta=0.1), record("1.png", seed=1, beta=0.1)], ord(name))
    measured: list[str] = []
    true = folder_scores._scored

    def count(folder, *rest):
        measured.append(folder.path.name)
        return true(folder, *rest)

    monkeypatch.setattr(folder_scores, "_scored", count)
    first = run()
    assert measured == ["a", "b"]
    again = run()
    assert measured == ["a", "b"] and again["points"] == first["points"]
    assert "of which 2 had been measured before" in capsys.readouterr().out
    noise(99).save("images/a/1.png")
    assert run()["points"] != first["points"] and measured.pop() == "a"
    write_manifest("images/b", [record("0.png", beta=0.1), record("1.png", "another <cat*>", 1, beta=0.1)])
    run()
    assert measured.pop() == "b"
    noise(98).save("photos/cat/0.png")
    run()
    assert sorted(measured[-2:]) == ["a", "b"], "the references changed"
    count_before = len(measured)
    for file in Path("cache").iterdir():
        file.write_text("{")
    run()
    assert len(measured) == count_before + 2, "what cannot be read is measured again"


def test_pictures_of_another_tool(run) -> None:
    folder(Path("theirs"), [ImageRecord("0.png", "a sks toy in snow"), ImageRecord("1.png", "a sks toy in snow")])
    folder(Path("images"), [record("0.png", "a <cat*> in snow", beta=0.4)], first=50)
    words = ("method=dreambooth", "concept=cat", "superclass=cat", "placeholder=sks toy", "setting=800 steps")
    content = run(*words, images="[theirs, images]")
    theirs, ours = content["points"]
    assert (theirs["method"], theirs["setting"]) == ("dreambooth", {"setting": "800 steps"})
    assert (ours["method"], ours["setting"]) == ("perfusion", {"beta": 0.4, "setting": "800 steps"})
    alike = run(images="images")["points"][0]
    folder(Path("same"), [ImageRecord("0.png", "a sks toy in snow")], first=50)
    (same,) = run(*words, images="same")["points"]
    assert same["scores"]["clip_t"] == alike["scores"]["clip_t"], "the superclass took the placeholder's place"


def test_drift_of_prompts_without_the_concept(run, scorer: str, capsys: pytest.CaptureFixture) -> None:
    records = [record("0.png", "a <cat*>"), record("1.png", "a dog", 5), record("2.png", "a dog", 6)]
    folder(Path("images"), records, first=0)
    (point,) = run()["points"]
    assert len(point["pictures"]) == 1, "without a base, only the concept's picture counts"
    assert "not scored: 2 pictures whose prompt does not name the concept" in capsys.readouterr().out
    base = [ImageRecord("x.png", "a dog", 6), ImageRecord("y.png", "a dog", 5)]
    folder(Path("base"), base, first=20)
    (point,) = run(base="base")["points"]
    clip = ClipScorer(scorer)
    pairs = [("images/1.png", "base/y.png"), ("images/2.png", "base/x.png")]
    after, before = ([Image.open(pair[k]) for pair in pairs] for k in (0, 1))
    cosine = (clip.image_embeddings(after).double() * clip.image_embeddings(before).double()).sum(1)
    assert point["scores"]["drift"]["mean"] == pytest.approx(float((1 - cosine).mean()), abs=1e-6)
    a, b = (np.stack([np.asarray(i, float) / 255 for i in images]) for images in (after, before))
    assert point["scores"]["drift_mse"]["mean"] == pytest.approx(float(((a - b) ** 2).mean()), abs=1e-6)
    assert set(point["pictures"][1]["scores"]) == {"drift", "drift_mse"}


def test_toyland_pictures_are_read_by_the_attribute_reader(run, tmp_path: Path) -> None:
    Reader().save(tmp_path / "reader")
    prompts = ("a <cat*> on the beach", "a <cat*>")
    folder(Path("images"), [record(f"{s}.png", prompt, s, instance=3) for s, prompt in enumerate(prompts)])
    (point,) = run(f"reader={tmp_path / 'reader'}", references="")["points"]
    first, second = (p["scores"] for p in point["pictures"])
    assert {"identity", "prompt", "superclass"} <= first.keys()
    assert {"identity", "superclass"} <= second.keys() and "prompt" not in second
    (without,) = run("reader=none")["points"]
    assert "identity" not in without["scores"]


def test_dino_is_one_more_column(run, monkeypatch: pytest.MonkeyPatch, scorer: str) -> None:
    monkeypatch.setattr("eval.scorers.DinoScorer", ClipScorer)
    folder(Path("images"), [record("0.png"), record("1.png", seed=1)])
    (point,) = run(f"dino={scorer}")["points"]
    assert point["scores"]["dino"] == point["scores"]["clip_i"], "the same model stands for both here"
    content = json.loads(Path("scores.json").read_text())
    assert content["scorer"].keys() == {"clip", "dino"} and content["made_with"]["dino"] == scorer
    with pytest.raises(ScorerError, match=r"dino_pretrained=x: of which model\? Give dino="):
        run("dino_pretrained=x")


def test_two_concepts_in_one_picture(run) -> None:
    both = {"concept": "cat + dog", "placeholder": "<cat*> + <dog*>", "superclass": "cat + dog"}
    folder(Path("images"), [record("0.png", "<cat*> on <dog*>", **both)])
    (point,) = run()["points"]
    alone = []
    for concept in ("cat", "dog"):
        write_manifest("images", [record("0.png", "cat on dog", concept=concept, placeholder=None)])
        (one,) = run()["points"]
        assert one["scores"]["clip_t"] == point["scores"]["clip_t"]
        alone.append(one["scores"]["clip_i"]["mean"])
    assert point["scores"]["clip_i"]["mean"] == pytest.approx(np.mean(alone), abs=1e-6)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["scorer=null"], "scorer: not given, and not all pictures are Toyland's"),
        (["reader=nowhere"], "nowhere: the attribute reader is not there"),
    ],
)
def test_mistakes_are_named(run, capsys: pytest.CaptureFixture, scorer: str, words: list[str], message: str) -> None:
    folder(Path("images"), [record("0.png")])
    given = ["images=images", "references=photos", f"scorer={scorer}", "cache=cache", *words]
    assert run_cli(main, given) == 2
    assert message in capsys.readouterr().err
    assert not Path("scores.json").exists()


def test_nothing_to_score(run) -> None:
    folder(Path("images"), [record("0.png", "a dog")])
    with pytest.raises(ScoreError, match="no prompt names a concept, and base= is not given"):
        run()


def test_the_table_says_what_is_not_there(run) -> None:
    folder(Path("images"), [record("0.png")])
    run()
    _, points = read_scores("scores.json")
    from eval.aggregate import Bootstrap, summarize

    found = summarize(points, Bootstrap(10))
    assert table(found).splitlines()[1].startswith("perfusion  ")
    assert "±" not in table(found), "one picture has no interval"


def test_scores_are_not_lost_where_they_cannot_be_kept(
    run, here: Path, monkeypatch: pytest.MonkeyPatch, caplog
) -> None:
    """A cache that is no folder is named before anything is measured; a disk that is full afterwards costs no score."""
    folder(Path("images"), [record("0.png", "a photo of <cat*>", 0, beta=0.4)])
    Path("file").write_text("x")
    scored = folder_scores._scored
    monkeypatch.setattr(folder_scores, "_scored", lambda *_: pytest.fail("measured"))
    with pytest.raises(OSError, match="file"):
        run(cache="file")
    monkeypatch.setattr(folder_scores, "_scored", scored)

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(folder_scores, "atomic_write_text", full)
    assert run()["points"] and "not kept for the next time" in caplog.text
