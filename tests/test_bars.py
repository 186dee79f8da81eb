"""What progress bars write where nobody watches a terminal."""

from __future__ import annotations

import io
from types import SimpleNamespace

import diffusers
import pytest
import transformers

from perfusion import bars
from perfusion.bars import Bar, without_loading_bars
from perfusion.training.progress import StepProgress


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
    clock = SimpleNamespace(now=100.0)
    monkeypatch.setattr(bars, "time", SimpleNamespace(monotonic=lambda: clock.now))
    return clock


def test_a_file_gets_a_line_every_few_seconds(clock: SimpleNamespace) -> None:
    file = io.StringIO()
    with Bar(total=100, file=file, desc="Sampling", mininterval=0) as bar:
        for _ in range(100):
            clock.now += 0.12
            bar.update()
    lines = file.getvalue().splitlines()
    assert [line.split("|")[0].split()[-1] for line in lines] == ["42%", "84%", "100%"]
    assert "\r" not in file.getvalue() and file.getvalue().endswith("\n") and all(map(str.strip, lines))


def test_what_is_done_at_once_is_one_line(clock: SimpleNamespace) -> None:
    file = io.StringIO()
    for _ in Bar(range(1000), file=file, mininterval=0):
        pass
    assert len(file.getvalue().splitlines()) == 1 and "1000/1000" in file.getvalue()


def test_a_terminal_is_shown_every_step(clock: SimpleNamespace) -> None:
    file = Terminal()
    for _ in Bar(range(10), file=file, mininterval=0):
        pass
    assert file.getvalue().count("\r") > 10


def test_the_bar_of_a_training_does_likewise(
    clock: SimpleNamespace, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    progress = StepProgress()
    bar = progress.init_train_tqdm()
    bar.reset(total=50)
    for step in range(50):
        clock.now += 0.25
        bar.n = step + 1
        bar.set_postfix({"loss": 0.5})
    bar.close()
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 3 and lines[-1].startswith("Training: 100%") and "50/50 steps" in lines[-1]
    assert "loss=0.5" in lines[0]


def test_loading_a_model_writes_no_bars_into_a_file(monkeypatch: pytest.MonkeyPatch) -> None:
    logs = (diffusers.utils.logging, transformers.utils.logging)
    for stream, shown in ((io.StringIO(), False), (Terminal(), True)):
        for log in logs:
            log.enable_progress_bar()
        monkeypatch.setattr("sys.stderr", stream)
        with without_loading_bars():
            assert {log.is_progress_bar_enabled() for log in logs} == {shown}
        assert all(log.is_progress_bar_enabled() for log in logs), "as they were"
