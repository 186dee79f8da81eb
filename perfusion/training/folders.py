"""Several concepts in one command: `concept.images=<folder of folders>` is a sweep over these, each a concept that is
named after its folder.

The sweep varies `concept.name` alone; what else follows from a folder's name is an interpolation of it.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path

from omegaconf import OmegaConf

from perfusion.config import ConfigError
from perfusion.data.formats import OTHERS, SUFFIXES

KEY, NAME = "concept.images", "concept.name"
_FLAGS = ("-m", "--multirun")
_MASKS = ("mask", "masks")  # folders that are none of concepts


def superclass_of(name: str) -> str:
    """What a folder's name says that its pictures show: `teddy_bear` and `Teddy-bear 2` are each a "teddy bear"."""
    return " ".join(re.sub(r"[\W_]*\d+$", "", str(name)).replace("_", " ").replace("-", " ").lower().split())


def placeholder_of(name: str) -> str:
    """The word of the concept in a folder: `<teddy-bear-2*>` of `Teddy-bear 2`."""
    plain = re.sub(r"[\W_]+", "-", str(name)).strip("-").lower()
    return f"<{plain}*>"


for _function in (superclass_of, placeholder_of):
    OmegaConf.register_new_resolver(_function.__name__, _function, replace=True)


def each_folder(words: Sequence[str]) -> list[str]:
    """The words of a command line that trains one concept for each folder in the folder that `concept.images` names.

    The same words where it names no folder, one that holds pictures itself, or one without folders of pictures.

    Raises:
        ConfigError: beside `concept.name`; a folder whose name does not say what it shows; or two of one placeholder.
    """
    words = list(words)
    given = {word.partition("=")[0].lstrip("+"): word.partition("=")[2] for word in words}
    asks_else = any(word.startswith("-") and word not in _FLAGS for word in words)
    folders = [] if asks_else or "from" in given else _folders(given.get(KEY))
    if not folders:
        return words
    names, root = [folder.name for folder in folders], given[KEY]
    if NAME in given:
        raise ConfigError(f"{NAME}: found it beside {KEY}={root}, whose folders name a concept each: {_listed(names)}")
    for name in names:
        if "concept.superclass" not in given and not superclass_of(name):
            raise ConfigError(
                f"{KEY}={root}: found a folder {name!r}, expected the kind of thing as its name, such as teddy_bear; "
                "or give concept.superclass="
            )
        same = [other for other in names if placeholder_of(other) == placeholder_of(name)]
        if len(same) > 1:
            raise ConfigError(
                f"{KEY}={root}: found the folders {' and '.join(same)}, which would both be {placeholder_of(name)}, "
                "expected names that differ in letters or numbers"
            )
    print(f"{len(names)} concepts in {root}: {_listed(names)}", flush=True)
    made = {NAME: ",".join(map(quoted, names)), KEY: quoted(f"{root.rstrip('/')}/${{{NAME}}}")}
    for function in (superclass_of, placeholder_of):
        made[f"concept.{function.__name__.removesuffix('_of')}"] = f"${{{function.__name__}:${{{NAME}}}}}"
    kept = [word for word in words if word.partition("=")[0].lstrip("+") != KEY and word not in _FLAGS]
    return ["-m", *kept, *(f"{key}={value}" for key, value in made.items() if key == KEY or key not in given)]


def quoted(value: str) -> str:
    """A text as Hydra's grammar reads it as it stands, but for interpolations."""
    return '"' + re.sub(r'(\\*)("|$)', lambda m: m[1] * 2 + ('\\"' if m[2] else ""), value) + '"'


def _folders(root: str | None) -> list[Path]:
    """The folders with pictures in a folder that holds none itself."""
    path = Path(root or "").expanduser()
    if not root or not path.is_dir() or _holds_pictures(path):
        return []
    below = [folder for folder in sorted(path.iterdir()) if folder.is_dir() and not folder.name.startswith(".")]
    return [folder for folder in below if folder.name.lower() not in _MASKS and _holds_pictures(folder)]


def _holds_pictures(folder: Path) -> bool:
    return any(file.suffix.lower() in (*SUFFIXES, *OTHERS) for file in folder.iterdir() if not file.is_dir())


def _listed(names: Sequence[str]) -> str:
    return ", ".join(names[:8]) + (f" and {len(names) - 8} more" if len(names) > 8 else "")
