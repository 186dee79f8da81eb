"""`benchmarks.train_step` and `train_sd15` on Stable Diffusion 1.5: that both sides do on a CUDA device what they say,
tried on a CPU with a small model in its place and a clock and a memory of the tests'."""

import weakref
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch

from benchmarks import __main__ as command
from benchmarks import pipelines, report, timing, train_sd15, train_step
from benchmarks.catalogue import BENCHMARKS, Benchmark
from benchmarks.timing import Amounts
from perfusion.methods.base import build
from tests.pipelines import tiny_pipeline

CPU = torch.device("cpu")


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pipelines, "_stable_diffusion", lambda device: tiny_pipeline())


@pytest.fixture
def recomputed(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """One entry for each checkpoint that diffusers asks for."""
    calls: list[int] = []
    checkpoint = torch.utils.checkpoint.checkpoint

    def noted(*args: Any, **keywords: Any) -> Any:
        calls.append(1)
        return checkpoint(*args, **keywords)

    monkeypatch.setattr(torch.utils.checkpoint, "checkpoint", noted)
    return calls


def test_without_cuda_a_step_is_measured_on_toyland_alone(capsys: pytest.CaptureFixture[str]) -> None:
    assert [pair.model for pair in train_step.pairs(CPU)] == ["toyland"]
    assert "train_step of sd15 needs CUDA: left out" in capsys.readouterr().out
    assert build({"name": "perfusion"}, pipelines.WORD).options.batch_size == train_step.BATCH


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize(
    "model", [pytest.param(name, marks=pytest.mark.slow if name == "sd15" else ()) for name in train_sd15.PRECISIONS]
)
def test_both_sides_take_steps_in_their_precision(
    model: str, checkpointing: bool, small: None, recomputed: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    outputs: list[torch.dtype] = []
    took: list[int] = []

    def measure(step: Callable[[], object]) -> float:
        before = len(recomputed)
        conv = torch.nn.Conv2d.forward

        def noted(self: torch.nn.Conv2d, x: torch.Tensor) -> torch.Tensor:
            found = conv(self, x)
            outputs.append(found.dtype)
            return found

        with monkeypatch.context() as patch:
            patch.setattr(torch.nn.Conv2d, "forward", noted)
            result = step()
        assert isinstance(result, torch.Tensor) and result.isfinite().all()
        took.append(len(recomputed) - before)
        return float(len(took))

    found = train_sd15.compared("train_peak", model, CPU, checkpointing, measure, "bytes", size=1)
    assert found == Amounts("train_peak", model, 1.0, 2.0, "bytes")
    assert set(outputs) == {train_sd15.PRECISIONS[model]}
    assert took[0] == took[1] and (took[0] > 0) == checkpointing


def test_a_side_is_gone_before_the_other_is_measured(small: None, monkeypatch: pytest.MonkeyPatch) -> None:
    there: list[int] = []
    living: list[Any] = []
    build = pipelines.pipeline

    def noted(model: str, device: torch.device) -> Any:
        made = build(model, device)
        living.append(weakref.ref(made))
        return made

    monkeypatch.setattr(train_step, "pipeline", noted)

    def measure(step: Callable[[], object]) -> float:
        step()
        there.append(sum(pipe() is not None for pipe in living))
        return 1.0

    train_sd15.compared("train_peak", "sd15", CPU, False, measure, "bytes", size=1)
    assert len(living) == 2 and there == [1, 1]


def test_the_peak_is_that_of_the_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    peak = [900]  # of what was before
    monkeypatch.setattr(torch.cuda, "reset_peak_memory_stats", lambda device: peak.__setitem__(0, 0))
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda device: peak[0])
    sizes = iter([100, 300, 200])
    assert train_sd15.peak_bytes(lambda: peak.__setitem__(0, max(peak[0], next(sizes))), CPU) == 300
    assert next(sizes, None) is None, "all steps were taken"


def test_seconds_are_those_of_all_steps_after_the_first_few(monkeypatch: pytest.MonkeyPatch) -> None:
    now, taken = [0.0], [0]

    def step() -> None:
        taken[0] += 1
        now[0] += 100.0 if taken[0] <= timing.WARM_UPS else 0.25

    monkeypatch.setattr(timing, "CLOCKS", {"wall": lambda: now[0]})
    assert train_sd15.seconds(step, CPU, 40) == pytest.approx(10.0)
    assert taken[0] == 40 + timing.WARM_UPS


def test_what_needs_cuda_is_measured_with_and_without_checkpointing(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[tuple[str, str, bool]] = []

    def compared(name: str, model: str, device: torch.device, checkpointing: bool, measure: Any, clock: Any) -> Amounts:
        asked.append((name, model, checkpointing))
        assert measure.func is (train_sd15.seconds if clock == "wall" else train_sd15.peak_bytes)
        return Amounts(name, model, 50, 48, clock)

    monkeypatch.setattr(train_sd15, "compared", compared)
    cuda_only = sorted(name for name, benchmark in BENCHMARKS.items() if benchmark.cuda_only)
    found = [amounts for name in cuda_only for amounts in BENCHMARKS[name].run(CPU)]
    assert asked == [
        ("train_400", "sd15_bf16", False),
        ("train_400_checkpointing", "sd15_bf16", True),
        ("train_peak", "sd15_bf16", False),
        ("train_peak", "sd15", False),
        ("train_peak_checkpointing", "sd15_bf16", True),
        ("train_peak_checkpointing", "sd15", True),
    ]
    assert isinstance(found[0], Amounts)
    line = report.line(report.result(found[0], found[0].comparison(), found[0].clock, report.machine(CPU)))
    assert line.split() == ["train_400", "sd15_bf16", "1.042", "0.000", "50.00", "s", "48.00", "s", "1"]


# --- the command ----------------------------------------------------------------------------------------------------


@pytest.fixture
def stand_ins(monkeypatch: pytest.MonkeyPatch) -> None:
    def full(device: torch.device) -> Iterator[Amounts]:
        yield Amounts("full", "m", 1, 1)
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.\nmore")

    def fits(device: torch.device) -> Iterator[Amounts]:
        yield Amounts("fits", "m", 1, 1, "wall")

    gpu = Benchmark(fits, "", cuda_only=True)
    monkeypatch.setattr(command, "BENCHMARKS", {"full": Benchmark(full, ""), "gpu": gpu, "fits": Benchmark(fits, "")})


def test_what_cannot_run_here_is_left_out_and_named(
    stand_ins: None, tmp_path: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    threads = torch.get_num_threads()
    try:
        command.main([f"out={tmp_path / 'x.json'}", "device=cpu"])
    finally:
        torch.set_num_threads(threads)
    said = capsys.readouterr().out
    assert "gpu needs CUDA: left out" in said
    assert "full does not fit into the device's memory: left out (CUDA out of memory. Tried to allocate 2" in said
    rows = report._read(tmp_path / "x.json")
    assert [(row["name"], row["clock"]) for row in rows] == [("fits", "wall"), ("full", "bytes")]
