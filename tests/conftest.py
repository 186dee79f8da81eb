"""What holds for every test: one thread per process, no network, no account, and GPU tests only where a GPU is."""

import os

# Before torch is imported anywhere: the number of threads is read once, at its import.
os.environ.setdefault("OMP_NUM_THREADS", "1")
# Not `setdefault`: no test may load from a hub or log into the account of whoever runs it.
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["WANDB_MODE"] = "offline"
os.environ["WANDB_SILENT"] = "true"
os.environ["RAY_USAGE_STATS_ENABLED"] = "0"

import signal
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

# Files that take longest; they begin first, so that at the end no worker is busy with one alone.
LONGEST = [
    "test_experiments", "test_methods_contract", "test_studio", "test_experiments_photos", "test_resume", "test_train",
    "test_sweep", "test_experiments_evidence", "test_toyland_report", "test_backbones_loading", "test_selection",
    "test_experiments_pool",
]  # fmt: skip


@pytest.fixture(autouse=True)
def torch_as_before() -> Iterator[None]:
    """A test that sets the number of threads sets that of all tests after it; and torch compiles a function a few times
    only, in all tests together."""
    yield
    if (torch := sys.modules.get("torch")) is not None:
        torch.set_num_threads(1)
        if "torch._dynamo" in sys.modules:
            torch._dynamo.reset()


@pytest.fixture(scope="module")
def backbone(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """Stable Diffusion's architecture with few channels and random weights, where a file has none of its own."""
    from tests.concepts import tiny_backbone

    return tiny_backbone(tmp_path_factory.mktemp("covariance"))


@pytest.fixture(scope="module")
def toyland(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """Toyland, with its trained weights."""
    from perfusion.backbones.toyland import WEIGHTS
    from tests.concepts import toyland_backbone

    return toyland_backbone(WEIGHTS, tmp_path_factory.mktemp("covariance"))


@pytest.fixture
def untouched(backbone: Any) -> Iterator[None]:
    """A test leaves nothing in the pipeline, hooks included, least of all one in which attaching fails."""
    from tests.concepts import Snapshot

    before = Snapshot(backbone.pipe)
    yield
    assert before.differences() == []


@pytest.fixture
def words() -> list[str]:
    """A command line that trains in seconds."""
    from tests.training import command_line

    return command_line()


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """An empty working directory for a command; signal handlers and arguments are put back."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["train"])
    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    yield tmp_path
    for number, handler in handlers.items():
        signal.signal(number, handler)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    items.sort(key=lambda item: LONGEST.index(item.path.stem) if item.path.stem in LONGEST else len(LONGEST))
    on_gpu = [item for item in items if "gpu" in item.keywords]
    if not on_gpu:
        return
    import torch

    if not torch.cuda.is_available():
        for item in on_gpu:
            item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))
