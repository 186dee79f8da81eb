"""Records of scores: what is written can be read where it was moved to, and what cannot be used is refused."""

import json
from pathlib import Path

import pytest

from eval.record import (
    Picture,
    Point,
    ScoreError,
    merged,
    read_all,
    read_scores,
    setting_labels,
    setting_order,
    write_scores,
)


def point(folder: Path, name: str = "a", beta: float = 0.4, **kwargs) -> Point:
    pictures = (
        Picture(folder / f"{name}0.png", "a <cat*>", 0, "abc", {"clip_i": 0.5, "clip_t": 0.25}),
        Picture(folder / f"{name}1.png", "a <cat*>", None, None, {"drift": 0.125}),
    )
    given = {"method": "perfusion", "concept": "cat", "setting": {"beta": beta}, "pictures": pictures}
    return Point(**{**given, "pairs": ((0, 1, 0.75),), **kwargs})


def test_a_record_survives_and_may_be_moved(tmp_path: Path):
    old, new = tmp_path / "old", tmp_path / "new"
    (old / "images").mkdir(parents=True)
    write_scores(old / "scores.json", {"scorer": {"clip": "x"}}, [(point(old / "images"), {"images": 2})])
    assert read_scores(old / "scores.json") == ({"version": 1, "scorer": {"clip": "x"}}, [point(old / "images")])
    old.rename(new)
    assert read_scores(new / "scores.json")[1] == [point(new / "images")]


def test_points_of_several_folders_become_one(tmp_path: Path):
    a, b, other = point(tmp_path, "a"), point(tmp_path, "b"), point(tmp_path, "c", beta=0.3)
    first, second = merged([a, b, a, other])
    assert (first.setting, second.setting) == ({"beta": 0.3}, {"beta": 0.4})
    assert second.pictures == a.pictures + b.pictures and second.pairs == ((0, 1, 0.75), (2, 3, 0.75))
    shared = point(tmp_path, pictures=(a.pictures[0], b.pictures[0]))
    with pytest.raises(ScoreError, match=r"a0\.png: is in two points of perfusion, cat"):
        merged([a, shared])


def test_settings_are_called_by_what_differs():
    settings = [{"beta": 0.3, "tau": 0.1, "key_lock": "local"}, {"beta": 0.25, "tau": 0.1, "key_lock": "global"}]
    assert setting_labels(settings) == ["β 0.3, key_lock local", "β 0.25, key_lock global"]
    assert setting_labels(settings[:1]) == [""]
    assert setting_labels([{"setting": "rank 4"}, {"setting": "rank 8", "steps": 50}]) == ["rank 4", "50 steps, rank 8"]


def test_settings_are_in_order():
    texts = ["rank 4", "rank 16", "rank 128"]
    given = [{"beta": 0.5}, {"beta": 0.25}, {"beta": "0.4 + 0.6"}, {}, *({"setting": t} for t in texts[::-1])]
    found = sorted(given, key=lambda setting: setting_order(setting, ["beta", "setting"]))
    assert found == [{}, *({"setting": t} for t in texts), {"beta": 0.25}, {"beta": 0.5}, {"beta": "0.4 + 0.6"}]


def test_several_records_are_read_as_one(tmp_path: Path):
    for name, beta in (("a", 0.1), ("b", 0.2)):
        document = {"scorer": {"clip": "x"}, "references": {name: ["data:"]}}
        write_scores(tmp_path / f"{name}.json", document, [(point(tmp_path, name, beta), {})])
    document, points = read_all([str(tmp_path / "a.json"), str(tmp_path / "b.json")])
    assert [p.setting["beta"] for p in points] == [0.1, 0.2]
    assert document["references"] == {"a": ["data:"], "b": ["data:"]}
    write_scores(tmp_path / "b.json", {"scorer": {"clip": "y"}}, [(point(tmp_path, "b"), {})])
    with pytest.raises(ScoreError, match=r"b\.json: scored with \{'clip': 'y'\}, but .*a\.json with \{'clip': 'x'\}"):
        read_all([str(tmp_path / "a.json"), str(tmp_path / "b.json")])
    write_scores(tmp_path / "c.json", {}, [])
    with pytest.raises(ScoreError, match="found no scored picture"):
        read_all(str(tmp_path / "c.json"))
    for wrong in (None, [], [3], ""):
        with pytest.raises(ScoreError, match=r"scores: found .*, expected a score file"):
            read_all(wrong)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", "not readable as JSON"),
        ("[]", "no record of scores"),
        ({"version": 1}, "no record of scores"),
        ({"version": 2, "points": []}, "found version 2, expected 1"),
        ({"version": 1, "points": [{"method": "m"}]}, "damaged record of scores"),
        ({"version": 1, "points": 3}, "damaged record of scores"),
    ],
)
def test_records_that_cannot_be_used(tmp_path: Path, content: object, message: str):
    (tmp_path / "x.json").write_text(content if isinstance(content, str) else json.dumps(content))
    with pytest.raises(ScoreError, match=rf"x\.json: {message}"):
        read_scores(tmp_path / "x.json")
    with pytest.raises(ScoreError, match=r"none\.json: found no such file"):
        read_scores(tmp_path / "none.json")
