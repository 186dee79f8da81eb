"""`make setup` installs once, notices what changed, brings its own uv, and says what is missing.

Run in a copy of the build files with a stand-in for uv that writes down how it was called.
"""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]

FAKE_UV = """#!/bin/sh
case "$1" in
    --version) exit 0 ;;
    venv) [ -z "${NO_PYTHON:-}" ] || exit 2; mkdir -p .venv/bin; ln -s "$REAL_PYTHON" .venv/bin/python ;;
    pip) [ -z "${NO_NETWORK:-}" ] || exit 1 ;;
esac
echo "$@" >>calls
"""

# Stands for a Python without uv: it can make an environment, into which `pip install` puts the stand-in for uv.
FAKE_PYTHON = """#!/bin/sh
case "$*" in
    --version) exit 0 ;;
    "-m venv "*) [ -z "${NO_VENV:-}" ] || exit 1; mkdir -p "$3/bin"; cp "$0" "$3/bin/python" ;;
    "-m pip install "*--target*) [ -z "${NO_PIP:-}" ] || exit 1; mkdir -p "$6/bin"; cp "$FAKE_UV" "$6/bin/uv" ;;
    "-m pip install "*) cp "$FAKE_UV" "$(dirname "$0")/uv" ;;
    *) exit 1 ;;
esac
"""


class Clone:
    """A fresh clone of the build files, on a machine whose PATH holds nothing but basic tools and what is added."""

    def __init__(self, folder: Path) -> None:
        self.root = folder / "a clone"  # people have spaces in their folders
        self.bin = folder / "bin"
        (self.root / "tools").mkdir(parents=True)
        self.bin.mkdir()
        for name in ("Makefile", "pyproject.toml", "constraints.txt", "tools/uv", "tools/setup"):
            shutil.copy(ROOT / name, self.root / name)
        for tool in ("make", "sh", "cat", "cksum", "pwd", "rm", "mkdir", "ln", "cp", "dirname", "mktemp"):
            found = shutil.which(tool)
            assert found, tool
            (self.bin / tool).symlink_to(found)
        self.fake_uv = self._program(folder / "fake-uv", FAKE_UV)

    def _program(self, path: Path, source: str) -> Path:
        path.write_text(source)
        path.chmod(0o755)
        return path

    def add_uv(self) -> None:
        self._program(self.bin / "uv", FAKE_UV)

    def add_python(self) -> None:
        self._program(self.bin / "python3", FAKE_PYTHON)

    def setup(self, **extra: str) -> subprocess.CompletedProcess[str]:
        environment = {"PATH": str(self.bin), "REAL_PYTHON": sys.executable, "FAKE_UV": str(self.fake_uv), **extra}
        environment |= {key: os.environ[key] for key in ("TMPDIR", "LD_LIBRARY_PATH") if key in os.environ}
        return subprocess.run(
            ["make", "setup"], cwd=self.root, env=environment, capture_output=True, text=True, stdin=subprocess.DEVNULL
        )

    def calls(self) -> list[str]:
        """How uv was called since the last time this was asked."""
        log = self.root / "calls"
        lines = log.read_text().splitlines() if log.exists() else []
        log.unlink(missing_ok=True)
        return lines


@pytest.fixture
def clone(tmp_path: Path) -> Clone:
    return Clone(tmp_path)


def test_installs_once(clone: Clone):
    clone.add_uv()
    assert clone.setup().returncode == 0
    venv, install = clone.calls()
    assert venv.startswith("venv ")
    assert install.startswith("pip install ")
    assert "--constraint constraints.txt" in install
    assert "--python .venv/bin/python" in install

    again = clone.setup()
    assert again.returncode == 0
    assert again.stdout == ""
    assert clone.calls() == []


@pytest.fixture
def installed(clone: Clone) -> Clone:
    clone.add_uv()
    clone.setup()
    clone.calls()
    return clone


@pytest.mark.parametrize("name", ["pyproject.toml", "constraints.txt"])
def test_installs_again_when_a_pin_or_a_requirement_changes(installed: Clone, name: str):
    with (installed.root / name).open("a") as file:
        file.write("\n")
    assert installed.setup().returncode == 0
    (install,) = installed.calls()  # into the same environment
    assert install.startswith("pip install ")


def test_a_new_date_alone_does_not_install_again(installed: Clone):
    os.utime(installed.root / "pyproject.toml")
    installed.setup()
    assert installed.calls() == []


def test_a_broken_environment_is_made_anew(installed: Clone):
    python = installed.root / ".venv" / "bin" / "python"
    python.unlink()
    python.symlink_to(installed.root / "uninstalled-python")
    assert installed.setup().returncode == 0
    assert [call.split()[0] for call in installed.calls()] == ["venv", "pip"]


def test_a_failed_installation_is_tried_again(clone: Clone):
    clone.add_uv()
    assert clone.setup(NO_NETWORK="1").returncode != 0
    clone.calls()
    assert clone.setup().returncode == 0
    (install,) = clone.calls()
    assert install.startswith("pip install ")


@pytest.mark.parametrize("lacks", [{}, {"NO_VENV": "1"}], ids=["with venv", "without venv"])
def test_brings_its_own_uv(clone: Clone, lacks: dict[str, str]):
    clone.add_python()
    done = clone.setup(**lacks)
    assert done.returncode == 0, done.stderr
    assert "uv is missing: putting uv" in done.stderr
    assert (clone.root / ".cache" / "uv" / "bin" / "uv").exists()
    assert len(clone.calls()) == 2
    assert "uv is missing" not in clone.setup().stderr


def test_says_what_is_missing_when_uv_cannot_be_had(clone: Clone):
    clone.add_python()
    done = clone.setup(NO_VENV="1", NO_PIP="1")
    assert done.returncode != 0
    assert "error: uv is missing and could not be installed" in done.stderr
    assert not (clone.root / ".cache" / "uv").exists()


def test_says_that_python_is_too_old(clone: Clone):
    clone.add_uv()
    done = clone.setup(NO_PYTHON="1")
    assert done.returncode != 0
    assert "3.11 or newer" in done.stderr
    assert not (clone.root / ".venv").exists()
