"""The notebook runs, from its first cell to its last, and carries no outputs."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

NOTEBOOK = Path(__file__).parents[1] / "notebooks" / "teach_a_cat.ipynb"


def code_cells() -> list[dict[str, Any]]:
    cells = json.loads(NOTEBOOK.read_text(encoding="utf-8"))["cells"]
    return [cell for cell in cells if cell["cell_type"] == "code"]


def test_no_outputs_are_stored() -> None:
    assert all(cell["outputs"] == [] and cell["execution_count"] is None for cell in code_cells())


@pytest.mark.slow
def test_it_teaches_a_cat_and_sweeps_its_strength(here: Path) -> None:
    names: dict[str, Any] = {}
    for k, cell in enumerate(code_cells()):
        exec(compile("".join(cell["source"]), f"{NOTEBOOK.name}, code cell {k}", "exec"), names)
    assert (here / "runs" / "notebook" / "concept.safetensors").is_file() and names["samples"].width > 100
    assert len({np.asarray(pictures[0]).tobytes() for _, pictures in names["rows"]}) == 5, "every strength is another"
    assert names["sheet"].height > 5 * 64
