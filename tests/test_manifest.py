"""What is written about pictures can be read back, and what others wrote is checked."""

import dataclasses
import json
from pathlib import Path

import pytest
from PIL import Image

from perfusion.manifest import ImageRecord, ManifestError, known_records, read_manifest, save_png, write_manifest

FULL = ImageRecord(
    file="a.png", prompt="a photo of <chat très mignon*> 猫", seed=2**63, concept="chat", concept_hash="0123456789ab",
    placeholder="<chat*>", superclass="cat", method="perfusion", backbone="toyland",
    dials={"beta": 0.65, "tau": 0.15, "key_lock": "local"}, scheduler="DDIMScheduler", steps=50, guidance=4.0,
    setting="trained 200 steps", instance=16, negative_prompt="blurry", width=64, height=128,
    loras="style.safetensors 0.8", embeddings="<style>",
)  # fmt: skip
PICTURE = Image.new("RGB", (3, 2), (10, 20, 30))


def write(folder: Path, content: object) -> None:
    (folder / "manifest.json").write_text(content if isinstance(content, str) else json.dumps(content))


def test_a_record_survives_in_the_manifest_and_in_the_picture(tmp_path: Path) -> None:
    bare = ImageRecord(file="sub/b.png", prompt="a cat")
    (tmp_path / "sub").mkdir()
    for record in (FULL, bare):
        save_png(tmp_path, PICTURE, record)
    assert write_manifest(tmp_path, [FULL, bare]) == tmp_path / "manifest.json"
    assert read_manifest(tmp_path) == known_records(tmp_path) == [FULL, bare]
    with Image.open(tmp_path / "a.png") as image:
        assert image.tobytes() == PICTURE.tobytes()
        known = {**dataclasses.asdict(FULL), **FULL.dials}
        expected = {k: str(v) for k, v in known.items() if k not in ("file", "dials") and v is not None}
        assert image.text == expected
    with Image.open(tmp_path / "sub" / "b.png") as image:
        assert image.text == {"prompt": "a cat"}, "what is not known is not written"
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a.png", "manifest.json", "sub"], "no temporary file stays"


def test_a_manifest_of_another_tool_needs_file_and_prompt_only(tmp_path: Path) -> None:
    (tmp_path / "x.jpg").touch()
    write(tmp_path, [{"file": "x.jpg", "prompt": "a cat", "beta": 1, "seed": None}])
    assert read_manifest(tmp_path) == [ImageRecord("x.jpg", "a cat", dials={"beta": 1})]


def test_pictures_that_are_gone(tmp_path: Path) -> None:
    assert known_records(tmp_path) == []
    save_png(tmp_path, PICTURE, FULL)
    write_manifest(tmp_path, [FULL, dataclasses.replace(FULL, file="gone.png")])
    assert known_records(tmp_path) == [FULL]
    with pytest.raises(ManifestError, match=r"manifest.json: names 'gone.png', but there is no such file"):
        read_manifest(tmp_path)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("[{", "not readable as JSON"),
        ({"file": "a.png"}, "found an object, expected a list of objects"),
        (["a.png"], "entry 0: found text, expected an object"),
        ([{"file": "a.png"}], "entry 0: 'prompt' is missing or empty"),
        ([{"file": "a.png", "prompt": ""}], "'prompt' is missing or empty"),
        ([{"file": "a.png", "prompt": "x", "sead": 1}], r"unknown key 'sead'; did you mean 'seed'\? Known: file, "),
        ([{"file": "a.png", "prompt": "x", "beta": [0.5]}], r"beta: found \[0.5\], expected a finite number or text"),
        ([{"file": "a.png", "prompt": "x", "seed": "1"}], "seed: found '1', expected a whole number or null"),
        ([{"file": "a.png", "prompt": "x", "seed": True}], "seed: found True"),
        ([{"file": "a.png", "prompt": "x", "seed": 0.5}], "seed: found 0.5"),
        (
            '[{"file": "a.png", "prompt": "x", "guidance": NaN}]',
            "guidance: found nan, expected a finite number or null",
        ),
        ([{"file": "a.png", "prompt": "x"}] * 2, "'a.png' is there twice"),
        ([{"file": "../a.png", "prompt": "x"}], "expected one inside of the manifest's folder"),
        ([{"file": "b/../../a.png", "prompt": "x"}], "expected one inside of the manifest's folder"),
        ([{"file": "/etc/passwd", "prompt": "x"}], "expected one inside of the manifest's folder"),
    ],
)
def test_a_manifest_that_cannot_be_used(tmp_path: Path, content: object, message: str) -> None:
    (tmp_path / "a.png").touch()
    write(tmp_path, content)
    for reader in (read_manifest, known_records):
        with pytest.raises(ManifestError, match=message):
            reader(tmp_path)


def test_no_manifest(tmp_path: Path) -> None:
    with pytest.raises(ManifestError, match=r"manifest\.json: no such file"):
        read_manifest(tmp_path)
