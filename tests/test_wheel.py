"""What is built of this project does its main job outside a checkout."""

from __future__ import annotations

import os
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
_NO_INDEX = ("Failed to fetch", "error sending request", "dns error", "uv is missing and could not be installed")


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The files of the wheel, as an installation lays them out."""
    folder = tmp_path_factory.mktemp("wheel")
    build = [str(ROOT / "tools" / "uv"), "build", "--wheel", "--quiet", "--out-dir", str(folder), str(ROOT)]
    done = subprocess.run(build, capture_output=True, text=True)
    if done.returncode and any(words in done.stderr for words in _NO_INDEX):
        pytest.skip("needs a package index, for uv and hatchling")
    assert done.returncode == 0, done.stderr
    (wheel,) = folder.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(folder / "site")
    return folder / "site"


@pytest.mark.slow
def test_it_has_what_people_expect_of_a_package(installed: Path) -> None:
    assert (installed / "perfusion" / "py.typed").is_file() and (installed / "perfusion" / "conf").is_dir()
    assert not (installed / "perfusion" / "toyland" / "build").exists() and not (installed / "tests").exists()
    (points,) = installed.glob("perfusion-*.dist-info/entry_points.txt")
    assert "perfusion = perfusion.__main__:console" in points.read_text()


@pytest.mark.slow
def test_it_teaches_and_draws_a_cat(installed: Path, tmp_path: Path) -> None:
    environment = {**os.environ, "PYTHONPATH": str(installed)}

    def run(*words: str) -> str:
        done = subprocess.run(
            [sys.executable, *words], cwd=tmp_path, env=environment, capture_output=True, text=True
        )  # fmt: skip
        assert done.returncode == 0, done.stderr
        assert "Warning" not in done.stderr, "what libraries say to developers is not for users"
        return done.stdout

    assert Path(run("-c", "import perfusion; print(perfusion.__file__)").strip()).is_relative_to(installed)
    run("-m", "perfusion", "train", "+experiment=cat_oneshot", "method.steps=2", "callbacks=none", "run.dir=run")
    prompt = "prompt=a photo of <cat*> on the beach"
    run("-m", "perfusion", "generate", "concept=run", prompt, "num=1", "steps=2", "out=out")
    assert len([*(tmp_path / "out").glob("a-photo-of-cat*.png")]) == 1
    assert "<cat*>" in run("-m", "perfusion", "inspect", "run/concept.safetensors")
