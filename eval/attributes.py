"""Toyland's attribute reader and its toys, as scoring asks for them: loaded, or an error that says what is missing."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from safetensors import SafetensorError

from perfusion import toyland
from perfusion.scoring.clip import ScorerError
from perfusion.toyland.reader import Reader
from perfusion.toyland.world import SUPERCLASSES, Instance, sample_instance

WEIGHTS = Path(toyland.__file__).with_name("weights") / "reader"


def load_reader(folder: str | Path | None = None) -> Reader:
    """The reader in `folder`; default: the one that ships with the project.

    Raises:
        ScorerError: it is not there, damaged, or of another version of the world.
    """
    path = WEIGHTS if folder is None else Path(folder).expanduser()
    if not path.is_dir():
        how = "run `make toyland`, or leave it out with reader=none" if folder is None else "expected a reader's folder"
        raise ScorerError(f"{path}: the attribute reader is not there; {how}")
    try:
        return Reader.load(path)
    except (OSError, ValueError, KeyError, RuntimeError, SafetensorError) as error:
        raise ScorerError(f"{path}: the attribute reader cannot be loaded: {error}") from error


def toy(instance: int, superclass: str) -> Instance:
    """The toy of a seed, as `concept.toyland.instance` draws it. Raises ScorerError if there is no such superclass."""
    if superclass not in SUPERCLASSES:
        raise ScorerError(
            f"instance={instance}: found the superclass {superclass!r}, expected one of Toyland's: "
            f"{', '.join(SUPERCLASSES)}"
        )
    return sample_instance(np.random.default_rng(instance), superclass)
