"""What holds for every test: one thread per process, no network, no account, and GPU tests only where a GPU is."""

import os

# Before torch is imported anywhere: the number of threads is read once, at its import.
os.environ.setdefault("OMP_NUM_THREADS", "1")
# Not `setdefault`: no test may load from a hub or log into the account of whoever runs it.
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["WANDB_MODE"] = "offline"
os.environ["WANDB_SILENT"] = "true"

import pytest


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    on_gpu = [item for item in items if "gpu" in item.keywords]
    if not on_gpu:
        return
    import torch

    if not torch.cuda.is_available():
        for item in on_gpu:
            item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))
