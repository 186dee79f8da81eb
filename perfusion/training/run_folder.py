"""The folder of one run: named after its config, so that the same command finds it again and resumes.

- concept.safetensors: the trained concept
- diffusers/: the same in the format that stock diffusers loads, where the method has one
- config.yaml: the whole config, resolved
- inputs.json: digests of the files that the config names, the working directory, and a name for this run
- metrics.csv: what was logged at every step
- metrics.json: final scores, step kept, seconds, peak memory, what it was made with
- samples.png: fixed prompts, the base model beside the concept
- progress/: what callbacks drew while training
- checkpoints/: while training only
- DONE: everything above is complete
- .training: while training only; which process it is
- .new/: the run that takes this one's place when it is finished (run.overwrite=true); .ready/ while it does so

A job of a sweep leaves two files more: output.log, what its process said, and ERROR, why its last attempt ended.
"""

from __future__ import annotations

import contextlib
import dataclasses
import fcntl
import glob
import hashlib
import json
import os
import re
import resource
import secrets
import shutil
import socket
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, TextIO

from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException
from yaml import YAMLError

from perfusion.config import ConfigError, TrainConfig, checked
from perfusion.data.formats import OTHERS, SUFFIXES
from perfusion.files import atomic_write_text, remove_unfinished

CHECKPOINTS = "checkpoints"  # folder below that of the run

_CHECKPOINT = re.compile(r"step-\d+\.safetensors")
_HEADER = "# Train this again, or with changes:  python -m perfusion.train from=<this file> [key=value ...]\n"

# What does not change the result: where it goes, who watches, how often it is saved, what is computed twice.
_IGNORED = (
    "run",
    "logger",
    "trainer.enable_progress_bar",
    "callbacks.checkpoint",
    "backbone.gradient_checkpointing",
    "backbone.covariance.cache",
    "concept.masks_cache",
    "concept.prior_cache",
)
# Options that came later, and the values at which a run is the one that it was without them.
_LATER = {
    "concept.captions": None,
    "concept.templates": None,
    "concept.mirror": False,
    "method.rate_schedule": "constant",
    "method.warmup_steps": 0,
    "method.min_snr_gamma": None,
}


Inputs = Mapping[str, Mapping[str, str]]  # key of the config -> name of a file -> digest


class _Below:
    """A path in the folder of a run."""

    def __init__(self, name: str) -> None:
        self.name = name

    def __get__(self, folder: RunFolder, kind: type[RunFolder]) -> Path:
        return folder.path / self.name


@dataclasses.dataclass(frozen=True)
class RunFolder:
    """Paths of a run, and its states: new, begun (has a config), finished (has the marker and the concept)."""

    path: Path
    concept = _Below("concept.safetensors")
    diffusers = _Below("diffusers")
    config = _Below("config.yaml")
    inputs = _Below("inputs.json")
    metrics_csv = _Below("metrics.csv")
    metrics = _Below("metrics.json")
    samples = _Below("samples.png")
    checkpoints = _Below(CHECKPOINTS)
    error = _Below("ERROR")
    log = _Below("output.log")
    marker = _Below("DONE")
    progress = _Below("progress")

    @classmethod
    def of(cls, config: TrainConfig) -> RunFolder:
        """`run.dir`, or `<root>/<experiment>/<concept>-<method>-<hash of the config>`; nothing is created."""
        if config.run.dir is not None:
            return cls(Path(config.run.dir).expanduser())
        name = "-".join([_plain(config.concept.name), _plain(str(config.method["name"])), config_hash(config)])
        return cls(Path(config.run.root).expanduser() / _plain(config.experiment) / name)

    @property
    def finished(self) -> bool:
        return self.marker.exists() and self.concept.is_file()

    @property
    def replacement(self) -> RunFolder:
        """Where the run grows that shall take the place of the one that lies here."""
        return RunFolder(self.path / ".new")

    @property
    def _ready(self) -> RunFolder:
        """The replacement, once what was here is removed."""
        return RunFolder(self.path / ".ready")

    @property
    def unsettled(self) -> bool:
        """Whether a process was killed while a finished replacement took its place; `settle` goes on with it."""
        return self.replacement.finished or self._ready.path.exists()

    def settle(self) -> None:
        """Put a finished replacement in the place of what a run wrote here; nothing where there is none.

        At every moment one of the two lies on the disk as a whole, and a second call goes on where a kill ended the
        first. Other files stay.
        """
        if self.replacement.finished and not self._ready.path.exists():
            self.clear()
            os.replace(self.replacement.path, self._ready.path)
        if self._ready.path.exists():
            _move_into(self._ready.path, self.path, last=self.marker.name)

    @contextlib.contextmanager
    def held(self) -> Iterator[None]:
        """Hold the folder, made if missing, against other processes; however this one ends, it is free then.

        Raises:
            ConfigError: another process holds it; the message says which.
        """
        self.path.mkdir(parents=True, exist_ok=True)
        lock = self._lock
        try:
            with _locked(lock) as file:
                file.truncate(0)
                file.write(f"{os.getpid()} on {socket.gethostname()}")
                file.flush()
                remove_unfinished(self.path)
                try:
                    yield
                finally:
                    lock.unlink(missing_ok=True)
        finally:
            with contextlib.suppress(OSError):  # not empty
                self.path.rmdir()

    @property
    def _lock(self) -> Path:
        return self.path / ".training"

    def tidy(self) -> None:
        """Remove what a process left that was killed after all was done."""
        if self._lock.exists():
            with contextlib.suppress(ConfigError), self.held():  # unless another one holds it
                pass

    def holds(self, config: TrainConfig, inputs: Inputs | None = None) -> bool:
        """Whether the run that lies here, finished or not, is the one of `config`, and read these `inputs`."""
        try:
            return config_hash(_as_written(self.config)) == config_hash(config) and not self._changed(inputs)
        except ConfigError:
            return False

    def check_place(self) -> None:
        """Hold that a run may write here.

        Raises:
            ConfigError: the folder is no run's, and holds pictures, or files that a run would replace; or a config.yaml
                that no run wrote.
        """
        if self.config.exists():
            if not self.config.read_text(encoding="utf-8", errors="replace").startswith(_HEADER):
                raise ConfigError(f"{self.config} was not written by a run, so it stays; choose another run.dir=")
            return
        if self.unsettled or not self.path.is_dir():
            return
        written = [
            file.name
            for file in (*self._files, *self._folders)
            if file.exists() and file not in (self.error, self.inputs)
        ]
        written += [f"{CHECKPOINTS}/{file.name}" for file in checkpoints_in(self.checkpoints)]
        if written:
            raise ConfigError(
                f"{self.path} holds {written[0]}, and no config.yaml that says of which run, so nothing is replaced "
                "there: move it away, or choose another run.dir="
            )
        pictures = sorted(file.name for file in self.path.iterdir() if file.suffix.lower() in (*SUFFIXES, *OTHERS))
        if pictures:
            raise ConfigError(
                f"{self.path} is no run's folder, for it holds pictures ({', '.join(pictures[:3])}) and no config.yaml"
                "; choose another run.dir="
            )

    def check(self, config: TrainConfig, inputs: Inputs | None = None) -> None:
        """Hold that a run that lies here already is the one of `config`, and read what it would read now.

        Args:
            inputs: see `perfusion.training.inputs`; runs of former versions do not say what they read, and pass.

        Raises:
            ConfigError: it is another one; the message names the keys, or the files, that differ.
        """
        if not self.config.exists() or self.holds(config, inputs):
            return
        then, now = _flat(_as_written(self.config)), _flat(config)
        # By their JSON, as the hash: 1 and 1.0 are equal, and yet differ.
        texts = [{key: json.dumps(value) for key, value in values.items()} for values in (then, now)]
        differing = [key for key in sorted({*then, *now}) if texts[0].get(key) != texts[1].get(key)]
        if differing:
            key = differing[0]
            found = f"{key} is {then.get(key)!r} there and {now.get(key)!r} here"
            more = f", {len(differing) - 1} more keys differ" if len(differing) > 1 else ""
            raise ConfigError(
                f"{self.path} holds a run of another config ({found}{more}); "
                "choose another run.dir=, or replace that run with run.overwrite=true"
            )
        raise ConfigError(
            f"{self.path} holds a run that has read other files ({'; '.join(self._changed(inputs))}); "
            "put those back, choose another run.dir=, or replace that run with run.overwrite=true"
        )

    def _changed(self, now: Inputs | None) -> list[str]:
        """Which of the files that the run has read are others now, and how."""
        said = _read_inputs(self.inputs)
        if said is None or now is None:
            return []
        then: Inputs = said["files"]
        changed = []
        for key in sorted({*then, *now}):
            before, after = then.get(key, {}), now.get(key, {})
            for name in sorted({*before, *after}):
                if before.get(name) != after.get(name):
                    how = "is gone" if name not in after else "is new" if name not in before else "is another"
                    changed.append(f"{key}: {name} {how}")
        return changed

    def begin(self, config: TrainConfig, inputs: Inputs | None = None) -> None:
        """Make the folder and write its config, and what it reads; what a former attempt died of counts no more."""
        self.path.mkdir(parents=True, exist_ok=True)
        for former in (self.error, self.marker):  # that of a run whose concept was removed
            former.unlink(missing_ok=True)
        if inputs is not None:
            said = {"directory": os.getcwd(), "id": self.id or secrets.token_hex(4), "files": inputs}
            atomic_write_text(self.inputs, json.dumps(said, indent=2) + "\n")
        # Who starts from this config does not mean to replace a run once more.
        kept = dataclasses.replace(config, run=dataclasses.replace(config.run, overwrite=False))
        atomic_write_text(self.config, _HEADER + OmegaConf.to_yaml(dataclasses.asdict(kept)))

    @property
    def id(self) -> str | None:
        """A name that no other run has, the same for all processes that go on with this one; None before `begin`."""
        return (_read_inputs(self.inputs) or {}).get("id")

    def clear(self) -> None:
        """Remove what a run wrote here, the marker first and the config last; other files stay, and all of them where
        there was no run.

        Raises:
            ConfigError: there is a config.yaml that no run wrote.
        """
        self.check_place()
        if not self.config.exists():
            return
        self.marker.unlink(missing_ok=True)
        self._remove_checkpoints()
        for made in self._folders:
            shutil.rmtree(made, ignore_errors=True)
        for file in self._files:
            file.unlink(missing_ok=True)

    def finish(self, metrics: Mapping[str, Any]) -> None:
        """Write `metrics.json`, remove the checkpoints and set the marker, in this order."""
        atomic_write_text(self.metrics, json.dumps(metrics, indent=2) + "\n")
        self._remove_checkpoints()
        atomic_write_text(self.marker, "")

    @property
    def _files(self) -> tuple[Path, ...]:
        """What a run writes, in the order in which it is removed."""
        return (
            self.marker,
            self.metrics,
            self.concept,
            self.samples,
            self.metrics_csv,
            self.error,
            self.inputs,
            self.config,
        )

    @property
    def _folders(self) -> tuple[Path, ...]:
        return (self.diffusers, self.progress)

    def _remove_checkpoints(self) -> None:
        """Of the training; a folder of this name may hold a user's own files as well."""
        for file in checkpoints_in(self.checkpoints):
            if file.is_file():
                file.unlink(missing_ok=True)
        with contextlib.suppress(OSError):  # not empty, or not there
            self.checkpoints.rmdir()


def checkpoints_in(folder: Path) -> list[Path]:
    """What is called `step-<number>.safetensors` in a folder, in no order."""
    return [path for path in folder.glob("*") if _CHECKPOINT.fullmatch(path.name)]


def config_hash(config: TrainConfig) -> str:
    """Eight hex digits over everything in a config that changes the result."""
    return hashlib.sha256(json.dumps(_flat(config), sort_keys=True).encode()).hexdigest()[:8]


def read_config(path: Path) -> TrainConfig:
    """The checked config in a `config.yaml`. Its pictures are those that the run has read, wherever this process works.

    Raises:
        ConfigError: the file cannot be read, or does not fit the schema.
    """
    config = _as_written(path)
    said = _read_inputs(RunFolder(path.parent).inputs)
    if said is not None:
        concept = config.concept
        places = {
            key: _seen_from(said["directory"], getattr(concept, key))
            for key in ("images", "masks", "prior", "templates")
        }
        config.concept = dataclasses.replace(concept, **places)
    return config


def _as_written(path: Path) -> TrainConfig:
    try:
        return checked(TrainConfig, OmegaConf.load(path))
    except (OSError, YAMLError, OmegaConfBaseException, TypeError) as error:
        raise ConfigError(f"{path}: not a readable config: {error}") from error


def _read_inputs(path: Path) -> dict[str, Any] | None:
    """What inputs.json says; None where there is none."""
    try:
        said = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None
    except (OSError, ValueError) as error:
        raise ConfigError(f"{path}: not readable as JSON: {error}") from error
    if not (isinstance(said, dict) and isinstance(said.get("files"), dict) and isinstance(said.get("directory"), str)):
        raise ConfigError(f"{path}: expected 'directory' and 'files', found another kind of file")
    return said


def _seen_from(directory: str, value: Any) -> Any:
    """A path, or several, as seen from a directory; what is nothing there stays as it is."""
    if isinstance(value, list):
        return [_seen_from(directory, one) for one in value]
    if not isinstance(value, str) or value.startswith("~"):
        return value
    place = os.path.join(directory, value)
    return place if os.path.exists(place) or glob.glob(place, recursive=True) else value


def peak_memory_bytes() -> int:
    """The most memory that this process has held: on the GPU if it has used one, else in RAM."""
    torch = sys.modules.get("torch")  # a process that has not imported it has used no GPU
    if torch is not None and torch.cuda.is_initialized():
        return torch.cuda.max_memory_allocated()
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024  # Linux counts in KiB


@contextlib.contextmanager
def _locked(path: Path) -> Iterator[TextIO]:
    """The open file at `path`, made if missing, locked for this process, which may remove it."""
    while True:
        with open(path, "a+", encoding="utf-8") as file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                file.seek(0)
                who = file.read() or "of an unknown number"
                raise ConfigError(f"{path.parent}: process {who} trains there; wait for it, or stop it") from None
            except OSError:  # a file system without locks
                yield file
                return
            if path.exists() and path.stat().st_ino == os.fstat(file.fileno()).st_ino:  # not removed meanwhile
                yield file
                return


def _move_into(source: Path, target: Path, last: str) -> None:
    """Move all that lies in `source` into `target`, the file `last` at the end, and remove `source`."""
    for path in sorted(source.iterdir(), key=lambda path: (path.name == last, path.name)):
        place = target / path.name
        if path.is_dir() and place.is_dir():  # one with a user's files in it
            _move_into(path, place, last)
        else:
            os.replace(path, place)
    source.rmdir()


def _plain(name: str) -> str:
    """A name as part of a path."""
    return re.sub(r"[^\w.+-]+", "_", name).strip("._") or "_"


def _flat(config: TrainConfig) -> dict[str, Any]:
    """Dotted key -> value of everything that changes the result."""
    flat: dict[str, Any] = {}

    def visit(value: Any, key: str) -> None:
        if key in _IGNORED or (key in _LATER and value == _LATER[key]):
            return
        if isinstance(value, dict):
            for name, inner in value.items():
                visit(inner, f"{key}.{name}" if key else str(name))
        else:
            flat[key] = value

    visit(dataclasses.asdict(config), "")
    return flat
