"""Checkpoints as safetensors: what is loaded is what was saved, and damage is found."""

import logging
import math
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file

from perfusion.training.checkpoint import CheckpointError, SafetensorsCheckpointIO, newest_readable, step_of

SHARED = torch.arange(6.0)
CHECKPOINT: dict[str, Any] = {
    "state_dict": {
        "weight": torch.randn(3, 4, generator=torch.Generator().manual_seed(0)),
        "half": torch.tensor([1.5, math.nan], dtype=torch.bfloat16),
        "flag": torch.tensor(True),
        "empty": torch.zeros(0, 2),
        "turned": SHARED.view(2, 3).T,
        "alias": SHARED[2:],
    },
    "optimizer_states": [{"state": {0: {"step": torch.tensor(7.0)}}, "param_groups": [{"betas": (0.9, 0.999)}]}],
    "loops": {"done": False, "none": None, "inf": math.inf, "third": 1 / 3, "big": 2**70, "text": 'é "<cat*>"'},
    "lists": [[], {}, (), [1, (2, [torch.tensor(3)])]],
    "tensor": {"tuple": [1]},
}


def equal(a: Any, b: Any) -> bool:
    """Equality of nests, types included; tensors bit for bit."""
    if type(a) is not type(b):
        return False
    if isinstance(a, torch.Tensor):
        same = a.dtype == b.dtype and a.shape == b.shape
        return same and torch.equal(a.contiguous().flatten().view(torch.uint8), b.flatten().view(torch.uint8))
    if isinstance(a, dict):
        return list(a) == list(b) and all(equal(a[key], b[key]) for key in a)
    if isinstance(a, list | tuple):
        return len(a) == len(b) and all(map(equal, a, b))
    return a == b


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    path = tmp_path / "step-000050.safetensors"
    SafetensorsCheckpointIO().save_checkpoint(CHECKPOINT, path)
    return path


def test_a_checkpoint_comes_back_as_it_was(saved: Path) -> None:
    assert equal(SafetensorsCheckpointIO().load_checkpoint(saved), CHECKPOINT)
    with safe_open(saved, framework="pt") as file:
        assert file.metadata()["format"] == "perfusion-checkpoint-1"
    assert os.listdir(saved.parent) == [saved.name], "nothing is left beside it"


def test_objects_that_only_a_pickle_could_hold_are_refused(saved: Path) -> None:
    before = saved.read_bytes()
    with pytest.raises(TypeError, match=r"checkpoint\.callbacks\.x\[1\].*Path"):
        SafetensorsCheckpointIO().save_checkpoint({"callbacks": {"x": [1, Path("a")]}}, saved)
    assert saved.read_bytes() == before


def test_damage_is_found(saved: Path) -> None:
    data = saved.read_bytes()
    bit_in_a_tensor, bit_in_the_tree = data[:-1] + bytes([data[-1] ^ 1]), data.replace(b"0.999", b"1.999")
    for damaged in (data[:-20], bit_in_a_tensor, bit_in_the_tree, b"", b"hello", None):
        saved.unlink() if damaged is None else saved.write_bytes(damaged)
        with pytest.raises(CheckpointError, match=saved.name):
            SafetensorsCheckpointIO().load_checkpoint(saved)


def test_another_safetensors_file_is_no_checkpoint(tmp_path: Path) -> None:
    save_file({"a": torch.zeros(1)}, tmp_path / "a.safetensors")
    with pytest.raises(CheckpointError, match=r"expected a file of format .*found None"):
        SafetensorsCheckpointIO().load_checkpoint(tmp_path / "a.safetensors")


def test_the_newest_readable_one_is_taken(saved: Path, caplog: pytest.LogCaptureFixture) -> None:
    assert newest_readable(saved.parent) == saved and step_of(saved) == 50
    newer = saved.with_name("step-000100.safetensors")
    newer.write_bytes(saved.read_bytes())
    assert newest_readable(saved.parent) == newer
    newer.write_bytes(newer.read_bytes()[:-1])
    with caplog.at_level(logging.WARNING):
        assert newest_readable(saved.parent) == saved
    assert newer.name in caplog.text
    saved.unlink()
    assert newest_readable(saved.parent) is None
    assert newest_readable(saved.parent / "nowhere") is None


@pytest.mark.parametrize("kind", ["pipe", "folder", "name"])
def test_what_is_no_checkpoint_file_is_passed_over(saved: Path, kind: str, caplog: pytest.LogCaptureFixture) -> None:
    """A pipe would be waited for; a name without a number is a user's own."""
    other = saved.with_name("step-abc.safetensors" if kind == "name" else "step-1000000.safetensors")
    {"pipe": os.mkfifo, "folder": Path.mkdir, "name": lambda path: path.write_bytes(saved.read_bytes())}[kind](other)
    with caplog.at_level(logging.WARNING):
        assert newest_readable(saved.parent) == saved
    assert (f"{other}: expected a file" in caplog.text) == (kind != "name")
