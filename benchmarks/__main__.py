"""`python -m benchmarks [name ...] [rounds=9]`: measure, print a table, write `latest.json`."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import diffusers
import torch
import transformers

from benchmarks import page, report, timing
from benchmarks.catalogue import BENCHMARKS
from perfusion.backbones.loading import resolve_device
from perfusion.cli import parse_key_values, run_cli
from perfusion.config import ConfigError

USAGE = f"""
Measure overhead as ratios: the project's work (subject) against the least that any implementation must do (baseline),
alternating.

  python -m benchmarks                       all: {", ".join(BENCHMARKS)}
  python -m benchmarks projection rounds=30  some, longer

Results are printed and put into out=; rows there of benchmarks that were not run stay. benchmarks/ says what each side
does. Ratios from a busy machine are good to about their spread.
"""


@dataclass
class BenchConfig:
    """Command line, besides the names."""

    rounds: int = 9  # measurements of each side, which alternate: at least so many,
    seconds: float = 8.0  # and at least so long
    threads: int = 1  # of the CPU
    device: str = "auto"  # auto (cuda, then mps, then cpu), or a torch device
    out: str = str(Path(__file__).with_name("latest.json"))  # file of the results
    page: str | None = None  # Markdown file for the table of all results in out=; null: none


def main(argv: Sequence[str]) -> None:
    """Command line entry point. Raises ConfigError, and BackboneError for a device that is not there."""
    names = [word for word in argv if "=" not in word and not word.startswith("-")]
    config = parse_key_values([word for word in argv if word not in names], BenchConfig, USAGE)
    if unknown := [name for name in names if name not in BENCHMARKS]:
        raise ConfigError(f"no benchmark {unknown[0]!r}; there are: {', '.join(BENCHMARKS)}")
    if config.rounds < 2 or config.threads < 1:
        found = f"rounds={config.rounds} threads={config.threads}"
        raise ConfigError(f"found {found}, expected at least 2 rounds and 1 thread")
    device = resolve_device(config.device)
    torch.set_num_threads(config.threads)
    diffusers.utils.logging.disable_progress_bar()
    transformers.utils.logging.disable_progress_bar()
    where, clock = report.machine(device), timing.clock_for(device, config.threads)
    print(f"{where['cpu']}; threads {where['threads']}; torch {where['torch']}; {where['device']}; {clock} time")
    print(report.HEADER)
    out = Path(config.out)
    rows = report.write(out, [])  # that it can be written is known before any long work
    for name in names or BENCHMARKS:
        benchmark = BENCHMARKS[name]
        left_out = benchmark.cuda and device.type != "cuda"
        if left_out:
            print(f"{name}{' of sd15' * ('toyland' in benchmark.models)} needs CUDA: left out")
        try:
            for model in benchmark.models:
                if left_out and model != "toyland":
                    continue
                sides = benchmark.sides(model, device)
                if benchmark.amount:
                    found = timing.Found.of([sides.subject()], [sides.baseline()])
                else:
                    most = None if model == "toyland" else benchmark.rounds
                    found = timing.compare(sides, config.rounds, device, timing.CLOCKS[clock], config.seconds, most)
                result = report.result(name, model, found, benchmark.amount or clock, where)
                print(report.line(result), flush=True)
                rows = report.write(out, [result])  # one at a time: an interruption costs none of them
        except torch.OutOfMemoryError as error:
            print(f"{name} does not fit into the device's memory: left out ({str(error).splitlines()[0]})")
    print(f"Written to {out}")
    if config.page:
        page.write(Path(config.page), rows)
        print(f"and {config.page}")


if __name__ == "__main__":
    sys.exit(run_cli(main))
