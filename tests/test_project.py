"""The rules of the house that no linter knows: no pickle, no malicious release, pins without addresses, honest help."""

import ast
import os
import re
import subprocess
import tomllib
from pathlib import Path

import pytest
import yaml
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet
from packaging.utils import canonicalize_name
from packaging.version import Version

ROOT = Path(__file__).resolve().parents[1]
SKIPPED = {".venv", ".cache", ".git", "runs", "outputs", "multirun", "build", "dist"}

# The one place that opens a pickle: files of another package, of which nothing but tensors is read.
CONVERTER = "perfusion/convert.py"


def python_files() -> list[Path]:
    """Every Python file of the project: what git tracks or would add; outside a checkout, all but caches."""
    if (ROOT / ".git").exists():
        command = ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard", "*.py"]
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
        paths = [ROOT / name for name in done.stdout.split("\0") if name]
        return sorted(path for path in paths if path.exists())  # a file may be deleted and not yet committed
    found = ROOT.rglob("*.py")
    return sorted(path for path in found if path.relative_to(ROOT).parts[0] not in SKIPPED)


@pytest.mark.parametrize(
    ("pattern", "instead"),
    [
        (r"allow_pickle\s*=\s*True|weights_only\s*=\s*False", "safetensors, JSON or npy: pickles are never read"),
        (r"^\s*import\s+eval\b", "from eval.x import y: else Python's own eval is hidden"),
    ],
)
def test_no_python_file_has(pattern: str, instead: str):
    for path in python_files():
        if path != Path(__file__).resolve():
            assert not re.search(pattern, path.read_text(encoding="utf-8"), re.MULTILINE), f"{path}: {instead}"


def test_the_converter_reads_nothing_but_tensors():
    calls = [node for node in ast.walk(ast.parse((ROOT / CONVERTER).read_text())) if isinstance(node, ast.Call)]
    loads = [{ast.unparse(word) for word in call.keywords} for call in calls if ast.unparse(call.func) == "torch.load"]
    assert len(loads) == 1 and "weights_only=True" in loads[0]


@pytest.fixture(scope="module")
def project() -> dict:
    return tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]


@pytest.fixture(scope="module")
def requirements(project: dict) -> list[Requirement]:
    """What the project and all its extras ask for."""
    extras = project["optional-dependencies"].values()
    return [Requirement(line) for lines in [project["dependencies"], *extras] for line in lines]


def constraint_lines() -> list[str]:
    return (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()


@pytest.mark.parametrize("release", ["2.6.2", "2.6.3"])
def test_malicious_lightning_releases_are_excluded(requirements: list[Requirement], release: str):
    lightning = next(r for r in requirements if r.name == "lightning")
    assert not lightning.specifier.contains(release)
    pins = [Requirement(line) for line in constraint_lines()]
    either = [pin for pin in pins if pin.name in ("lightning", "pytorch-lightning")]
    assert len(either) == 2
    assert not any(pin.specifier.contains(release) for pin in either)


def test_torch_is_new_enough_for_its_pickle_fixes(requirements: list[Requirement]):
    torch = next(r for r in requirements if r.name == "torch")
    assert not torch.specifier.contains("2.9.1")


def test_constraints_are_names_versions_and_markers_alone():
    """No address, no path, no option: the file must serve people behind any registry."""
    lines = constraint_lines()
    assert lines
    for line in lines:
        assert "://" not in line, line
        assert not line.lstrip().startswith(("-", ".", "/")), line
        pin = Requirement(line)
        assert pin.url is None, line
        assert [s.operator for s in pin.specifier] == ["=="], line


def test_constraints_pin_every_requirement_to_what_it_allows(requirements: list[Requirement]):
    pins: dict[str, list[Version]] = {}
    for pin in map(Requirement, constraint_lines()):
        versions = [Version(s.version) for s in pin.specifier]
        pins.setdefault(canonicalize_name(pin.name), []).extend(versions)
    for requirement in requirements:
        versions = pins.get(canonicalize_name(requirement.name))
        assert versions, f"{requirement.name} is not pinned: run `make constraints`"
        for version in versions:
            assert requirement.specifier.contains(version), f"{requirement} but pinned to {version}"


def test_python_floor(project: dict):
    floor = SpecifierSet(project["requires-python"])
    assert floor.contains("3.11")
    assert not floor.contains("3.10")


# --- Makefile and CI ------------------------------------------------------------------------------------------------


def make(*arguments: str) -> str:
    # This test may itself run under make, whose variables would change what this one prints.
    environment = {
        key: value for key, value in os.environ.items() if not key.startswith(("MAKE", "MFLAGS", "GNUMAKEFLAGS"))
    }
    done = subprocess.run(["make", *arguments], cwd=ROOT, env=environment, capture_output=True, text=True, check=True)
    return done.stdout


def phony_targets() -> set[str]:
    text = (ROOT / "Makefile").read_text(encoding="utf-8")
    return {name for line in re.findall(r"^\.PHONY:(.*)$", text, re.MULTILINE) for name in line.split()}


def test_help_lists_every_target_with_a_description():
    listed = {found[1]: found[2] for found in re.finditer(r"^  make (\S+) +(.*)$", make("help"), re.MULTILINE)}
    assert set(listed) == phony_targets()
    assert all(listed.values())
    assert {"setup", "demo", "test", "test-slow", "lint", "format", "toyland", "bench", "clean"} <= set(listed)


def test_every_target_is_phony():
    """A file called `test` or `demo` must not switch a target off."""
    targets = re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE)
    assert set(targets) == phony_targets()


def test_make_alone_shows_the_help():
    assert make() == make("help")


@pytest.mark.parametrize("target", ["demo", "test", "test-slow", "lint", "format", "toyland", "bench"])
def test_targets_set_up_the_environment_first(target: str):
    first, *rest = make("--dry-run", target).splitlines()
    assert first == "tools/setup"
    assert rest
    assert all(".venv/bin/" in line for line in rest)


def test_ci_runs_the_tests_and_the_linters():
    script = ROOT / ".ci" / "run"
    assert os.access(script, os.X_OK)
    assert re.findall(r"^make (.*)$", script.read_text(encoding="utf-8"), re.MULTILINE) == ["test", "lint"]


def test_a_workflow_calls_it_and_the_image_has_the_same_uv():
    workflow = yaml.safe_load((ROOT / ".github" / "workflows" / "ci.yml").read_text(encoding="utf-8"))
    assert [step["run"] for step in workflow["jobs"]["test"]["steps"] if "run" in step] == [".ci/run"]
    (used,) = re.findall(r"^version=(.*)$", (ROOT / "tools" / "uv").read_text(encoding="utf-8"), re.MULTILINE)
    assert f"ARG UV={used}\n" in (ROOT / "Dockerfile").read_text(encoding="utf-8")


def test_the_citation_has_the_version_of_the_project(project: dict):
    cited = yaml.safe_load((ROOT / "CITATION.cff").read_text(encoding="utf-8"))
    assert cited["version"] == project["version"] and cited["license"] == project["license"]
    assert f"## {project['version']}" in (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")
