"""A folder that one process works in at a time."""

from __future__ import annotations

from pathlib import Path

import pytest

from experiments.exclusive import alone
from perfusion.config import ConfigError


def test_only_one_holds_a_folder(tmp_path: Path) -> None:
    folder = tmp_path / "runs"
    second = alone(folder, "out=")
    with alone(folder, "out="), pytest.raises(ConfigError, match=r"runs: found another process .*choose another out="):
        second.__enter__()


def test_a_folder_is_free_after_an_error(tmp_path: Path) -> None:
    with pytest.raises(KeyError), alone(tmp_path, "out="):
        raise KeyError
    with alone(tmp_path, "out="):
        pass
