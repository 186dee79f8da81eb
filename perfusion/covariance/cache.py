"""Second moments on disk: a file for each set of inputs, found again by what it was made of."""

import hashlib
import json
import logging
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save

from perfusion.covariance.moment import CovarianceError, SecondMoment
from perfusion.files import atomic_write_bytes

CACHE_FORMAT = 1
SAVE_EVERY_S = 10.0  # seconds between two states of an unfinished sum

_log = logging.getLogger(__name__)


def cache_path(key_inputs: Mapping[str, object], folder: Path) -> Path:
    """The cache entry of these inputs: `<folder>/<first 16 hex digits of the key>.safetensors`."""
    return folder / f"{hashlib.sha256(_canonical(key_inputs).encode()).hexdigest()[:16]}.safetensors"


def cached_second_moment(
    key_inputs: Mapping[str, object], compute: Callable[[], SecondMoment], folder: Path
) -> SecondMoment:
    """`compute()`, or what an earlier call with the same `key_inputs` computed.

    `key_inputs` names everything that the result depends on (fingerprints of text encoder and tokenizer, hash of the
    captions, selection of positions, dtype, ...) in JSON values; their order does not matter. The file is
    `cache_path(key_inputs, folder)`, and its metadata holds them all. A file that is damaged or belongs to other inputs
    is logged as a warning and computed anew; so is a folder that cannot be written to. Once the file is there, every
    `PartialSum` that it supersedes is removed: of the same inputs, or of the same but a smaller `count`.
    """
    inputs, path = _canonical(key_inputs), cache_path(key_inputs, folder)
    try:
        return _read(path, inputs)[0]
    except FileNotFoundError:
        pass
    except (OSError, SafetensorError, ValueError) as error:
        _log.warning("%s: cached second moment not usable (%s); computing it anew", path, error)
    moment = compute()
    try:
        _write(path, moment, {"inputs": inputs})
        for superseded in _superseded(path, key_inputs):
            superseded.unlink(missing_ok=True)
    except OSError as error:  # a lost cache costs time, not the run
        _log.warning("%s: second moment not cached (%s)", path, error)
    return moment


class PartialSum:
    """How far the sum of one cache entry has come: a file beside the entry, from which an interrupted sum goes on.

    It holds the sum after a whole number of batches, so a sum that goes on adds the same products in the same order
    as one that was never interrupted, and ends in the same bits. It is written atomically: a process may be killed at
    any moment, and two that work on the same entry do not harm one another. One that is damaged, or was made with
    another batch size, is logged as a warning and the sum starts anew; so is a folder that cannot be written to.

    Args:
        key_inputs, folder: as in `cached_second_moment`.
    """

    def __init__(self, key_inputs: Mapping[str, object], folder: Path) -> None:
        self.path = _partial(cache_path(key_inputs, folder))
        self.captions = 0  # in the file
        self._inputs = _canonical(key_inputs)
        self._saved = time.monotonic()

    def load(self, batch_size: int) -> SecondMoment | None:
        """The sum of the first `self.captions` captions; None where there is nothing to go on from."""
        try:
            moment, metadata = _read(self.path, self._inputs)
            found, captions = int(metadata.get("batch_size", "")), int(metadata.get("captions", ""))
            if found != batch_size or captions < 1:
                raise CovarianceError(f"found {captions} captions in batches of {found}, expected {batch_size}")
        except FileNotFoundError:
            return None
        except (OSError, SafetensorError, ValueError) as error:
            _log.warning("%s: unfinished second moment not usable (%s); starting anew", self.path, error)
            return None
        self.captions = captions
        return moment

    def save(self, moment: SecondMoment, captions: int, batch_size: int) -> None:
        """Write the sum of the first `captions` captions, if the last state is older than `SAVE_EVERY_S`."""
        if time.monotonic() - self._saved < SAVE_EVERY_S:
            return
        metadata = {"inputs": self._inputs, "captions": str(captions), "batch_size": str(batch_size)}
        try:
            _write(self.path, moment, metadata)
            self.captions = captions
        except OSError as error:  # it can be tried again; the sum itself is not lost
            _log.warning("%s: unfinished second moment not saved (%s)", self.path, error)
        self._saved = time.monotonic()


def _partial(path: Path) -> Path:
    return path.with_suffix(f".partial{path.suffix}")


def _superseded(path: Path, key_inputs: Mapping[str, object]) -> Iterator[Path]:
    """The partial sums in the folder of the finished one at `path` that nobody will go on with."""
    yield _partial(path)
    others = {name: value for name, value in key_inputs.items() if name != "count"}
    for file in path.parent.glob(_partial(Path("*.safetensors")).name):
        try:
            with safe_open(file, framework="pt") as opened:
                found = json.loads((opened.metadata() or {})["inputs"])["inputs"]
            count = found.pop("count")
            smaller = found == others and count < key_inputs["count"]
        except (OSError, SafetensorError, ValueError, KeyError, TypeError, AttributeError):
            continue  # of another format, or just being replaced
        if smaller:
            yield file


def _canonical(key_inputs: Mapping[str, object]) -> str:
    """One text for equal inputs: sorted keys, no spaces, and the version of the file format."""
    content = {"format": CACHE_FORMAT, "inputs": dict(key_inputs)}
    return json.dumps(content, sort_keys=True, separators=(",", ":"), allow_nan=False)


def _write(path: Path, moment: SecondMoment, metadata: Mapping[str, str]) -> None:
    """OSError where it cannot be written."""
    path.parent.mkdir(parents=True, exist_ok=True)
    checked = {**metadata, "count": str(moment.count), "sha256": _digest(moment)}
    atomic_write_bytes(path, save({"total": moment.total.contiguous()}, checked))


def _read(path: Path, inputs: str) -> tuple[SecondMoment, dict[str, str]]:
    """The moment in `path` and the file's metadata; OSError, SafetensorError or ValueError unless it is whole and
    belongs to `inputs`."""
    with safe_open(path, framework="pt") as file:
        metadata = file.metadata() or {}
        if metadata.get("inputs") != inputs:
            raise CovarianceError(f"found key inputs {metadata.get('inputs')}, expected {inputs}")
        if list(file.keys()) != ["total"]:
            raise CovarianceError(f"found tensors {list(file.keys())}, expected ['total']")
        total = file.get_tensor("total").clone()  # own memory, not a view of the file
    if total.dtype != torch.float64 or total.dim() != 2 or total.shape[0] != total.shape[1]:
        raise CovarianceError(f"found {total.dtype} of shape {tuple(total.shape)}, expected float64 (d, d)")
    moment = SecondMoment(total, int(metadata.get("count", "")))
    if metadata.get("sha256") != _digest(moment):  # safetensors itself accepts flipped bits
        raise CovarianceError("found contents that differ from their checksum")
    return moment, metadata


def _digest(moment: SecondMoment) -> str:
    return hashlib.sha256(f"{moment.count} ".encode() + moment.total.numpy().tobytes()).hexdigest()
