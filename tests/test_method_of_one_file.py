"""A method with a dial is one file outside the package and a preset: it is trained, swept and scored, and no other file
knows its name or its dial's."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from eval import score
from perfusion import generate, methods, train
from perfusion.cli import run_cli
from perfusion.concept import Concept
from perfusion.manifest import read_manifest
from tests.pipelines import toyland_folder
from tests.scorers import make_scorer

METHOD = '''
"""Learns what to add to all that the denoiser says."""

from dataclasses import dataclass

import torch
from torch import nn

from perfusion.methods.base import Dial, Method, MethodOptions


@dataclass
class TintOptions(MethodOptions):
    rate: float = 0.1


class Tint(Method):
    Options = TintOptions
    dials = (Dial("glow"), Dial("side", number=False))

    def clear(self):
        super().clear()
        self.glow, self.side, self.offset = 1.0, "up", None

    def put(self, backbone, undo):
        self.offset = nn.Parameter(torch.zeros(backbone.latent_shape()[0], 1, 1))
        undo.callback(backbone.denoiser.register_forward_hook(self._add).remove)
        self.add_word(undo, vectors=1, trained=False)

    def _add(self, module, given, result):
        offset = self.glow * self.offset * (1 if self.side == "up" else -1)
        if isinstance(result, tuple):
            return (result[0] + offset, *result[1:])
        result.sample = result.sample + offset
        return result

    def parameter_groups(self):
        return [{"name": "offset", "params": [self.offset], "lr": self.options.rate}]

    def tensors(self):
        return {"offset": self.offset}

    def state_shapes(self, backbone):
        return {"offset": (backbone.latent_shape()[0], 1, 1)}


METHOD = Tint
'''
PRESET = "name: tint\nsteps: 2\nbatch_size: 1\nrate: 0.5\n"


@pytest.fixture
def elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """The folder of the method and its preset, as PERFUSION_METHODS and `hydra.searchpath` name it."""
    (tmp_path / "method").mkdir()
    (tmp_path / "tint.py").write_text(METHOD)
    (tmp_path / "method" / "tint.yaml").write_text(PRESET)
    monkeypatch.setattr(methods, "__path__", [*methods.__path__, str(tmp_path)])
    yield tmp_path
    sys.modules.pop("perfusion.methods.tint", None)


def test_it_is_trained_swept_and_scored(elsewhere: Path, monkeypatch: pytest.MonkeyPatch, capsys) -> None:
    monkeypatch.chdir(elsewhere)
    pipeline, scorer = toyland_folder(elsewhere / "pipeline"), make_scorer(elsewhere / "scorer")
    words = [f"hydra.searchpath=[file://{elsewhere}]", "method=tint", f"backbone.path={pipeline}", "callbacks=none"]
    assert run_cli(train.main, [*words, "backbone.device=cpu", "backbone.steps=1", "run.dir=run"]) == 0
    assert Concept.load("run/concept.safetensors").tensors["offset"].abs().min() > 0

    asked = ["concept=run/concept.safetensors", "prompt=a <cat*> on the beach", "num=1", "steps=2", "device=cpu"]
    drawn = ["glow=0,0.5,2", "side=up,down", "out=run/pictures"]
    assert run_cli(generate.main, [*asked, f"path={pipeline}", *drawn]) == 0
    records = read_manifest("run/pictures")
    sides = [{"glow": glow, "side": side} for glow in (0.0, 0.5, 2.0) for side in ("up", "down")]
    assert [record.dials for record in records] == sides
    assert records[1].file == "a-cat-on-the-beach-0000-glow-0-side-down.png"
    assert len({(elsewhere / "run/pictures" / record.file).read_bytes() for record in records}) == 6
    assert run_cli(generate.main, [*asked, f"path={pipeline}", "beta=0.5"]) == 2
    assert "'tint', which has no beta; it has glow and side" in capsys.readouterr().err
    assert run_cli(generate.main, [*asked, f"path={pipeline}", "glwo=1"]) == 2
    assert "glwo: unknown key; did you mean 'glow'?" in capsys.readouterr().err

    assert run_cli(score.main, ["images=run", f"scorer={scorer}", "reader=none", "progress=false"]) == 0
    settings = [point["setting"] for point in json.loads(Path("scores.json").read_text())["points"]]
    expected = [{"glow": glow, "side": side} for glow in (0.0, 0.5, 2.0) for side in ("down", "up")]
    assert settings == [{**one, "steps": 2, "guidance": 4.0} for one in expected]
    assert "tint, glow 0.5, side down" in capsys.readouterr().out


def test_an_environment_variable_names_the_folder(tmp_path: Path) -> None:
    code = "import perfusion.methods; print(perfusion.methods.__path__[-2:])"
    environment = {**os.environ, "PERFUSION_METHODS": f"{tmp_path}{os.pathsep}other"}
    said = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
    assert said.stdout.strip() == str([str(tmp_path), "other"])
