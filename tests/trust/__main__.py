"""`python -m tests.trust`: try what docs/reliability.md states, and write it."""

from __future__ import annotations

import subprocess
import sys
import xml.etree.ElementTree as ElementTree
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from perfusion.cli import parse_key_values, run_cli
from perfusion.files import atomic_write_text
from perfusion.provenance import Provenance, provenance

ROOT = Path(__file__).resolve().parents[2]
USAGE = """
Try what docs/reliability.md states, and write that page. What was tried with this commit is not tried again.

  python -m tests.trust                 all
  python -m tests.trust page=here.md    the page elsewhere
"""
ALONE = "tests/trust/test_load.py"  # it measures time

PAGE = Path(__file__).with_name("page.md")
LOAD = """`python -m perfusion.demo` took {seconds alone} s alone, and {seconds beside busy processes} s beside
{busy processes} processes that kept all cores busy: {times as long} times as long, where 4 is allowed."""


@dataclass
class TrustConfig:
    """The options of `python -m tests.trust`."""

    out: str = "runs/trust"  # what was found lies there, a folder for each commit
    page: str = "docs/reliability.md"
    workers: int = 2  # tests at once; the one that measures time runs alone


@dataclass(frozen=True)
class Found:
    """What became of a test file, or of one test."""

    passed: int
    failed: int
    counted: Mapping[str, str]  # what it recorded

    @classmethod
    def read(cls, report: Path) -> Found:
        """From pytest's JUnit XML."""
        cases = list(ElementTree.parse(report).getroot().iter("testcase"))
        failed = sum(case.find("failure") is not None or case.find("error") is not None for case in cases)
        counted = {entry.attrib["name"]: entry.attrib["value"] for case in cases for entry in case.iter("property")}
        return cls(len(cases) - failed, failed, counted)


def jobs() -> list[str]:
    """What pytest is given, one after the other."""
    command = [sys.executable, "-m", "pytest", "--collect-only", "-q", "-m", "trust", "tests"]
    listed = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout.splitlines()
    return ["tests/test_bad_input.py::test_bad_input_is_answered", *(line for line in listed if "::" in line)]


def run(job: str, folder: Path) -> Found:
    """Try it, unless it has passed already."""
    report = folder / (job.replace("/", ".").replace("::", ".") + ".xml")
    if report.exists() and not Found.read(report).failed:
        return Found.read(report)
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", job, f"--junitxml={report}"]
    command += ["-o", "junit_family=xunit1", "-o", "addopts="]  # whatever it is marked with
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    report.with_suffix(".log").write_text(done.stdout + done.stderr, encoding="utf-8")
    found = Found.read(report)
    print(f"{job}: {'failed, see ' + str(report.with_suffix('.log')) if found.failed else 'passed'}", flush=True)
    return found


def page(found: Mapping[str, Found], where: Provenance) -> str:
    """The page, of what there is: page.md with its blanks filled."""

    def of(part: str) -> Iterator[tuple[str, Found]]:
        return ((job, each) for job, each in found.items() if part in job)

    kills = []
    for job, each in of("test_kills"):
        method, processes = job.rsplit("[", 1)[1].rstrip("]").rsplit("-", 1)
        counts = [each.counted.get(key, "?") for key in ("kills", "trainings compared", "differences")]
        kills.append(f"| {method} | {processes} | {' | '.join(counts)} |")
    hostile = [f"{each.counted.get('files', '?')} files, {each.failed} wrong answers." for _, each in of("hostile")]
    bad = [f"{each.passed} of {each.passed + each.failed} are." for _, each in of("bad_input")]
    soak = []
    for _, each in of("test_soak"):
        if each.counted:
            (what, count), *grown = each.counted.items()
            soak.append(f"| {what} | {count} | {' | '.join(value for _, value in grown)} |")
    load = [LOAD.format(**each.counted) for _, each in of("test_load") if "times as long" in each.counted]
    failed = [f"- `{job}` failed." for job, each in found.items() if each.failed]
    return PAGE.read_text(encoding="utf-8").format(
        kills="\n".join(kills),
        hostile="\n".join(hostile),
        bad="\n".join(bad),
        soak="\n".join(soak),
        load="\n".join(load),
        failed="\n".join(["", "## What failed", "", *failed, ""]) if failed else "",
        where=f"Tried on: {where['cpu']}, torch {where['versions']['torch']}, Python {where['python']}.",
    )


def main(argv: Sequence[str]) -> int:
    """Command line entry point; status 1 where something failed."""
    config = parse_key_values(argv, TrustConfig, USAGE)
    where = provenance()
    folder = Path(config.out) / (where["git_commit"] or "unknown")
    folder.mkdir(parents=True, exist_ok=True)
    listed = jobs()
    together = [job for job in listed if not job.startswith(ALONE)]
    with ThreadPoolExecutor(config.workers) as pool:
        found = dict(zip(together, pool.map(lambda job: run(job, folder), together), strict=True))
    found |= {job: run(job, folder) for job in listed if job not in found}
    atomic_write_text(Path(config.page), page(found, where))
    print(f"Written to {config.page}")
    return 1 if any(each.failed for each in found.values()) else 0


if __name__ == "__main__":
    sys.exit(run_cli(main))
