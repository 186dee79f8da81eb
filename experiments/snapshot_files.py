"""Where `experiments.snapshots` keeps a concept, for those who read it and need no Lightning."""

from pathlib import Path


def step_of(share: float, steps: int) -> int:
    """The step that a share of a training ends with."""
    return max(1, round(share * steps))


def snapshot_file(run: Path, step: int) -> Path:
    """The concept in a run's folder as it was after `step`."""
    return run / "snapshots" / f"step-{step:05d}.safetensors"
