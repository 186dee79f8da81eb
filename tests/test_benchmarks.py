"""`benchmarks`: that the harness finds a known ratio by a clock of the tests', what it writes, and that both sides of
every benchmark do what they say. Nothing here is timed."""

import contextlib
import json
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from benchmarks import __main__ as command
from benchmarks import (
    memory,
    page,
    pipelines,
    projection,
    report,
    sampling,
    timing,
    train_step,
)
from benchmarks.catalogue import BENCHMARKS, Benchmark
from benchmarks.timing import Pair, compare
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

    def side(self, name: str, seconds: Callable[[], float]) -> Callable[[], None]:
        def run() -> None:
            self.log.append(name)
            self.now += seconds()

        return run

    def pair(self, a: Callable[[], float], b: Callable[[], float]) -> Pair:
        return Pair("p", "m", self.side("A", a), self.side("B", b))


@pytest.fixture
def clock() -> Clock:
    return Clock()


def test_a_known_ratio_is_found(clock: Clock) -> None:
    found = compare(clock.pair(lambda: 0.2, lambda: 0.1), 5, CPU, clock)
    assert found.ratio == pytest.approx(2)
    assert found.spread == pytest.approx(0, abs=1e-9)
    assert (found.subject, found.baseline) == (pytest.approx(0.2), pytest.approx(0.1))
    assert found.rounds == 5


def test_rounds_alternate_after_the_warm_up(clock: Clock) -> None:
    compare(clock.pair(lambda: 0.2, lambda: 0.1), 4, CPU, clock)
    assert clock.log[-8:] == ["A", "B"] * 4


def test_short_work_gets_more_rounds(clock: Clock) -> None:
    pair = clock.pair(lambda: 0.5, lambda: 0.25)
    assert compare(pair, 5, CPU, clock, least=7.5).rounds == 10
    assert compare(pair, 5, CPU, clock, least=0.5).rounds == 5


def test_a_machine_that_slows_down_does_not_change_the_ratio(clock: Clock) -> None:
    """It is five times as slow in the end; all of A before all of B would give a ratio below 1."""
    slowness = lambda: 1 + len(clock.log) / 10  # noqa: E731
    found = compare(clock.pair(lambda: 0.2 * slowness(), lambda: 0.1 * slowness()), 20, CPU, clock)
    assert found.ratio == pytest.approx(2, rel=0.1)
    assert found.subject > 0.4


def test_first_calls_do_not_count(clock: Clock) -> None:
    slow_start = lambda seconds, name: lambda: 100 if clock.log.count(name) <= timing.WARM_UPS else seconds  # noqa: E731
    found = compare(clock.pair(slow_start(0.2, "A"), slow_start(0.1, "B")), 3, CPU, clock)
    assert found.ratio == pytest.approx(2)
    assert found.subject == pytest.approx(0.2)


def test_the_spread_is_the_interquartile_range_of_the_rounds_ratios(clock: Clock) -> None:
    found = compare(clock.pair(_after_warm_up(1, [1, 2, 3, 4, 50]), lambda: 1), 5, CPU, clock)
    assert found.ratio == pytest.approx(3)
    assert found.spread == pytest.approx(2)


def _after_warm_up(first: float, rounds: list[float]) -> Callable[[], float]:
    left = iter([*[first] * (timing.WARM_UPS + 1), *rounds])
    return lambda: next(left)


def test_short_work_is_repeated_and_still_given_per_call(clock: Clock) -> None:
    found = compare(clock.pair(lambda: timing.WINDOW / 10, lambda: timing.WINDOW * 2), 2, CPU, clock)
    assert clock.log.count("A") == timing.WARM_UPS + 1 + 2 * 10
    assert clock.log.count("B") == timing.WARM_UPS + 1 + 2
    assert found.ratio == pytest.approx(0.05)
    assert found.subject == pytest.approx(timing.WINDOW / 10)


def test_an_accelerator_is_waited_for_inside_every_measurement(clock: Clock, monkeypatch: pytest.MonkeyPatch) -> None:
    """A device that takes work at once and does it while it is waited for."""
    waiting = [0.0]

    def synchronize(device: torch.device) -> None:
        assert device.type == "cuda"
        clock.now, waiting[0] = clock.now + waiting[0], 0.0

    def queue(seconds: float) -> Callable[[], None]:
        return lambda: waiting.__setitem__(0, waiting[0] + seconds)

    monkeypatch.setattr(torch.accelerator, "synchronize", synchronize)
    found = compare(Pair("p", "m", queue(0.2), queue(0.1)), 3, torch.device("cuda"), clock)
    assert (found.subject, found.baseline) == (pytest.approx(0.2), pytest.approx(0.1))


def test_only_one_thread_on_a_cpu_is_timed_by_the_process() -> None:
    assert timing.clock_for(CPU, 1) == "process"
    assert timing.clock_for(CPU, 2) == timing.clock_for(torch.device("cuda"), 1) == "wall"


# --- what is written ------------------------------------------------------------------------------------------------


def row(name: str, ratio: float, model: str = "m") -> report.Result:
    found = timing.Comparison(ratio=ratio, spread=0.1, subject=0.002 * ratio, baseline=0.002, rounds=5)
    return report.result(Pair(name, model, lambda: None, lambda: None), found, "wall", report.machine(CPU))


def test_a_row_holds_all_that_was_measured_and_where() -> None:
    found: Any = json.loads(json.dumps(row("a", 1.5)))
    where = found.pop("machine")
    median = found.pop("median")
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


# --- the command ----------------------------------------------------------------------------------------------------


@pytest.fixture
def stand_ins(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[str]]:
    """Benchmarks `one` and `two` that take no time; gives the list of those that were built."""
    built: list[str] = []

    def pairs(name: str) -> Callable[[torch.device], Iterator[Pair]]:
        def build(device: torch.device) -> Iterator[Pair]:
            built.append(name)
            yield Pair(name, "m", lambda: None, lambda: None)

        return build

    monkeypatch.setattr(command, "BENCHMARKS", {name: Benchmark(pairs(name), "") for name in ("one", "two")})
    monkeypatch.setattr(timing, "WINDOW", 0.0)
    threads = torch.get_num_threads()
    yield built
    torch.set_num_threads(threads)


def test_the_command_runs_what_is_named(
    stand_ins: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "latest.json"
    assert run_cli(command.main, ["two", "rounds=3", "seconds=0", f"out={out}", "device=cpu"]) == 0
    assert stand_ins == ["two"]
    (written,) = json.loads(out.read_text())
    assert (written["name"], written["rounds"], written["clock"]) == ("two", 3, "process")
    assert written["machine"]["threads"] == 1
    assert "two" in capsys.readouterr().out


def test_without_names_the_command_runs_all(stand_ins: list[str], tmp_path: Path) -> None:
    assert run_cli(command.main, ["rounds=2", "seconds=0", f"out={tmp_path / 'x.json'}", "device=cpu"]) == 0
    assert stand_ins == ["one", "two"]


def test_an_interruption_loses_nothing_that_was_measured(
    stand_ins: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(device: torch.device) -> Iterator[Pair]:
        raise KeyboardInterrupt

    monkeypatch.setattr(command, "BENCHMARKS", {**command.BENCHMARKS, "two": Benchmark(interrupted, "")})
    out = tmp_path / "latest.json"
    with contextlib.suppress(KeyboardInterrupt):
        run_cli(command.main, ["rounds=2", "seconds=0", f"out={out}", "device=cpu"])
    assert [row["name"] for row in json.loads(out.read_text())] == ["one"]


def test_a_file_that_cannot_take_results_is_refused_first(stand_ins: list[str], tmp_path: Path) -> None:
    out = tmp_path / "latest.json"
    out.write_text("{}")
    assert run_cli(command.main, ["one", "rounds=2", f"out={out}", "device=cpu"]) == 2
    assert stand_ins == []


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["three"], "no benchmark 'three'; there are: one, two"),
        (["rounds=1"], "rounds=1"),
        (["threads=0"], "threads=0"),
        (["round=3"], "round: unknown key; did you mean 'rounds'"),
        (["--fast"], "'--fast': expected key=value"),
        (["device=abacus"], "backbone.device: found 'abacus'"),
    ],
)
def test_mistakes_are_answered_before_anything_runs(
    stand_ins: list[str], capsys: pytest.CaptureFixture[str], argv: list[str], message: str
) -> None:
    assert run_cli(command.main, argv) == 2
    assert message in capsys.readouterr().err
    assert stand_ins == []


# --- what is compared -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["projection", "projection_sampling", "train_step"])
def test_a_benchmark_has_the_name_that_it_is_asked_for_by(name: str) -> None:
    found = next(BENCHMARKS[name].run(CPU))
    assert (found.name, found.model) == (name, "toyland")


def test_layouts_are_whole() -> None:
    """Stable Diffusion 1.5: 16 cross-attentions, 12,480 V outputs in all."""
    sites = projection.edit_sites_of(projection.empty_unet("sd15"))
    assert len(sites) == 32
    assert sum(int(site.projection.out_features) for site in sites if site.kind == "v") == 12_480  # type: ignore
    assert projection.POSITIONS == {"toyland": 24, "sd15": 77}


def test_projections_are_edited_on_one_side_alone_and_both_are_differentiable(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(projection, "POSITIONS", {"toyland": 24})
    (pair,) = projection.pairs(CPU, batch=2)
    edited, plain = pair.subject(), pair.baseline()
    assert isinstance(edited, list) and isinstance(plain, list)
    assert len(edited) == len(plain) == 14  # 7 cross-attentions
    for one, other in zip(edited, plain, strict=True):
        assert one.shape == other.shape
        assert one.requires_grad and other.requires_grad
        assert not torch.allclose(one, other)
    again = pair.subject()
    assert isinstance(again, list)
    assert again[0] is not edited[0], "training computes at every call"


def test_the_steps_of_a_sampling_share_what_the_first_computed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(projection, "POSITIONS", {"toyland": 24})
    calls = {"edited": 0, "plain": 0}
    (pair,) = projection.sampling_pairs(CPU)

    def count(side: str, run: Callable[[], object]) -> Any:
        linear = torch.nn.Linear.forward

        def counted(self: torch.nn.Linear, x: torch.Tensor) -> torch.Tensor:
            calls[side] += 1
            return linear(self, x)

        with monkeypatch.context() as patch:
            patch.setattr(torch.nn.Linear, "forward", counted)
            return run()

    edited = count("edited", pair.subject)
    plain = count("plain", pair.baseline)
    assert calls == {"edited": 14, "plain": 14 * projection.STEPS}
    assert not any(output.requires_grad for output in [*edited, *plain])
    assert count("edited", pair.subject)[0] is not edited[0], "each run is a new prompt"


def test_a_step_trains_the_concept_alone_and_its_bound_reaches_the_token_embeddings() -> None:
    plain = train_step.around(pipelines.pipeline("toyland", CPU), train_step.default_config("toyland"))
    with pipelines.concept("toyland", pipelines.pipeline("toyland", CPU), training=True) as (backbone, method):
        content = train_step.batch(backbone, 2, pipelines.WORD.placeholder)
        before = method.state()
        loss = train_step.whole_step(backbone, method, content)()
        after = method.state()
        assert loss.isfinite()
        assert not any(torch.equal(before[name], after[name]) for name in ("values", "target_input", "direction"))
        assert not torch.equal(before["embedding.text_encoder"], after["embedding.text_encoder"])
        ours = {id(parameter) for parameter in method.parameters()}
        assert not any(p.requires_grad and id(p) not in ours for p in backbone.denoiser.parameters())

    gradient = train_step.lower_bound(plain, content)()
    assert gradient.shape == (2, 24, 128)
    assert gradient.abs().amax((1, 2)).min() > 0
    parts = (plain.denoiser, plain.pipe.text_encoder)  # type: ignore[attr-defined]
    assert not any(p.requires_grad or p.grad is not None for part in parts for p in part.parameters())


@pytest.mark.parametrize(("name", "pictures"), [("sampling_1", 1), ("sampling_8", 1), ("sampling_16_betas", 16)])
def test_a_sampling_gives_pictures_on_either_side(name: str, pictures: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sampling, "STEPS", {"toyland": 1})
    (pair,) = BENCHMARKS[name].run(CPU)
    assert pair.name == name
    for edited, plain in zip(pair.subject(), pair.baseline(), strict=True):
        assert isinstance(edited, Image.Image) and isinstance(plain, Image.Image)
        assert edited.size == plain.size == (64, 64)
        assert edited.tobytes() != plain.tobytes()
        pictures -= 1
    assert pictures == 0


@pytest.mark.parametrize("name", ["attach_first", "attach"])
def test_a_concept_is_attached_and_taken_out_again(name: str) -> None:
    pair = next(BENCHMARKS[name].run(CPU))
    assert isinstance(pair, Pair) and (pair.name, pair.model) == (name, "toyland")
    encoding = pair.baseline()
    pair.subject()
    again = pair.baseline()
    assert isinstance(encoding, torch.Tensor) and isinstance(again, torch.Tensor)
    assert encoding.shape == (128,) and torch.equal(encoding, again), "nothing is left behind"


def test_kept_bytes_are_those_of_distinct_saved_storages_without_the_weights() -> None:
    weight = torch.ones(50, 100, requires_grad=True)
    x = torch.ones(10, 50, requires_grad=True)
    assert memory.kept_bytes(lambda: (x @ weight).sum(), [weight]) == 4 * 10 * 50
    assert memory.kept_bytes(lambda: (x @ weight).sum(), []) == 4 * (10 * 50 + 50 * 100)
    assert memory.kept_bytes(lambda: (x * x).sum() + x.square().sum(), [weight]) == 4 * 10 * 50, "x is kept once"
    assert memory.kept_bytes(lambda: x.exp().exp().sum(), []) == 4 * 2 * 10 * 50, "each result is kept"


def test_a_training_step_keeps_what_it_has_to_and_little_more() -> None:
    found = next(memory.amounts(CPU))
    assert (found.name, found.model) == ("train_memory", "toyland")
    assert 16 * 10_000 < found.baseline < found.subject <= 1.05 * found.baseline
    line = report.line(report.result(found, found.comparison(), "bytes", report.machine(CPU)))
    assert re.fullmatch(r"train_memory +toyland +1\.\d{3} +0\.000 +[\d.]+ MB +[\d.]+ MB +1", line)


def test_stable_diffusion_is_measured_like_toyland(monkeypatch: pytest.MonkeyPatch) -> None:
    """With a small model in its place."""
    monkeypatch.setattr(pipelines, "_stable_diffusion", lambda device: tiny_pipeline())
    pipe = pipelines.pipeline("sd15", CPU)
    with pipelines.concept("sd15", pipe, training=False) as (backbone, method):
        assert backbone.config.name == "stable_diffusion" and method.state()["direction"].isfinite().all()
    monkeypatch.setattr(sampling, "STEPS", {"sd15": 1})
    monkeypatch.setattr(sampling, "SIDE", {"sd15": 16})
    (pair,) = sampling.pairs(CPU, concepts=8)
    pictures: Any = pair.subject()
    assert pair.rounds == sampling.ROUNDS["sd15"] and [image.size for image in pictures] == [(16, 16)]
    (found,) = BENCHMARKS["train_memory_checkpointing"].run(CPU)
    assert isinstance(found, timing.Amounts) and found.name == "train_memory_checkpointing"
    assert found.subject > found.baseline > 0


def test_the_page_says_what_was_measured_and_what_was_reached(tmp_path: Path) -> None:
    rows = [row("sampling_1", 0.98), row("train_step", 1.2), row("projection", 1.5)]
    page.write(tmp_path / "docs" / "performance.md", rows)
    lines = (tmp_path / "docs" / "performance.md").read_text().splitlines()
    assert "| `sampling_1` | m | 0.980 | 0.100 | 1.00, reached | 1.96 ms | 2.00 ms | 5 |" in lines
    assert "| `train_step` | m | 1.200 | 0.100 | 1.05, not reached | 2.40 ms | 2.00 ms | 5 |" in lines
    assert "| `projection` | m | 1.500 | 0.100 |  | 3.00 ms | 2.00 ms | 5 |" in lines
    assert sum(line.endswith("wall time") for line in lines) == 1, "a machine is named once"
    assert not any("Memory of a training" in line for line in lines), "nothing is known of it"


def test_the_page_says_whether_a_goal_in_seconds_was_reached(tmp_path: Path) -> None:
    rows = [row("attach", 10.0), row("attach_first", 200.0)]
    page.write(tmp_path / "page.md", rows)
    lines = (tmp_path / "page.md").read_text().splitlines()
    assert "| `attach` | m | 10.000 | 0.100 | 0.2 s, reached | 20.00 ms | 2.00 ms | 5 |" in lines
    assert "| `attach_first` | m | 200.000 | 0.100 | 0.2 s, not reached | 400.00 ms | 2.00 ms | 5 |" in lines


def test_the_page_says_how_a_batch_fits_into_memory(tmp_path: Path) -> None:
    def kept(name: str, model: str, size: float) -> report.Result:
        amounts = timing.Amounts(name, model, size, size)
        return report.result(amounts, amounts.comparison(), amounts.clock, report.machine(CPU))

    rows = [kept("train_memory", "sd15", 3e9), kept("train_memory", "toyland", 1e6)]
    rows.append(kept("train_memory_checkpointing", "sd15", 5e8))
    page.write(tmp_path / "page.md", rows)
    text = (tmp_path / "page.md").read_text()
    assert page._weights() == 4 * 1_066_235_307
    assert "| the default | 3.0 GB | 48.0 GB | 4.3 GB | 52.3 GB |" in text.splitlines()
    switched = "| `backbone.gradient_checkpointing=true` | 0.5 GB | 8.0 GB | 4.3 GB | 12.3 GB |"
    assert switched in text.splitlines()
    assert "has not been measured yet" in text
    page.write(tmp_path / "page.md", [*rows, kept("train_peak", "sd15", 5e10)])
    assert "has not been measured yet" not in (tmp_path / "page.md").read_text()


def test_the_committed_page_says_what_the_committed_results_say(tmp_path: Path) -> None:
    """Of every benchmark that a CPU can run; `make bench` writes both."""
    root = Path(command.__file__).resolve().parents[1]
    rows = json.loads((root / "benchmarks" / "latest.json").read_text(encoding="utf-8"))
    names = {row["name"] for row in rows}
    on_a_cpu = {name for name, benchmark in BENCHMARKS.items() if not benchmark.cuda_only}
    assert on_a_cpu <= names <= set(BENCHMARKS)
    page.write(tmp_path / "performance.md", rows)
    written = (tmp_path / "performance.md").read_text(encoding="utf-8")
    assert (root / "docs" / "performance.md").read_text(encoding="utf-8") == written
