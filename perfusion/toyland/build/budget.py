"""Training for a stated time: resumable loops in one process per core, gradients averaged over the processes."""

from __future__ import annotations

import json
import math
import os
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from perfusion.bars import Bar
from perfusion.files import atomic_path
from perfusion.toyland.build.muon import Muon
from perfusion.toyland.precision import bfloat16_pays

WARMUP_STEPS = 100
ADAM_SHARE = 0.1  # AdamW's learning rate, as a share of Muon's
START = "start"  # the state that `build.begin_from` makes of finished weights
SAVE_EVERY = 60.0  # seconds


def run_workers(target: Callable[..., None], *args: object, processes: int | None = None) -> None:
    """Call `target(*args)` in `processes` processes that share a gloo group; default: one per core, one with CUDA.

    One single-threaded process per core beats many threads on models this small, and does not stall when a neighbour
    takes a core. `target` must be importable (the processes are spawned). A worker's exception is raised here.
    """
    count = processes or (1 if torch.cuda.is_available() else os.cpu_count() or 1)
    if count == 1:
        target(*args)
        return
    with TemporaryDirectory() as folder:
        mp.spawn(_worker, args=(count, f"file://{folder}/meeting", target, args), nprocs=count)


def _worker(rank: int, count: int, meeting: str, target: Callable[..., None], args: tuple[object, ...]) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=meeting, rank=rank, world_size=count)
    try:
        target(*args)
    finally:
        dist.destroy_process_group()


def rank() -> int:
    """Index of this process, 0 outside `run_workers`."""
    return dist.get_rank() if dist.is_initialized() else 0


def world_size() -> int:
    """Number of processes that train together, 1 outside `run_workers`."""
    return dist.get_world_size() if dist.is_initialized() else 1


def device() -> torch.device:
    """CUDA when there is one, else the CPU."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def _is_matrix(key: str, parameter: Tensor) -> bool:
    """Whether Muon should move the parameter: a hidden layer's weight, large in both dimensions."""
    return parameter.ndim >= 2 and "embed" not in key and min(len(parameter), parameter[0].numel()) > 3


class BudgetedTraining:
    """Muon with an EMA of the weights for `seconds` of wall-clock time, resumed from `folder` when it holds a state.

    Muon moves matrices and convolutions; AdamW moves vectors, embeddings (the time's included) and layers of three
    outputs or fewer. The learning rate warms up over 100 steps and then falls by a cosine of the share of the time that
    is spent, so a budget of 3 minutes and one of 3 hours both end at rate zero.

    Iterating yields the step number until the time is over, and ends with the averaged weights in the modules; the
    loop's body computes a loss and hands it to `update`. Spent time, steps and samples survive a restart.

    Args:
        name: what is trained, for the progress bar and the file name.
        modules: trained together; their parameters carry gradients.
        folder: where `<name>.safetensors` (weights, EMA, optimizers) is kept while training.
        seconds: the budget, over all restarts.
        rate: Muon's peak learning rate; AdamW has a tenth of it.
        batch: samples per step in this process, for the count of samples seen.
        ema: how much of the average each step keeps; less at the beginning.
        start: names of states in `folder` whose averaged weights training starts from, the later over the earlier, as
            far as they are there and name and shape are the same.
    """

    def __init__(
        self,
        name: str,
        modules: dict[str, nn.Module],
        folder: Path,
        seconds: float,
        rate: float,
        batch: int,
        ema: float = 0.999,
        start: Sequence[str] = (START,),
    ) -> None:
        self.name, self.seconds, self.batch, self.decay = name, seconds, batch, ema
        self.path = folder / f"{name}.safetensors"
        self.parameters = {
            f"{part}.{key}": value
            for part, module in modules.items()
            for key, value in module.named_parameters()
            if value.requires_grad
        }
        for path in (folder / f"{earlier}.safetensors" for earlier in start):
            known = load_file(path) if path.exists() else {}
            averages = {key: known[f"ema/{key}"] for key in self.parameters if f"ema/{key}" in known}
            self._put({key: value for key, value in averages.items() if value.shape == self.parameters[key].shape})
        self.ema = {key: value.detach().clone() for key, value in self.parameters.items()}
        matrices = {key: value for key, value in self.parameters.items() if _is_matrix(key, value)}
        rest = [value for key, value in self.parameters.items() if key not in matrices]
        self.optimizers: list[torch.optim.Optimizer] = []
        if matrices:
            dtype = torch.bfloat16 if bfloat16_pays(device()) else torch.float32
            self.optimizers.append(Muon(matrices.values(), rate, dtype=dtype))
        if rest:
            self.optimizers.append(torch.optim.AdamW(rest, lr=ADAM_SHARE * rate, betas=(0.9, 0.99), weight_decay=0.01))
        self.step, self.samples, self.elapsed, self.loss = 0, 0, 0.0, math.nan
        if self.path.exists():
            self._load()

    @property
    def turn(self) -> int:
        """Which batch this process is at, counted over the steps and processes: no two have the same number."""
        return self.step * world_size() + rank()

    def __iter__(self) -> Iterator[int]:
        started, saved = time.monotonic() - self.elapsed, time.monotonic()
        bar = Bar(
            total=round(self.seconds),
            initial=round(self.elapsed),
            desc=self.name,
            unit="s",
            disable=rank() != 0,
            bar_format="{desc}: {percentage:3.0f}% |{bar}| {n_fmt}/{total_fmt} s, {remaining} left{postfix}",
            mininterval=2,
        )
        while self.elapsed < self.seconds:
            yield self.step
            self.step += 1
            self.samples += self.batch * world_size()
            # Every process must see the same clock, or one would leave the loop while another waits for its gradients.
            elapsed = torch.tensor(time.monotonic() - started, dtype=torch.float64)
            if dist.is_initialized():
                dist.all_reduce(elapsed, op=dist.ReduceOp.MAX)
            self.elapsed = float(elapsed)
            bar.n = round(self.elapsed)
            bar.set_postfix_str(f"loss {self.loss:.4f}, {self.samples:,} samples", refresh=False)
            bar.update(0)
            if rank() == 0 and time.monotonic() - saved > SAVE_EVERY:
                self.save()
                saved = time.monotonic()
        bar.close()
        if rank() == 0:
            self.save()
        self._put(self.ema)

    def update(self, loss: Tensor) -> None:
        """Backward, average the gradients over the processes, one step of each optimizer, one EMA step."""
        loss.backward()
        parameters = list(self.parameters.values())
        for parameter in parameters:
            if parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)
        if world_size() > 1:
            gradients = [p.grad for p in parameters if p.grad is not None]
            flat = torch.cat([g.reshape(-1) for g in gradients])
            dist.all_reduce(flat)
            flat /= world_size()
            for gradient, part in zip(gradients, flat.split([g.numel() for g in gradients]), strict=True):
                gradient.copy_(part.view_as(gradient))
        nn.utils.clip_grad_norm_(parameters, 1.0)
        warm = min(1.0, (self.step + 1) / WARMUP_STEPS)
        fallen = warm * 0.5 * (1 + math.cos(math.pi * min(1.0, self.elapsed / self.seconds)))
        for optimizer in self.optimizers:
            for group in optimizer.param_groups:
                group["lr"] = group.setdefault("initial_lr", group["lr"]) * fallen
            optimizer.step()
            optimizer.zero_grad(set_to_none=False)
        decay = min(self.decay, (1 + self.step) / (10 + self.step))
        with torch.no_grad():
            torch._foreach_lerp_(list(self.ema.values()), [p.detach() for p in parameters], 1 - decay)
        value = float(loss.detach())
        self.loss = value if math.isnan(self.loss) else 0.98 * self.loss + 0.02 * value

    def save(self) -> None:
        """Write weights, EMA and optimizer state beside the old file, then replace it."""
        tensors = {f"weight/{k}": v.detach() for k, v in self.parameters.items()}
        tensors |= {f"ema/{k}": v for k, v in self.ema.items()}
        for optimizer in self.optimizers:
            for index, state in optimizer.state_dict()["state"].items():
                tensors |= {f"{type(optimizer).__name__}/{index}/{k}": v for k, v in state.items()}
        progress = {"step": self.step, "samples": self.samples, "elapsed": self.elapsed, "loss": self.loss}
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with atomic_path(self.path) as beside:
            save_file({k: v.contiguous() for k, v in tensors.items()}, beside, {"progress": json.dumps(progress)})

    def _load(self) -> None:
        with safe_open(self.path, "pt") as file:
            progress = json.loads(file.metadata()["progress"])
        self.step, self.samples = progress["step"], progress["samples"]
        self.elapsed, self.loss = progress["elapsed"], progress["loss"]
        tensors = load_file(self.path)
        self._put({key: tensors[f"weight/{key}"] for key in self.parameters})
        for key, average in self.ema.items():
            average.copy_(tensors[f"ema/{key}"])
        for optimizer in self.optimizers:
            content = optimizer.state_dict()
            for name, value in tensors.items():
                if name.startswith(f"{type(optimizer).__name__}/"):
                    _, index, key = name.split("/")
                    content["state"].setdefault(int(index), {})[key] = value
            optimizer.load_state_dict(content)

    @torch.no_grad()
    def _put(self, values: dict[str, Tensor]) -> None:
        for key, value in values.items():
            self.parameters[key].copy_(value)
