"""The picture of everything in Toyland's world."""

from __future__ import annotations

from pathlib import Path

from PIL import Image

from perfusion.cli import run_cli
from perfusion.toyland.build.atlas import main, rows
from perfusion.toyland.world import PATTERNS, PLACES, STYLES, SUPERCLASSES, SUPPORTS, WORN


def test_the_atlas_shows_everything_that_there_is(tmp_path: Path) -> None:
    scenes = [scene for _, row in rows(3) for scene in row]
    placed = [p for scene in scenes for p in scene.objects]
    assert {scene.place for scene in scenes} == {*PLACES}
    assert {scene.style for scene in scenes} == {*STYLES}
    assert {len(scene.objects) for scene in scenes} == {1, 2}
    assert {p.instance.superclass for p in placed} == {*SUPERCLASSES}
    assert {p.instance.pattern for p in placed} == {*PATTERNS}
    assert {p.worn for p in placed} == {*WORN} and {p.support for p in placed} == {*SUPPORTS}
    assert run_cli(main, [f"out={tmp_path / 'world.png'}", "seed=3"]) == 0
    with Image.open(tmp_path / "world.png") as picture:
        assert picture.width > 1900 and picture.height > 1300
