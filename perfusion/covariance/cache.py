"""Second moments on disk: a file for each set of inputs, found again by what it was made of."""

import hashlib
import json
import logging
from collections.abc import Callable, Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save

from perfusion.covariance.moment import CovarianceError, SecondMoment
from perfusion.files import atomic_write_bytes

CACHE_FORMAT = 1

_log = logging.getLogger(__name__)


def cached_second_moment(
    key_inputs: Mapping[str, object], compute: Callable[[], SecondMoment], folder: Path
) -> SecondMoment:
    """`compute()`, or what an earlier call with the same `key_inputs` computed.

    `key_inputs` names everything that the result depends on (fingerprints of text encoder and tokenizer, hash of the
    captions, selection of tokens, dtype, ...) in JSON values; their order does not matter. The file is
    `<folder>/<first 16 hex digits of the key>.safetensors`, and its metadata holds them all. A file that is damaged or
    belongs to other inputs is logged as a warning and computed anew; so is a folder that cannot be written to.
    Raises CovarianceError for a key input that JSON cannot hold.
    """
    inputs = _canonical(key_inputs)
    path = folder / f"{hashlib.sha256(inputs.encode()).hexdigest()[:16]}.safetensors"
    try:
        return _read(path, inputs)
    except FileNotFoundError:
        pass
    except (OSError, SafetensorError, ValueError) as error:
        _log.warning("%s: cached second moment not usable (%s); computing it anew", path, error)
    moment = compute()
    metadata = {"inputs": inputs, "count": str(moment.count), "sha256": _digest(moment)}
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        atomic_write_bytes(path, save({"total": moment.total.contiguous()}, metadata))
    except OSError as error:  # a lost cache costs time, not the run
        _log.warning("%s: second moment not cached (%s)", path, error)
    return moment


def _canonical(key_inputs: Mapping[str, object]) -> str:
    """One text for equal inputs: sorted keys, no spaces, and the version of the file format."""
    for name, value in key_inputs.items():
        try:
            json.dumps(value, sort_keys=True, allow_nan=False)
        except (TypeError, ValueError) as error:
            raise CovarianceError(
                f"cache key input '{name}': found {type(value).__name__} {value!r}, expected a JSON value"
            ) from error
    content = {"format": CACHE_FORMAT, "inputs": dict(key_inputs)}
    return json.dumps(content, sort_keys=True, separators=(",", ":"), allow_nan=False)


def _read(path: Path, inputs: str) -> SecondMoment:
    """The moment in `path`; OSError, SafetensorError or ValueError unless it is whole and belongs to `inputs`."""
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
    return moment


def _digest(moment: SecondMoment) -> str:
    return hashlib.sha256(f"{moment.count} ".encode() + moment.total.numpy().tobytes()).hexdigest()
