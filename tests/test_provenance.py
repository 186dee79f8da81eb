"""Provenance says what is installed and which commit runs, quickly, and never the commit of somebody else."""

import json
import platform
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path
from types import SimpleNamespace

import pytest

from perfusion import provenance as module
from perfusion.provenance import provenance


def _git(root: Path, *arguments: str) -> str:
    identity = ["-c", "user.name=test", "-c", "user.email=test@example.com", "-c", "commit.gpgsign=false"]
    command = ["git", *identity, "-C", str(root), *arguments]
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()


@pytest.fixture
def checkout(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A repository with one commit, taken for the project's own."""
    _git(tmp_path, "init", "--quiet")
    (tmp_path / "tracked.py").write_text("x = 1\n")
    _git(tmp_path, "add", "tracked.py")
    _git(tmp_path, "commit", "--quiet", "--message", "first")
    monkeypatch.setattr(module, "_ROOT", tmp_path)
    return tmp_path


def test_names_python_the_libraries_and_the_machine():
    found = provenance()
    assert found["python"] == platform.python_version()
    assert found["versions"]["torch"] == version("torch")
    assert found["versions"]["open_clip_torch"] == version("open_clip_torch")
    assert found["cpu"].endswith(" cores")
    assert platform.node() not in found["platform"] or not platform.node()
    assert json.loads(json.dumps(found)) == found


def test_commit_and_dirtiness(checkout: Path):
    found = provenance()
    assert found["git_commit"] == _git(checkout, "rev-parse", "HEAD")
    assert found["git_dirty"] is False

    (checkout / "notes.txt").write_text("a person's own files beside the code do not make it another code")
    assert provenance()["git_dirty"] is False

    (checkout / "tracked.py").write_text("x = 2\n")
    assert provenance()["git_dirty"] is True


def test_variables_of_a_git_hook_do_not_mislead(checkout: Path, monkeypatch: pytest.MonkeyPatch):
    commit = _git(checkout, "rev-parse", "HEAD")
    monkeypatch.setenv("GIT_DIR", str(checkout / "elsewhere"))
    assert provenance()["git_commit"] == commit


def test_a_folder_inside_another_repository_is_no_checkout(checkout: Path, monkeypatch: pytest.MonkeyPatch):
    installed = checkout / "site-packages"
    installed.mkdir()
    monkeypatch.setattr(module, "_ROOT", installed)
    found = provenance()
    assert found["git_commit"] is None
    assert found["git_dirty"] is None


def test_no_commit_yet_and_no_git(checkout: Path, tmp_path_factory: pytest.TempPathFactory, monkeypatch):
    empty = tmp_path_factory.mktemp("empty")
    _git(empty, "init", "--quiet")
    monkeypatch.setattr(module, "_ROOT", empty)
    assert provenance()["git_commit"] is None

    monkeypatch.setattr(module, "_ROOT", checkout)
    monkeypatch.setenv("PATH", str(empty))
    assert provenance()["git_commit"] is None


def test_gpu_is_what_torch_sees(monkeypatch: pytest.MonkeyPatch):
    def torch_with(cuda: bool, mps: bool) -> SimpleNamespace:
        return SimpleNamespace(
            cuda=SimpleNamespace(is_available=lambda: cuda, get_device_name=lambda: "NVIDIA X"),
            backends=SimpleNamespace(mps=SimpleNamespace(is_available=lambda: mps)),
        )

    for cuda, mps, name in [(True, False, "NVIDIA X"), (False, True, "Apple MPS"), (False, False, None)]:
        monkeypatch.setitem(sys.modules, "torch", torch_with(cuda, mps))
        assert provenance()["gpu"] == name


def test_quick_and_without_importing_torch():
    """In a fresh process, without git. It takes 20 to 40 ms; importing torch alone takes a second."""
    script = (
        "import sys, time; from pathlib import Path; from perfusion import provenance as p; p._ROOT = Path('/');"
        "start = time.process_time(); p.provenance(); print(time.process_time() - start, 'torch' in sys.modules)"
    )
    command = [sys.executable, "-c", script]
    seconds, loaded = subprocess.run(
        command, check=True, capture_output=True, text=True, cwd=Path(__file__).parents[1]
    ).stdout.split()
    assert loaded == "False"
    assert float(seconds) < 0.2
