"""`key=value` command lines."""

import os
import subprocess
import sys
from dataclasses import dataclass, field, fields
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from omegaconf import MISSING

from perfusion import generate, inspect
from perfusion.cli import parse_key_values, run_cli
from perfusion.config import ConfigError
from perfusion.covariance import __main__ as covariance
from perfusion.files import atomic_write_text


@dataclass
class Inner:
    size: int = 3  # how large


@dataclass
class Words:
    concept: Any = MISSING  # concept file
    prompt: str = MISSING  # what to draw
    negative: str | None = None  # what not to draw
    beta: Any = None  # bias of the gate
    num: int = 4  # pictures
    tau: float = 0.15
    seeds: list[int] = field(default_factory=lambda: [1])
    fast: bool = False
    inner: Inner = field(default_factory=Inner)


def parse(*argv: str) -> Words:
    return parse_key_values(argv, Words, "usage: draw <concept> prompt='...'", positional="concept")


def test_values_follow_yaml_and_text_is_verbatim() -> None:
    words = parse("a b.safetensors", "prompt=x", "beta=[0.6, 0.7]", "num=2", "tau=1e-3", "fast=true", "inner.size=5")
    assert words == Words("a b.safetensors", "x", None, [0.6, 0.7], 2, 0.001, [1], True, Inner(5))
    assert parse("concept=[a,b]", "prompt=x", "prompt=y").concept == ["a", "b"]
    assert parse("c", "prompt=1", "negative=null").negative is None


@pytest.mark.parametrize(
    "text", ["<cat*>", "a: b, [c", "null", "1.50", "a=b", "#x", "'q\"", "${a} \\${b} \\\\${c} \\ ", " x ", "é", "???x"]
)
def test_prompts_are_verbatim(text: str) -> None:
    assert parse("c", f"prompt={text}").prompt == text


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["c", "prompt=x", "nmu=3"], "nmu: unknown key.*'num'"),
        (["c", "prompt=x", "inner.sise=3"], "inner.sise: unknown key.*'size'"),
        (["c", "prompt=x", "num=three"], "num: .*three"),
        (["c", "prompt=x", "seeds=[1"], r"seeds: cannot read '\[1'"),
        (["c"], "prompt: missing. usage: draw"),
        (["prompt=x"], "concept: missing"),
        (["c", "prompt=x", "--fast"], "'--fast': expected key=value"),
        (["c", "prompt=x", "num=3", "num.x=3"], "num.x: num was already given"),
    ],
)
def test_mistakes_name_the_key(argv: list[str], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        parse(*argv)


def test_words_without_a_key_are_errors_where_none_is_expected() -> None:
    with pytest.raises(ConfigError, match="'c': expected key=value"):
        parse_key_values(["c", "prompt=x"], Words, "usage: x")


def test_help_lists_every_key_with_default_and_comment(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        parse("prompt=x", "--help")
    assert stopped.value.code == 0
    shown = capsys.readouterr().out
    assert shown.startswith("usage: draw <concept>")
    lines = {line.split()[0]: line for line in shown.splitlines() if line.startswith("  ")}
    assert set(lines) == {"concept", "prompt", "negative", "beta", "num", "tau", "seeds", "fast", "inner.size"}
    assert "(required)" in lines["prompt"] and "what to draw" in lines["prompt"]
    assert "4" in lines["num"] and "pictures" in lines["num"] and "how large" in lines["inner.size"]
    assert "null" in lines["beta"] and "false" in lines["fast"]


@pytest.mark.parametrize(
    ("command", "options"),
    [(generate, "GenerateConfig"), (inspect, "InspectConfig"), (covariance, "CovarianceCommand")],
)
def test_help_of_a_command_explains_every_key(
    command: ModuleType, options: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as status:
        run_cli(command.main, ["--help"])
    assert status.value.code == 0
    said = capsys.readouterr().out
    for key in fields(getattr(command, options)):
        line = next(line for line in said.splitlines() if line.startswith(f"  {key.name} "))
        assert len(line.split()) > 3, f"{key.name} has no explanation"
    assert command.USAGE.strip().splitlines()[0] in said


@pytest.mark.parametrize(
    ("path", "message"),
    [("there", "expected a file to write, found a folder: 'there'"), ("gone/x.json", "found none: 'gone'")],
)
def test_a_file_that_cannot_be_there_is_a_users_mistake(
    path: str, message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("there").mkdir()
    assert run_cli(lambda words: atomic_write_text(words[0], "text"), [path]) == 2
    assert message in capsys.readouterr().err


def test_a_command_answers_with_its_own_errors_on_a_terminal_without_unicode(tmp_path: Path) -> None:
    """Of `python -m`, whose module is called `__main__`; a name that ASCII has not is spelled out."""
    words = [f"file={tmp_path}/süß.pt", "superclass=cat", "placeholder=<cat*>", f"path={tmp_path}"]
    command = [sys.executable, "-m", "perfusion.convert", *words]
    done = subprocess.run(
        command, capture_output=True, text=True, cwd=Path(__file__).parents[1],
        env={**os.environ, "PYTHONIOENCODING": "ascii", "PYTHONUTF8": "0"},
    )  # fmt: skip
    assert done.returncode == 2, done.stderr
    assert done.stderr.splitlines()[-1].startswith("error: ") and r"s\xfc\xdf.pt: found no such file" in done.stderr


@pytest.mark.parametrize(
    ("command", "told", "policy"),
    [
        *((name, {}, "PASSIVE") for name in ("perfusion.train", "perfusion.generate", "perfusion.demo")),
        ("experiments.paper", {}, "PASSIVE"),
        ("perfusion.train", {"OMP_WAIT_POLICY": "ACTIVE"}, "ACTIVE"),
    ],
)
def test_threads_of_commands_wait_passively_unless_told_otherwise(
    command: str, told: dict[str, str], policy: str
) -> None:
    """And torch, which reads it once, is not loaded before."""
    code = f"import os, sys, {command}; print(os.environ['OMP_WAIT_POLICY'], 'torch' in sys.modules)"
    others = {key: value for key, value in os.environ.items() if key != "OMP_WAIT_POLICY"}
    done = subprocess.run([sys.executable, "-c", code], env=others | told, capture_output=True, text=True, check=True)
    assert done.stdout.split() == [policy, "False"]
