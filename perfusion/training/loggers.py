"""Where numbers go: metrics.csv always, and whatever `logger=` adds."""

from __future__ import annotations

import csv
import inspect
import io
import netrc
import os
import sys
from argparse import Namespace
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import hydra.utils
from lightning.pytorch.loggers.logger import Logger

from perfusion.config import ConfigError
from perfusion.files import atomic_write_text, first_line

_WANDB_HOST = "api.wandb.ai"


class MetricsCSV(Logger):
    """One row per optimizer step in one CSV file, written at once.

    Lightning's CSVLogger deletes the rows of a former process; here a resumed run keeps those up to its checkpoint.

    Args:
        path: the file.
        keep_until: rows of a former process are kept up to this step.
    """

    def __init__(self, path: Path, keep_until: int = 0) -> None:
        super().__init__()
        self.path = path
        path.parent.mkdir(parents=True, exist_ok=True)
        self.rows = [row for row in metrics_in(path) if row["step"] <= keep_until]
        self.columns = list(self.rows[0]) if self.rows else ["step"]
        self._rewrite()

    @property
    def name(self) -> str:
        return "csv"

    @property
    def version(self) -> str:
        return ""

    def log_hyperparams(self, params: dict[str, Any] | Namespace, *args: Any, **kwargs: Any) -> None:
        """Nothing: config.yaml lies beside the file."""

    def log_metrics(self, metrics: Mapping[str, float], step: int | None = None) -> None:
        row = {"step": int(step or 0), **{key: value for key, value in metrics.items() if key not in ("step", "epoch")}}
        same_step = bool(self.rows) and self.rows[-1]["step"] == row["step"]
        if same_step:
            self.rows[-1] |= row
        else:
            self.rows.append(row)
        new = [key for key in row if key not in self.columns]
        self.columns += new
        if new or same_step:
            self._rewrite()
        else:
            with open(self.path, "a", newline="", encoding="utf-8") as file:
                self._writer(file).writerow(row)

    def _rewrite(self) -> None:
        text = io.StringIO(newline="")
        writer = self._writer(text)
        writer.writeheader()
        writer.writerows(self.rows)
        atomic_write_text(self.path, text.getvalue())

    def _writer(self, file: Any) -> csv.DictWriter[str]:
        return csv.DictWriter(file, self.columns, lineterminator="\n")


def metrics_in(path: Path) -> list[dict[str, Any]]:
    """The complete rows of a metrics file, none where there is no file; the last one may have been cut off when its
    process was killed, or not be written to its end yet."""
    try:
        with open(path, newline="", encoding="utf-8") as file:
            rows = [row for row in csv.DictReader(file) if None not in row.values()]
    except FileNotFoundError:
        return []
    return [{**row, "step": int(row["step"])} for row in rows]


def build(name: str, spec: Mapping[str, Any], folder: Path, run: str | None = None) -> Logger:
    """The logger that the entry `logger.<name>` of a config describes; it writes into `folder` unless told otherwise.

    One that takes an `id`, as that of Weights & Biases does, is given `run`: so a training that is resumed is one run
    there. Weights & Biases without an account logs offline, which is said in one line.

    Raises:
        ConfigError: it cannot be made, for example because its package is missing.
    """
    if not isinstance(spec, Mapping) or "_target_" not in spec:
        raise ConfigError(f"logger.{name}: expected a mapping with a _target_, found {spec!r}")
    target = str(spec["_target_"])
    if "wandb" in target.lower() and "WANDB_MODE" not in os.environ and not _has_wandb_account():
        os.environ["WANDB_MODE"] = "offline"
        print(f"wandb: no account found, logging offline into {folder / 'wandb'} (`wandb sync` uploads it later)")
    try:
        accepted = inspect.signature(hydra.utils.get_class(target)).parameters
        given = {"save_dir": str(folder), "id": run}
        return hydra.utils.instantiate({key: value for key, value in given.items() if key in accepted} | dict(spec))
    except Exception as error:  # whatever a third party's constructor raises
        raise ConfigError(f"logger.{name}: {_reason(error)}") from error


def close() -> None:
    """End what a logger keeps open for the whole process: the next run of a sweep is another one."""
    wandb = sys.modules.get("wandb")
    if wandb is not None and wandb.run is not None:
        wandb.finish()


def _has_wandb_account() -> bool:
    if os.environ.get("WANDB_API_KEY"):
        return True
    try:
        return netrc.netrc().authenticators(_WANDB_HOST) is not None
    except (OSError, netrc.NetrcParseError):
        return False


def _reason(error: BaseException) -> str:
    """The first line of the exception below Hydra's wrapping."""
    while error.__cause__ is not None:
        error = error.__cause__
    return first_line(error)
