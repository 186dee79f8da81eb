"""Where the configs of earlier runs look for the callback that chooses a step."""

from perfusion.training.selection import SelectBestStep

__all__ = ["SelectBestStep"]
