"""`benchmarks`: that the harness finds a known ratio by a clock of the tests', what it writes, and that both sides of
every benchmark do what they say. Nothing here is timed. Stable Diffusion has a small model in its place."""

import json
import weakref
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from benchmarks import __main__ as command
from benchmarks import page, pipelines, projection, report, sampling, timing, training
from benchmarks.catalogue import BENCHMARKS, Benchmark
from benchmarks.timing import Found, Sides, compare
from perfusion.cli import run_cli
from tests.pipelines import tiny_pipeline

CPU = torch.device("cpu")


class Clock:
    """Time that passes only where a test says so."""

    def __init__(self) -> None:
        self.now = 0.0
        self.log: list[str] = []

    def __call__(self) -> float:
        return self.now

    def sides(self, *seconds: Callable[[], float]) -> Sides:
        def side(name: str, seconds: Callable[[], float]) -> Callable[[], None]:
            def run() -> None:
                self.log.append(name)
                self.now += seconds()

            return run

        return Sides(*map(side, "AB", seconds))


@pytest.fixture
def clock() -> Clock:
    return Clock()


def test_a_known_ratio_is_found_in_rounds_that_alternate(clock: Clock) -> None:
    found = compare(clock.sides(lambda: 0.2, lambda: 0.1), 4, CPU, clock)
    assert clock.log[-8:] == ["A", "B"] * 4
    assert found.ratio == pytest.approx(2) and found.spread == pytest.approx(0, abs=1e-9) and found.rounds == 4
    assert found.median == pytest.approx({"subject": 0.2, "baseline": 0.1})


def test_short_work_gets_more_rounds_and_long_work_no_more_than_it_may(clock: Clock) -> None:
    sides = clock.sides(lambda: 0.5, lambda: 0.25)
    assert compare(sides, 5, CPU, clock, least=7.5).rounds == 10
    assert compare(sides, 5, CPU, clock, least=0.5).rounds == 5
    assert compare(sides, 5, CPU, clock, least=7.5, most=7).rounds == 7
    assert compare(sides, 5, CPU, clock, least=7.5, most=3).rounds == 3


def test_first_calls_do_not_count_and_the_spread_is_the_interquartile_range(clock: Clock) -> None:
    seconds = iter([*[100] * (timing.WARM_UPS + 1), 1, 2, 3, 4, 50])
    found = compare(clock.sides(lambda: next(seconds), lambda: 1), 5, CPU, clock)
    assert (found.ratio, found.spread, found.median["subject"]) == pytest.approx((3, 2, 3))


def test_short_work_is_repeated_and_still_given_per_call(clock: Clock) -> None:
    found = compare(clock.sides(lambda: timing.WINDOW / 10, lambda: timing.WINDOW * 2), 2, CPU, clock)
    assert clock.log.count("A") == timing.WARM_UPS + 1 + 2 * 10
    assert clock.log.count("B") == timing.WARM_UPS + 1 + 2
    assert found.ratio == pytest.approx(0.05) and found.median["subject"] == pytest.approx(timing.WINDOW / 10)


def test_an_accelerator_is_waited_for_inside_every_measurement(clock: Clock, monkeypatch: pytest.MonkeyPatch) -> None:
    """A device that takes work at once and does it while it is waited for."""
    waiting = [0.0]

    def synchronize(device: torch.device) -> None:
        assert device.type == "cuda"
        clock.now, waiting[0] = clock.now + waiting[0], 0.0

    def queue(seconds: float) -> Callable[[], None]:
        return lambda: waiting.__setitem__(0, waiting[0] + seconds)

    monkeypatch.setattr(torch.accelerator, "synchronize", synchronize)
    found = compare(Sides(queue(0.2), queue(0.1)), 3, torch.device("cuda"), clock)
    assert found.median == pytest.approx({"subject": 0.2, "baseline": 0.1})


def test_only_one_thread_on_a_cpu_is_timed_by_the_process() -> None:
    assert timing.clock_for(CPU, 1) == "process"
    assert timing.clock_for(CPU, 2) == timing.clock_for(torch.device("cuda"), 1) == "wall"


# --- what is written ------------------------------------------------------------------------------------------------


def row(name: str, ratio: float, model: str = "m") -> report.Result:
    found = Found(ratio, {"subject": 0.002 * ratio, "baseline": 0.002}, 0.1, 5)
    return report.result(name, model, found, "wall", report.machine(CPU))


def counted(name: str, model: str, size: float) -> report.Result:
    return report.result(name, model, Found.of([size], [size]), "bytes", report.machine(CPU))


def test_a_row_holds_all_that_was_measured_and_where() -> None:
    found: Any = row("a", 1.5)
    assert list(found) == ["name", "model", "ratio", "median", "spread", "rounds", "clock", "machine"]
    where, median = found.pop("machine"), found.pop("median")
    assert found == {"name": "a", "model": "m", "ratio": 1.5, "spread": 0.1, "rounds": 5, "clock": "wall"}
    assert median == {"subject": pytest.approx(0.003), "baseline": 0.002}
    assert where.pop("cpu")
    assert where == {"threads": torch.get_num_threads(), "torch": torch.__version__, "device": "cpu"}


def test_results_replace_their_own_rows_and_leave_the_others(tmp_path: Path) -> None:
    path = tmp_path / "new" / "latest.json"
    report.write(path, [row("b", 1), row("a", 2), row("a", 3, "n")])
    report.write(path, [row("a", 4)])
    written = json.loads(path.read_text())
    assert [(r["name"], r["model"], r["ratio"]) for r in written] == [("a", "m", 4), ("a", "n", 3), ("b", "m", 1)]
    assert list(path.parent.iterdir()) == [path]


@pytest.mark.parametrize("content", ["{", '{"a": 1}', "[1]", '[{"name": "a"}]', "3"])
def test_a_file_that_holds_something_else_is_left_alone(tmp_path: Path, content: str) -> None:
    path = tmp_path / "latest.json"
    path.write_text(content)
    with pytest.raises(ValueError, match=r"out: .*latest\.json does not hold results"):
        report.write(path, [row("a", 4)])
    assert path.read_text() == content


def test_lines_stand_under_their_heads() -> None:
    line = report.line(row("projection_sampling", 1.5, "toyland"))
    assert len(line) == len(report.HEADER)
    assert line.split() == ["projection_sampling", "toyland", "1.500", "0.100", "3.00", "ms", "2.00", "ms", "5"]
    assert report.line(counted("a", "m", 5e6)).split()[2:] == ["1.000", "0.000", "5.0", "MB", "5.0", "MB", "1"]
    seconds = report.result("a", "m", Found.of([50], [48]), "wall", report.machine(CPU))
    assert report.line(seconds).split()[2:] == ["1.042", "0.000", "50.00", "s", "48.00", "s", "1"]


def test_the_page_says_what_was_measured_and_what_was_reached(tmp_path: Path) -> None:
    rows = [row("sampling_1", 0.98), row("train_step", 1.2), row("projection", 1.5)]
    page.write(tmp_path / "docs" / "page.md", [*rows, row("attach", 10.0), row("attach_first", 200.0)])
    lines = (tmp_path / "docs" / "page.md").read_text().splitlines()
    assert "| `sampling_1` | m | 0.980 | 0.100 | 1.00, reached | 1.96 ms | 2.00 ms | 5 |" in lines
    assert "| `train_step` | m | 1.200 | 0.100 | 1.05, not reached | 2.40 ms | 2.00 ms | 5 |" in lines
    assert "| `projection` | m | 1.500 | 0.100 |  | 3.00 ms | 2.00 ms | 5 |" in lines
    assert "| `attach` | m | 10.000 | 0.100 | 0.2 s, reached | 20.00 ms | 2.00 ms | 5 |" in lines
    assert "| `attach_first` | m | 200.000 | 0.100 | 0.2 s, not reached | 400.00 ms | 2.00 ms | 5 |" in lines
    assert sum(line.endswith("wall time") for line in lines) == 1, "a machine is named once"
    assert not any("Memory of a training" in line for line in lines), "nothing is known of it"


def test_the_page_says_how_a_batch_fits_into_memory(tmp_path: Path) -> None:
    rows = [counted("train_memory", "sd15", 3e9), counted("train_memory", "toyland", 1e6)]
    rows.append(counted("train_memory_checkpointing", "sd15", 5e8))
    page.write(tmp_path / "page.md", rows)
    text = (tmp_path / "page.md").read_text()
    assert page._weights() == 4 * 1_066_235_307
    assert "| the default | 3.0 GB | 48.0 GB | 4.3 GB | 52.3 GB |" in text.splitlines()
    switched = "| `backbone.gradient_checkpointing=true` | 0.5 GB | 8.0 GB | 4.3 GB | 12.3 GB |"
    assert switched in text.splitlines()
    assert "has not been measured yet" in text
    page.write(tmp_path / "page.md", [*rows, counted("train_peak", "sd15", 5e10)])
    assert "has not been measured yet" not in (tmp_path / "page.md").read_text()


def test_the_committed_page_says_what_the_committed_results_say(tmp_path: Path) -> None:
    """Of every benchmark that a CPU can run; `make bench` writes both."""
    root = Path(command.__file__).resolve().parents[1]
    rows = json.loads((root / "benchmarks" / "latest.json").read_text(encoding="utf-8"))
    on_a_cpu = {(n, m) for n, about in BENCHMARKS.items() for m in about.models if not about.cuda or m == "toyland"}
    assert on_a_cpu <= {(row["name"], row["model"]) for row in rows}
    page.write(tmp_path / "performance.md", rows)
    written = (tmp_path / "performance.md").read_text(encoding="utf-8")
    assert (root / "docs" / "performance.md").read_text(encoding="utf-8") == written


# --- the command ----------------------------------------------------------------------------------------------------


@pytest.fixture
def stand_ins(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[str]]:
    """Benchmarks that take no time; gives the list of the models that were built."""
    built: list[str] = []

    def sides(model: str, device: torch.device) -> Sides:
        if model == "large":
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.\nmore")
        if model == "interrupted":
            raise KeyboardInterrupt
        built.append(model)
        return Sides(lambda: 1, lambda: 1)

    stand_ins = {
        "one": Benchmark(sides, "", models=["m"]),
        "two": Benchmark(sides, "", models=["small", "large"], amount="bytes"),
        "gpu": Benchmark(sides, "", models=["g"], cuda=True),
        "gpu_too": Benchmark(sides, "", models=["toyland", "sd15"], cuda=True, rounds=2),
        "end": Benchmark(sides, "", models=["interrupted"]),
    }
    monkeypatch.setattr(command, "BENCHMARKS", stand_ins)
    monkeypatch.setattr(timing, "WINDOW", 0.0)
    threads = torch.get_num_threads()
    yield built
    torch.set_num_threads(threads)


def run(out: Path, *words: str, code: int = 0) -> dict[str, Any]:
    """The rows that the command leaves in `out`, by model."""
    assert run_cli(command.main, ["rounds=3", "seconds=0", f"out={out}", "device=cpu", *words]) == code
    return {row["model"]: row for row in json.loads(out.read_text())}


def test_the_command_runs_what_is_named(
    stand_ins: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (written,) = run(tmp_path / "x.json", "one").values()
    assert stand_ins == ["m"]
    assert (written["name"], written["rounds"], written["clock"]) == ("one", 3, "process")
    assert written["machine"]["threads"] == 1
    assert "one" in capsys.readouterr().out


def test_without_names_all_is_run_that_can_be_and_an_interruption_costs_none_of_it(
    stand_ins: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = run(tmp_path / "x.json", code=130)
    assert stand_ins == ["m", "small", "toyland"] and rows.keys() == {*stand_ins}
    assert (rows["small"]["clock"], rows["small"]["rounds"]) == ("bytes", 1)
    said = capsys.readouterr().out
    assert "gpu needs CUDA: left out" in said and "gpu_too of sd15 needs CUDA: left out" in said
    assert "two does not fit into the device's memory: left out (CUDA out of memory. Tried to allocate 2" in said


def test_rounds_are_limited_on_stable_diffusion_alone(
    stand_ins: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(command.BENCHMARKS, "one", command.BENCHMARKS["gpu_too"]._replace(cuda=False))  # type: ignore
    rows = run(tmp_path / "x.json", "one")
    assert (rows["toyland"]["rounds"], rows["sd15"]["rounds"]) == (3, 2)


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["three"], "no benchmark 'three'; there are: one, two"),
        (["rounds=1"], "rounds=1"),
        (["threads=0"], "threads=0"),
        (["round=3"], "round: unknown key; did you mean 'rounds'"),
        (["--fast"], "'--fast': expected key=value"),
        (["device=abacus"], "backbone.device: found 'abacus'"),
        (["device=cpu", "out=pyproject.toml"], "does not hold results"),
    ],
)
def test_mistakes_are_answered_before_anything_runs(
    stand_ins: list[str], capsys: pytest.CaptureFixture[str], argv: list[str], message: str
) -> None:
    assert run_cli(command.main, argv) == 2
    assert message in capsys.readouterr().err
    assert stand_ins == []


# --- what is compared -----------------------------------------------------------------------------------------------


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pipelines, "_stable_diffusion", lambda device: tiny_pipeline())


def test_projections_are_edited_on_one_side_alone_and_both_are_differentiable(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(projection, "BATCH", 2)
    sides = BENCHMARKS["projection"].sides("toyland", CPU)
    edited, plain = sides.subject(), sides.baseline()
    assert len(edited) == len(plain) == 14  # 7 cross-attentions
    for one, other in zip(edited, plain, strict=True):
        assert one.shape == other.shape
        assert one.requires_grad and other.requires_grad
        assert not torch.allclose(one, other)
    assert sides.subject()[0] is not edited[0], "training computes at every call"


def test_the_steps_of_a_sampling_share_what_the_first_computed(monkeypatch: pytest.MonkeyPatch) -> None:
    sides = BENCHMARKS["projection_sampling"].sides("toyland", CPU)
    linear, calls = torch.nn.Linear.forward, [0]

    def count(self: torch.nn.Linear, x: torch.Tensor) -> torch.Tensor:
        calls[0] += 1
        return linear(self, x)

    monkeypatch.setattr(torch.nn.Linear, "forward", count)
    edited = sides.subject()
    assert calls == [14]
    plain = sides.baseline()
    assert calls == [14 + 14 * projection.STEPS]
    assert not any(output.requires_grad for output in [*edited, *plain])
    assert sides.subject()[0] is not edited[0], "each run is a new prompt"


def test_a_step_trains_the_concept_alone_and_its_bound_reaches_the_token_embeddings(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    there: list[Any] = []

    def attached(*args: Any, **keywords: Any) -> Any:
        there[:] = pipelines.attached(*args, **keywords)
        return there

    monkeypatch.setattr(training, "attached", attached)
    step = training.subject("toyland", CPU, size=2)
    backbone, method = there
    before = method.state()
    assert step().isfinite()
    after = method.state()
    trained = ("values", "target_input", "direction", "embedding.text_encoder")
    assert not any(torch.equal(before[name], after[name]) for name in trained)
    ours = {id(parameter) for parameter in method.parameters()}
    assert not any(p.requires_grad and id(p) not in ours for p in backbone.denoiser.parameters())
    assert method.options.batch_size == training.BATCH

    bound = training.baseline("toyland", CPU, size=2)
    gradient = bound()
    assert gradient.shape == (2, 24, 128)
    assert gradient.abs().amax((1, 2)).min() > 0
    assert not any(p.requires_grad or p.grad is not None for p in bound.weights)


@pytest.mark.parametrize(("name", "pictures"), [("sampling_1", 1), ("sampling_8", 1), ("sampling_16_betas", 16)])
def test_a_sampling_gives_pictures_on_either_side(name: str, pictures: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sampling, "STEPS", {"toyland": 1})
    sides = BENCHMARKS[name].sides("toyland", CPU)
    both = [*zip(sides.subject(), sides.baseline(), strict=True)]
    assert len(both) == pictures
    for edited, plain in both:
        assert isinstance(edited, Image.Image) and isinstance(plain, Image.Image)
        assert edited.size == plain.size == (64, 64)
        assert edited.tobytes() != plain.tobytes()


@pytest.mark.parametrize("name", ["attach_first", "attach"])
def test_a_concept_is_attached_and_taken_out_again(name: str) -> None:
    sides = BENCHMARKS[name].sides("toyland", CPU)
    encoding = sides.baseline()
    sides.subject()
    assert encoding.shape == (128,) and torch.equal(encoding, sides.baseline()), "nothing is left behind"


def test_stable_diffusion_is_measured_like_toyland(small: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sampling, "STEPS", {"sd15": 1})
    monkeypatch.setattr(sampling, "SIDE", {"sd15": 16})
    pictures = BENCHMARKS["sampling_8"].sides("sd15", CPU).subject()
    assert [image.size for image in pictures] == [(16, 16)]


# --- memory, and what needs CUDA ------------------------------------------------------------------------------------


def test_kept_bytes_are_those_of_distinct_saved_storages_without_the_weights() -> None:
    weight = torch.ones(50, 100, requires_grad=True)
    x = torch.ones(10, 50, requires_grad=True)
    assert training.kept_bytes(lambda: (x @ weight).sum(), [weight]) == 4 * 10 * 50
    assert training.kept_bytes(lambda: (x @ weight).sum(), []) == 4 * (10 * 50 + 50 * 100)
    assert training.kept_bytes(lambda: (x * x).sum() + x.square().sum(), [weight]) == 4 * 10 * 50, "x is kept once"
    assert training.kept_bytes(lambda: x.exp().exp().sum(), []) == 4 * 2 * 10 * 50, "each result is kept"


def test_a_training_step_keeps_what_it_has_to_and_little_more(small: None) -> None:
    ours, least = (side() for side in BENCHMARKS["train_memory"].sides("toyland", CPU))
    assert 16 * 10_000 < least < ours <= 1.05 * least
    (plain, _), (ours, least) = (
        [side() for side in BENCHMARKS[name].sides("sd15", CPU)]
        for name in ("train_memory", "train_memory_checkpointing")
    )
    assert plain > ours > least > 0


@pytest.mark.parametrize(
    "name",
    ["train_400", "train_400_checkpointing"]
    + [pytest.param(name, marks=pytest.mark.slow) for name in ("train_peak", "train_peak_checkpointing")],
)
def test_both_sides_take_steps_in_their_precision_one_after_the_other(
    name: str, small: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With gradient checkpointing where the name says so, and nothing of the one in memory during the other."""
    checkpoints: list[int] = []
    dtypes: list[torch.dtype] = []
    pipes: list[Any] = []
    living: list[int] = []
    conv, checkpoint, pipeline = torch.nn.Conv2d.forward, torch.utils.checkpoint.checkpoint, pipelines.pipeline

    def noted_conv(self: torch.nn.Conv2d, x: torch.Tensor) -> torch.Tensor:
        dtypes.append((found := conv(self, x)).dtype)
        living.append(sum(pipe() is not None for pipe in pipes))
        return found

    def noted_pipeline(model: str, device: torch.device) -> Any:
        pipes.append(weakref.ref(made := pipeline(model, device)))
        return made

    monkeypatch.setattr(torch.nn.Conv2d, "forward", noted_conv)
    monkeypatch.setattr(
        torch.utils.checkpoint, "checkpoint", lambda *args, **more: checkpoints.append(1) or checkpoint(*args, **more)
    )
    monkeypatch.setattr(training, "pipeline", noted_pipeline)
    monkeypatch.setattr(training, "BATCH", 1)
    monkeypatch.setattr(training, "PEAK_STEPS", 1)
    monkeypatch.setattr(training, "STEPS", 1)
    monkeypatch.setattr(timing, "WARM_UPS", 1)
    monkeypatch.setattr(torch.cuda, "reset_peak_memory_stats", lambda device: None)
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda device: 5)
    benchmark = BENCHMARKS[name]
    for model in benchmark.models:
        took = []
        dtypes.clear()
        for side in benchmark.sides(model, CPU):
            before = len(checkpoints)
            assert side() == 5 if benchmark.amount == "bytes" else side() > 0
            took.append(len(checkpoints) - before)
        assert took[0] == took[1] and (took[0] > 0) == ("checkpointing" in name)
        assert {*dtypes} == {torch.bfloat16 if model == "sd15_bf16" else torch.float32}
    assert len(pipes) == 2 * len(benchmark.models) and {*living} == {1}


def step(call: Callable[[], Any]) -> training.Step:
    return training.Step(call, lambda result: result, [], CPU, half=False)


def test_the_peak_is_that_of_the_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    peak = [900]  # of what was before
    monkeypatch.setattr(torch.cuda, "reset_peak_memory_stats", lambda device: peak.__setitem__(0, 0))
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda device: peak[0])
    sizes = iter([100, 300, 200])
    assert training.peak(step(lambda: peak.__setitem__(0, max(peak[0], next(sizes))))) == 300
    assert next(sizes, None) is None, "all steps were taken"


def test_seconds_are_those_of_all_steps_after_the_first_few(clock: Clock, monkeypatch: pytest.MonkeyPatch) -> None:
    side = clock.sides(lambda: 100.0 if len(clock.log) <= timing.WARM_UPS else 0.25, lambda: 0).subject
    monkeypatch.setattr(timing, "CLOCKS", {"wall": clock})
    assert training.seconds(step(side)) == pytest.approx(100.0)
    assert len(clock.log) == 400 + timing.WARM_UPS
