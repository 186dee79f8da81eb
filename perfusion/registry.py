"""What there is of a kind in a package: the modules that define a certain name."""

import functools
import re
from pathlib import Path


@functools.cache
def modules_that_define(name: str, folder: Path) -> tuple[str, ...]:
    """The modules in `folder` that assign `name` at their top level, by their short names in alphabetical order.

    Their sources are read; importing them all would take seconds.
    """
    assigned = re.compile(rf"^{name} = ", re.MULTILINE)
    files = sorted(folder.glob("*.py"))
    return tuple(file.stem for file in files if assigned.search(file.read_text(encoding="utf-8")))
