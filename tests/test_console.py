"""`perfusion <command>`, and that `--help` needs no large library."""

from __future__ import annotations

import importlib.util
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

from perfusion.__main__ import COMMANDS, main
from perfusion.cli import run_cli

ROOT = Path(__file__).parents[1]
LARGE = ("torch", "diffusers", "transformers", "lightning", "scipy", "matplotlib", "hydra")


def test_it_is_installed_and_has_every_command_of_the_package(capsys: pytest.CaptureFixture[str]) -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert project["scripts"] == {"perfusion": "perfusion.__main__:console"}
    modules = {module for module, _ in COMMANDS.values()}
    files = [path for path in (ROOT / "perfusion").rglob("*.py") if "build" not in path.parts]
    commands = [
        path for path in files if re.search(r"^    sys\.exit\(run_cli\(main\)\)", path.read_text(), re.MULTILINE)
    ]
    own = {".".join(path.relative_to(ROOT).with_suffix("").parts) for path in commands} - {"perfusion.__main__"}
    assert own and own <= modules and all(importlib.util.find_spec(module) for module in modules)
    assert run_cli(main, []) == 0
    shown = capsys.readouterr().out
    assert all(re.search(rf"^  {name} +\S", shown, re.MULTILINE) for name in COMMANDS)


def test_words_go_to_the_command_and_its_status_comes_back(capsys: pytest.CaptureFixture[str]) -> None:
    assert run_cli(main, ["inspect", "backbone=sd15"]) == 0
    assert "attn2.to_k" in capsys.readouterr().out
    assert run_cli(main, ["inspect", "nowhere.safetensors"]) == 2
    assert "error: nowhere.safetensors: found no such file" in capsys.readouterr().err
    assert run_cli(main, ["inspekt"]) == 2
    assert "inspekt: no such command; did you mean 'inspect'?" in capsys.readouterr().err


@pytest.mark.parametrize("command", COMMANDS)
def test_help_loads_no_large_library(command: str) -> None:
    code = (
        "import sys; from perfusion.__main__ import main\n"
        f"try: main([{command!r}, '--help'])\n"
        f"except SystemExit: pass\nfinally: print('loaded:', *({{*{LARGE}}} & {{*sys.modules}}))"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    *shown, loaded = done.stdout.splitlines()
    assert len(shown) > 4 and loaded == "loaded:"
