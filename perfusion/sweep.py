"""`python -m perfusion.sweep <folder>`: the table of a sweep, also of one that was killed or that is still running."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from omegaconf import MISSING

from perfusion.cli import parse_key_values, run_cli

USAGE = """
What became of the jobs of a sweep so far. Nothing is run; the command that began the sweep goes on with it.

usage: python -m perfusion.sweep <folder below <run.root>/.sweep, or its sweep.json>

  python -m perfusion.sweep runs/.sweep/key_lock_sweep-3f0c9d1e
"""


@dataclass
class SweepTable:
    """The command's options."""

    sweep: str = MISSING  # folder or sweep.json; relative paths in it start at the working directory


def main(argv: Sequence[str]) -> int:
    """Print the table; the exit status, 1 unless all jobs are done."""
    options = parse_key_values(argv, SweepTable, USAGE, positional="sweep")
    from perfusion.training import sweep  # with Hydra, which takes long to import

    results = [sweep.result_of(job) for job in sweep.read(Path(options.sweep).expanduser()).jobs]
    print(sweep.table(results))
    return 0 if all(result.state == "done" for result in results) else 1


if __name__ == "__main__":
    sys.exit(run_cli(main))
