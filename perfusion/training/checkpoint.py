"""Lightning checkpoints as safetensors files: no pickle, written atomically, the last one and the one before kept."""

from __future__ import annotations

import hashlib
import json
import logging
from pathlib import Path
from typing import Any

import torch
from lightning.fabric.plugins import CheckpointIO
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from perfusion.files import PathLike, atomic_path
from perfusion.training.run_folder import CHECKPOINTS, checkpoints_in

FORMAT = "perfusion-checkpoint-1"
SUFFIX = ".safetensors"
_STEM = "step-"

_log = logging.getLogger(__name__)


class CheckpointError(ValueError):
    """A checkpoint file that cannot be read; names the file and what is wrong with it."""


class SafetensorsCheckpointIO(CheckpointIO):
    """Writes a Lightning checkpoint, a nest of containers, as ONE safetensors file.

    Tensors are the file's tensors; everything around them is JSON in its metadata, with the types of keys and
    containers kept, so what is loaded equals what was saved. A digest over both finds damage that leaves the file
    readable.
    """

    def save_checkpoint(self, checkpoint: dict[str, Any], path: PathLike, storage_options: Any = None) -> None:
        """Raises TypeError for a value that is neither a tensor, a container nor a plain JSON value."""
        tensors: dict[str, Tensor] = {}
        tree = json.dumps(_pack(checkpoint, tensors, "checkpoint"))
        metadata = {"format": FORMAT, "tree": tree, "digest": _digest(tree, tensors)}
        Path(path).parent.mkdir(parents=True, exist_ok=True)
        with atomic_path(path) as temporary:
            save_file(tensors, temporary, metadata)

    def load_checkpoint(
        self, path: PathLike, map_location: Any = None, weights_only: bool | None = None
    ) -> dict[str, Any]:
        """The checkpoint in a file, its tensors on the CPU unless `map_location` names a device.

        Raises:
            CheckpointError: unreadable, truncated, damaged, or another kind of file.
        """
        try:
            if Path(path).exists() and not Path(path).is_file():  # a pipe would be waited for
                raise CheckpointError(f"{path}: expected a file, found a folder or a device")
            with safe_open(path, framework="pt") as file:
                metadata = file.metadata() or {}
                tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (not a dict)
        except (SafetensorError, OSError) as error:
            raise CheckpointError(f"{path}: not a readable checkpoint: {error}") from error
        if metadata.get("format") != FORMAT:
            raise CheckpointError(f"{path}: expected a file of format {FORMAT!r}, found {metadata.get('format')!r}")
        if metadata.get("digest") != _digest(metadata.get("tree", ""), tensors):
            raise CheckpointError(f"{path}: damaged, its content does not match its digest")
        if map_location is not None:
            tensors = {name: tensor.to(map_location) for name, tensor in tensors.items()}
        return _unpack(json.loads(metadata["tree"]), tensors)

    def remove_checkpoint(self, path: PathLike) -> None:
        Path(path).unlink(missing_ok=True)


class Checkpoints(ModelCheckpoint):
    """Saves `checkpoints/step-<n>.safetensors` in the trainer's root folder, keeping the last two.

    Args:
        every: optimizer steps between two checkpoints.
    """

    FILE_EXTENSION = SUFFIX

    def __init__(self, every: int = 50) -> None:
        super().__init__(
            filename=_STEM + "{step:06d}",
            auto_insert_metric_name=False,
            monitor="step",  # the "best" two steps are the highest two
            mode="max",
            save_top_k=2,
            every_n_train_steps=every,
            enable_version_counter=False,  # a step that is trained again replaces its file
        )

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        self.dirpath = str(Path(trainer.default_root_dir).resolve() / CHECKPOINTS)
        super().setup(trainer, pl_module, stage)

    def on_train_batch_end(self, *_: Any) -> None:
        """Nothing: what is logged and validated of this step comes after it."""

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        """Save the step before, if it is due: a training that goes on from there does not log it again."""
        if trainer.global_step % self._every_n_train_steps == 0:
            self.save(trainer)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Save the last step, due or not."""
        self.save(trainer)

    def save(self, trainer: Trainer) -> None:
        """Save the step that was done last, unless it is saved already."""
        if not self._should_skip_saving_checkpoint(trainer):
            self._save_topk_checkpoint(trainer, self._monitor_candidates(trainer))


def newest_readable(folder: Path) -> Path | None:
    """The checkpoint of the highest step in `folder` that can be read; None if there is none.

    A damaged one is passed over with a warning: training goes on from the one before it.
    """
    for path in sorted(checkpoints_in(folder), key=step_of, reverse=True):
        try:
            SafetensorsCheckpointIO().load_checkpoint(path)
        except CheckpointError as error:
            _log.warning("%s; trying the checkpoint before it", error)
        else:
            return path
    return None


def step_of(path: Path) -> int:
    """The optimizer step at which a checkpoint of `Checkpoints` was saved."""
    return int(path.name.removeprefix(_STEM).removesuffix(SUFFIX))


def _pack(value: Any, tensors: dict[str, Tensor], where: str) -> Any:
    """`value` as JSON: tensors go into `tensors`; mappings and tuples become one-key objects that name their kind."""
    if isinstance(value, Tensor):
        name = f"{len(tensors):05d}"
        tensors[name] = value.detach().cpu().clone().contiguous()
        return {"tensor": name}
    if isinstance(value, dict):
        return {"dict": [[_pack(k, tensors, where), _pack(v, tensors, f"{where}.{k}")] for k, v in value.items()]}
    if isinstance(value, list | tuple):
        items = [_pack(item, tensors, f"{where}[{i}]") for i, item in enumerate(value)]
        return items if isinstance(value, list) else {"tuple": items}
    if value is None or type(value) in (bool, int, float, str):
        return value
    raise TypeError(f"{where}: a checkpoint cannot hold {type(value).__name__}; expected tensors and plain values")


def _unpack(value: Any, tensors: dict[str, Tensor]) -> Any:
    if isinstance(value, list):
        return [_unpack(item, tensors) for item in value]
    if not isinstance(value, dict):
        return value
    ((kind, content),) = value.items()
    if kind == "tensor":
        return tensors[content]
    if kind == "tuple":
        return tuple(_unpack(item, tensors) for item in content)
    return {_unpack(key, tensors): _unpack(item, tensors) for key, item in content}


def _digest(tree: str, tensors: dict[str, Tensor]) -> str:
    """SHA-256 over the JSON and every tensor's bytes, in the order of their names."""
    digest = hashlib.sha256(tree.encode())
    for name in sorted(tensors):
        digest.update(tensors[name].flatten().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()
