"""A Hugging Face cache as a download leaves it, so that models can be loaded by their hub id without a network."""

import shutil
from pathlib import Path

import pytest
from huggingface_hub import constants

COMMIT = "0123456789abcdef0123456789abcdef01234567"


def put_in_hub_cache(name: str, folder: Path, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Make `cache` the hub's cache, with the files of `folder` in it as the latest of the repository `name`."""
    repository = cache / f"models--{name.replace('/', '--')}"
    (repository / "refs").mkdir(parents=True)
    (repository / "refs" / "main").write_text(COMMIT)
    shutil.copytree(folder, repository / "snapshots" / COMMIT)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(cache))
    assert constants.HF_HUB_OFFLINE, "no test may ask the hub itself"
