"""Pictures in CustomConcept101's layout get a manifest."""

import json
from pathlib import Path

import pytest

from eval.convert import main
from eval.record import ScoreError
from perfusion.data.images import ConceptImageError
from perfusion.manifest import ImageRecord, read_manifest
from tests.scored import noise


@pytest.fixture
def root(tmp_path: Path) -> Path:
    (tmp_path / "samples").mkdir()
    for k in (0, 1, 10):
        noise(k).save(tmp_path / "samples" / f"{k:05d}.{'jpg' if k else 'png'}")
    prompts = {"00000": "<new1> cat in snow", "00001": "<new1> cat in snow", "00010": "a <new1> cat, sketched"}
    (tmp_path / "prompts.json").write_text(json.dumps(prompts))
    return tmp_path


def words(root: Path, *more: str) -> list[str]:
    return [f"root={root}", "method=custom_diffusion", "concept=pet_cat1", *more]


def test_the_layout_becomes_a_manifest(root: Path, capsys: pytest.CaptureFixture):
    main(words(root, "superclass=cat", "placeholder=<new1> cat", "setting=rate 8e-5", "steps=200", "guidance=6"))
    known = {"superclass": "cat", "placeholder": "<new1> cat", "method": "custom_diffusion", "concept": "pet_cat1"}
    known |= {"setting": "rate 8e-5", "steps": 200, "guidance": 6.0}
    assert read_manifest(root) == [
        ImageRecord("samples/00000.png", "<new1> cat in snow", **known),
        ImageRecord("samples/00001.jpg", "<new1> cat in snow", **known),
        ImageRecord("samples/00010.jpg", "a <new1> cat, sketched", **known),
    ]
    assert "manifest.json (3 pictures of 2 prompts)" in capsys.readouterr().out


def test_a_manifest_is_not_written_over_unasked(root: Path):
    main(words(root))
    with pytest.raises(ScoreError, match=r"manifest\.json: is there already; overwrite=true"):
        main(words(root))
    main(words(root, "overwrite=true", "setting=again"))
    assert {record.setting for record in read_manifest(root)} == {"again"}


def test_what_does_not_fit_is_named(root: Path):
    with pytest.raises(ScoreError, match="no prompt has the placeholder 'sks'"):
        main(words(root, "placeholder=sks", "superclass=cat"))
    with pytest.raises(ScoreError, match="expected both or neither"):
        main(words(root, "placeholder=<new1>"))
    noise(3).save(root / "samples" / "00003.png")
    with pytest.raises(ScoreError, match=r"no prompt in prompts\.json for the pictures 00003 \(1 in all\)"):
        main(words(root))
    (root / "samples" / "00003.png").unlink()
    (root / "samples" / "00000.png").unlink()
    with pytest.raises(ScoreError, match=r"no picture .* for the prompts of 00000 \(1 in all\)"):
        main(words(root))
    for content, message in (("[]", "expected an object"), ('{"a": 3}', "expected an object"), ("{", "not readable")):
        (root / "prompts.json").write_text(content)
        with pytest.raises(ScoreError, match=message):
            main(words(root))
    (root / "prompts.json").unlink()
    with pytest.raises(ScoreError, match=r"prompts\.json: no such file"):
        main(words(root))


def test_without_pictures(tmp_path: Path):
    (tmp_path / "prompts.json").write_text('{"a": "b"}')
    with pytest.raises(ScoreError, match="expected the pictures in samples/, found no such folder"):
        main(words(tmp_path))
    (tmp_path / "samples").mkdir()
    with pytest.raises(ConceptImageError, match="no JPEG, PNG or WebP file there"):
        main(words(tmp_path))
    assert not (tmp_path / "manifest.json").exists()
