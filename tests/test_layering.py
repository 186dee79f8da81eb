"""Data flows one way: every module imports only what lies below it.

The imports are read from the source (also those under `TYPE_CHECKING`, inside functions, and relative ones), so
nothing is imported to check it.
"""

import ast
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pytest

ROOT = Path(__file__).resolve().parents[1]
HERE = "FLOORS in tests/test_layering.py"

# The rooms of perfusion/, from the ground up; a room is a module or a package directly below perfusion/. A module may
# import its own room and every room on a lower floor, but no other room on its own floor: what two of them need
# belongs on a floor below both. The `__main__` of a package is a command, and a room of its own above the package.
FLOORS: tuple[frozenset[str], ...] = (
    frozenset({"contact_sheet", "errors", "files", "provenance", "registry", "version"}),
    frozenset({"config"}),
    frozenset({"cli"}),  # turns the mistakes that the schema finds into messages
    frozenset({"toyland"}),
    frozenset({"rank_one", "covariance", "data", "concept_format", "superclass_prompts"}),
    frozenset({"backbones", "prompt_gate"}),
    frozenset({"edit", "left_out", "manifest", "presets", "sampling"}),
    frozenset({"methods"}),
    frozenset({"concept"}),
    frozenset({"training", "generate", "inspect", "convert", "covariance.__main__"}),
    frozenset({"train", "sweep"}),  # the entry points run what training/ defines
    frozenset({"demo"}),  # trains, then generates
    frozenset({"__init__"}),  # the public face: it may show everything, and nothing inside reaches through it
)
HELPERS = FLOORS[0]  # small enough to import one another

# Which of the project's top-level packages may import which others.
PACKAGES: dict[str, frozenset[str]] = {
    "perfusion": frozenset(),
    "eval": frozenset({"perfusion"}),
    "experiments": frozenset({"perfusion", "eval"}),
}
# Tools around the packages: they import what they like, and no package imports them.
AROUND = frozenset({"benchmarks", "tests"})


class Import(NamedTuple):
    """One imported dotted name; `plain` for `import a.b`, not for `from a import b`."""

    line: int
    target: str
    plain: bool = False


def imports(source: str, module: tuple[str, ...], is_package: bool) -> Iterator[Import]:
    """Everything that the source of `module` (its dotted name, split) imports, as absolute dotted names.

    `from a import b` gives `a.b`: whether `b` is a module or a name in `a`, the room that it leads to is the same one,
    except directly below a top-level package, where `_room` looks at the names.
    """
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield Import(node.lineno, alias.name, plain=True)
        elif isinstance(node, ast.ImportFrom):
            # One dot is the package of the module: the module itself where it is an __init__.py.
            up = len(module) - node.level + is_package
            base = [*module[:up]] if node.level else []
            base += node.module.split(".") if node.module else []
            for alias in node.names:
                yield Import(node.lineno, ".".join([*base, alias.name]))
        elif isinstance(node, ast.Call) and _called(node) in ("import_module", "__import__"):
            match node.args:
                case [ast.Constant(value=str(name)), *_] if not name.startswith("."):
                    yield Import(node.lineno, name)


def _called(node: ast.Call) -> str:
    match node.func:
        case ast.Name(id=name) | ast.Attribute(attr=name):
            return name
    return ""


def violations(root: Path) -> list[str]:
    """One line for each import under `root` that goes up, sideways, or where the table knows no room."""
    found: list[str] = []
    rooms = {
        path.relative_to(root / "perfusion").with_suffix("").parts[0] for path in (root / "perfusion").rglob("*.py")
    }
    for package in PACKAGES:
        for path in sorted((root / package).rglob("*.py")):
            parts = path.relative_to(root).with_suffix("").parts
            is_package = parts[-1] == "__init__"
            module = parts[:-1] if is_package else parts
            room = module[1] if len(module) > 1 else "__init__"
            room += ".__main__" if len(module) > 2 and module[-1] == "__main__" else ""
            where = path.relative_to(root).as_posix()
            if package == "perfusion" and _floor(room) is None:
                found.append(f"{where}: perfusion.{room} has no floor yet: add it to {HERE}, above all that it imports")
                continue
            for line, target, plain in imports(path.read_text(encoding="utf-8"), module, is_package):
                if problem := _problem(package, room, target, plain, rooms):
                    found.append(f"{where}:{line}: {problem}")
    return found


def _problem(package: str, room: str, target: str, plain: bool, rooms: set[str]) -> str | None:
    """What is wrong with `target` being imported from `room` of `package`, if anything."""
    top, _, rest = target.partition(".")
    if plain and top == "eval":
        return f"`import {target}` hides Python's builtin `eval`: write `from {target} import ...`"
    if top != package:
        if top in AROUND or (top in PACKAGES and top not in PACKAGES[package]):
            return f"{package} must not import {top}"
        return None
    if package != "perfusion":
        return None
    # `from perfusion import x`: x is a room, or else a name in perfusion/__init__.py.
    other, _, inner = rest.partition(".")
    if other not in rooms:
        other = "__init__"
    elif inner.partition(".")[0] == "__main__":
        other += ".__main__"
    if other == room or (room in HELPERS and other in HELPERS):
        return None
    above, below = _floor(room), _floor(other)
    assert above is not None
    if below is None:
        return f"perfusion.{other} has no floor yet: add it to {HERE}"
    if below < above:
        return None
    way = "beside" if below == above else "above"
    return f"perfusion.{room} must not import perfusion.{other}, which lies {way} it (see {HERE})"


def _floor(room: str) -> int | None:
    return next((level for level, rooms in enumerate(FLOORS) if room in rooms), None)


def test_every_module_imports_only_what_lies_below_it():
    for package in PACKAGES:
        assert any((ROOT / package).rglob("*.py")), f"{package}/ holds no module: PACKAGES names what is not there"
    found = violations(ROOT)
    assert not found, "\n".join(["imports against the layering:", *found])


def test_no_file_anywhere_hides_the_builtin_eval():
    found = [
        f"{path.relative_to(ROOT)}:{line}: `import {target}`"
        for folder in sorted({*PACKAGES, *AROUND})
        for path in sorted((ROOT / folder).rglob("*.py"))
        for line, target, plain in imports(path.read_text(encoding="utf-8"), (path.stem,), False)
        if plain and target.partition(".")[0] == "eval"
    ]
    assert not found, "\n".join(["write `from eval.x import y`:", *found])


def test_a_room_stands_on_one_floor():
    rooms = [room for floor in FLOORS for room in floor]
    assert len(rooms) == len(set(rooms))


# --- the checker itself ---------------------------------------------------------------------------------------------


@pytest.fixture
def house(tmp_path: Path) -> Path:
    """A small tree that holds the rules."""
    _write(tmp_path, "perfusion/__init__.py", "from perfusion.concept import Concept")
    _write(tmp_path, "perfusion/files.py", "import os\nfrom perfusion.errors import UserError")
    _write(tmp_path, "perfusion/errors.py", "import torch.nn")
    _write(tmp_path, "perfusion/config.py", "from . import files")
    _write(tmp_path, "perfusion/rank_one.py", "import torch")
    _write(tmp_path, "perfusion/covariance/__init__.py", "from perfusion import config, files")
    _write(tmp_path, "perfusion/methods/__init__.py", "from .base import Method")
    _write(tmp_path, "perfusion/methods/base.py", "from perfusion.rank_one import edit")
    _write(tmp_path, "perfusion/methods/perfusion.py", "from ..covariance import C\nfrom .base import Method")
    _write(tmp_path, "perfusion/concept.py", "import perfusion.methods.perfusion as p")
    _write(tmp_path, "perfusion/covariance/__main__.py", "from perfusion.covariance import C\nimport perfusion.concept")
    _write(tmp_path, "eval/__init__.py", "")
    _write(tmp_path, "eval/clip.py", "from perfusion.concept import x\nfrom eval.front import y\nfrom . import front")
    _write(tmp_path, "eval/front.py", "import numpy")
    _write(tmp_path, "experiments/pareto.py", "from eval.front import y\nfrom perfusion.concept import x")
    return tmp_path


def _write(root: Path, name: str, source: str) -> None:
    path = root / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(source)


def test_the_checker_passes_a_good_tree(house: Path):
    assert violations(house) == []


@pytest.mark.parametrize(
    ("name", "source", "message"),
    [
        # upwards, in each way of writing it
        ("perfusion/rank_one.py", "from perfusion.methods.base import M", "rank_one must not import perfusion.methods"),
        ("perfusion/rank_one.py", "import perfusion.concept", "must not import perfusion.concept, which lies above"),
        ("perfusion/rank_one.py", "import perfusion.concept as c", "must not import perfusion.concept"),
        ("perfusion/rank_one.py", "from perfusion import concept", "must not import perfusion.concept"),
        ("perfusion/rank_one.py", "from . import concept", "must not import perfusion.concept"),
        ("perfusion/rank_one.py", "from .concept import x", "must not import perfusion.concept"),
        ("perfusion/methods/base.py", "from .. import concept", "methods must not import perfusion.concept"),
        ("perfusion/methods/base.py", "from ..concept import x", "methods must not import perfusion.concept"),
        ("perfusion/methods/__init__.py", "from ..concept import x", "methods must not import perfusion.concept"),
        ("perfusion/files.py", "from perfusion.config import x", "files must not import perfusion.config"),
        ("perfusion/rank_one.py", "def f():\n    from .concept import x", "rank_one.py:2: "),
        (
            "perfusion/rank_one.py",
            "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    from .concept import x",
            "rank_one.py:3: ",
        ),
        ("perfusion/rank_one.py", "import importlib\nimportlib.import_module('perfusion.concept')", "rank_one.py:2: "),
        # the command of a package, which stands above it
        ("perfusion/covariance/stream.py", "from perfusion.concept import x", "perfusion.covariance must not import"),
        (
            "perfusion/covariance/stream.py",
            "from .__main__ import x",
            "perfusion.covariance.__main__, which lies above",
        ),
        ("perfusion/concept.py", "import perfusion.covariance.__main__", "covariance.__main__, which lies above it"),
        ("perfusion/covariance/__main__.py", "import perfusion", "covariance.__main__ must not import"),
        ("perfusion/methods/__main__.py", "", "perfusion.methods.__main__ has no floor yet"),
        # sideways, and through the public face
        ("perfusion/rank_one.py", "from perfusion.covariance import C", "which lies beside it"),
        ("perfusion/rank_one.py", "from perfusion import Concept", "must not import perfusion.__init__"),
        ("perfusion/rank_one.py", "import perfusion", "must not import perfusion.__init__"),
        ("perfusion/rank_one.py", "from . import Concept", "must not import perfusion.__init__"),
        # between packages
        ("perfusion/concept.py", "from eval.clip import ClipI", "perfusion must not import eval"),
        ("perfusion/concept.py", "import experiments.pareto", "perfusion must not import experiments"),
        ("perfusion/concept.py", "from benchmarks import timing", "perfusion must not import benchmarks"),
        ("eval/clip.py", "from experiments.pareto import x", "eval must not import experiments"),
        ("eval/clip.py", "from tests.helpers import x", "eval must not import tests"),
        # the hidden builtin
        ("eval/clip.py", "import eval.front", "hides Python's builtin"),
        ("experiments/pareto.py", "import eval.front as front", "hides Python's builtin"),
        ("experiments/pareto.py", "import eval", "hides Python's builtin"),
        # rooms that the table does not know
        ("perfusion/attic.py", "", f"perfusion.attic has no floor yet: add it to {HERE}"),
        ("perfusion/attic/deep/__init__.py", "", f"perfusion.attic has no floor yet: add it to {HERE}"),
    ],
)
def test_the_checker_finds_a_bad_import(house: Path, name: str, source: str, message: str):
    _write(house, name, source)
    found = violations(house)
    assert len(found) == 1, found
    assert found[0].startswith(name)
    assert message in found[0]


def test_the_checker_resolves_relative_imports():
    def targets(source: str, module: str, is_package: bool = False) -> list[str]:
        return [found.target for found in imports(source, tuple(module.split(".")), is_package)]

    assert targets("from . import a, b", "p.q.r") == ["p.q.a", "p.q.b"]
    assert targets("from .s import a", "p.q.r") == ["p.q.s.a"]
    assert targets("from ..s import a", "p.q.r") == ["p.s.a"]
    assert targets("from .s import a", "p.q", is_package=True) == ["p.q.s.a"]
    assert targets("from ..s import a", "p.q", is_package=True) == ["p.s.a"]
