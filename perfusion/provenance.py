"""What a result was made with: Python, libraries, commit, machine. Written into concept files and run folders."""

import functools
import importlib.metadata
import os
import platform
import subprocess
import sys
from pathlib import Path
from typing import TypedDict

LIBRARIES = (
    "perfusion",
    "torch",
    "torchvision",
    "lightning",
    "diffusers",
    "transformers",
    "peft",
    "accelerate",
    "safetensors",
    "hydra-core",
    "omegaconf",
    "open_clip_torch",
    "torchmetrics",
    "numpy",
    "pillow",
)

_ROOT = Path(__file__).resolve().parents[1]


class Provenance(TypedDict):
    """Plain values only, so that it can be written as JSON or YAML. Nothing in it names the person or the host."""

    python: str  # "3.11.7"
    platform: str  # system, release, machine
    versions: dict[str, str]  # of those `LIBRARIES` that are installed
    git_commit: str | None  # None outside a checkout of this project
    git_dirty: bool | None  # whether tracked files differ from that commit
    cpu: str  # model and the number of logical cores
    gpu: str | None  # the current device; None without one, or while torch is not loaded


def provenance() -> Provenance:
    """Describes this process. Takes milliseconds besides git: torch is asked for the GPU but not imported for it."""
    commit, dirty = _git(_ROOT)
    return Provenance(
        python=platform.python_version(),
        platform=platform.platform(),
        versions=dict(_versions()),
        git_commit=commit,
        git_dirty=dirty,
        cpu=_cpu(),
        gpu=_gpu(),
    )


@functools.cache
def _versions() -> tuple[tuple[str, str], ...]:
    found = []
    for name in LIBRARIES:
        try:
            found.append((name, importlib.metadata.version(name)))
        except importlib.metadata.PackageNotFoundError:
            continue
    return tuple(found)


def _git(root: Path) -> tuple[str | None, bool | None]:
    """Commit and dirtiness of the checkout at `root`; (None, None) where there is none, or no git.

    Only a repository whose top is `root` counts: installed into the environment of another project, this package must
    not report that project's commit.
    """
    if not (root / ".git").exists():  # a folder, or a file in a linked worktree
        return None, None
    try:
        commit = _run_git(root, "rev-parse", "--verify", "HEAD")
        changes = _run_git(root, "status", "--porcelain", "--untracked-files=no")
    except (OSError, subprocess.SubprocessError):  # no git, no commit yet, a repository that git does not trust
        return None, None
    return commit, bool(changes)


def _run_git(root: Path, *arguments: str) -> str:
    # Inside a git hook, GIT_DIR and its like point elsewhere; the lock would disturb a git that runs meanwhile.
    environment = {key: value for key, value in os.environ.items() if not key.startswith("GIT_")}
    command = ["git", "--no-optional-locks", "-C", str(root), *arguments]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True, timeout=10)
    return done.stdout.strip()


@functools.cache
def _cpu() -> str:
    model = ""
    if sys.platform == "linux":
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):  # absent on ARM
                model = line.partition(":")[2].strip()
                break
    elif sys.platform == "darwin":
        command = ["sysctl", "-n", "machdep.cpu.brand_string"]
        model = subprocess.run(command, capture_output=True, text=True, check=False).stdout.strip()
    return f"{model or platform.machine()}, {os.cpu_count()} cores"


def _gpu() -> str | None:
    torch = sys.modules.get("torch")
    if torch is None:
        return None
    if torch.cuda.is_available():
        return torch.cuda.get_device_name()
    return "Apple MPS" if torch.backends.mps.is_available() else None
