"""Backbones and methods are found by what their modules define."""

from pathlib import Path

from perfusion import backbones
from perfusion.methods import base
from perfusion.registry import modules_that_define


def test_only_an_assignment_at_the_top_counts(tmp_path: Path) -> None:
    sources = {
        "thing": "x = 1\nTHING = x\n",
        "another": "THING = 2\n",
        "mention": '"""Defines no THING = 1."""\n',
        "inner": "def f():\n    THING = 1\n",
        "longer": "THINGS = 1\n",
    }
    for name, source in sources.items():
        (tmp_path / f"{name}.py").write_text(source, encoding="utf-8")
    assert modules_that_define("THING", tmp_path) == ("another", "thing")


def test_what_ships() -> None:
    assert backbones.available() == ["kolors", "pixart", "sana", "sdxl", "stable_diffusion", "toyland"]
    assert base.available() == ["custom_diffusion", "dreambooth", "lora", "perfusion", "textual_inversion"]
