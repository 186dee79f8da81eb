"""docs/api.md, made from the docstrings of what is public: `python -m tests.api_page` writes it, a test compares."""

from __future__ import annotations

import importlib
import inspect
import re
from pathlib import Path
from typing import Any

PAGE = Path(__file__).parents[1] / "docs" / "api.md"
PUBLIC = {
    "Models and concepts": ("perfusion.backbones:load", "perfusion.concept:Concept", "perfusion.concept:Attached"),
    "Pictures": ("perfusion.drawing:sample",),
    "Files": ("perfusion.concept:save_concept",),
    "Errors": (
        "perfusion.config:ConfigError",
        "perfusion.concept:DialError",
        "perfusion.concept_file:ConceptFileError",
        "perfusion.backbones.base:BackboneError",
        "perfusion.editing:EditError",
        "perfusion.editing:TokenError",
        "perfusion.drawing:SamplingError",
        "perfusion.hub:HubError",
    ),
}
_HEAD = """# API

What a Python program calls, from the docstrings in the code (`python -m tests.api_page` writes this page).
`perfusion.load` and `perfusion.Concept` are the first two below. All errors are subclasses of `ValueError` that say
what was found and what was expected. For methods and backbones of your own,
[CONTRIBUTING.md](../CONTRIBUTING.md#a-new-method-or-backbone) says where to start.
"""
_SECTION = re.compile(r"(Args|Returns|Raises|Attributes):")
_ITEM = re.compile(r"([\w*,. ]+): (.*)")


def page() -> str:
    """The page as Markdown."""
    lines = [_HEAD]
    for title, names in PUBLIC.items():
        lines += [f"## {title}", ""]
        for name in names:
            module, _, attribute = name.partition(":")
            lines += _described(f"{module}.{attribute}", getattr(importlib.import_module(module), attribute))
    return "\n".join(lines).rstrip() + "\n"


def _described(name: str, thing: Any) -> list[str]:
    lines = [f"### `{name}`", ""]
    if inspect.isclass(thing):
        lines += _text(inspect.getdoc(thing))
        members = {key: value for key, value in vars(thing).items() if not key.startswith("_")}
        for key, value in members.items():
            if isinstance(value, property):
                lines += [f"#### `.{key}`", "", *_text(inspect.getdoc(value))]
            elif callable(getattr(thing, key)):
                lines += [f"#### `.{key}`", "", *_signature(key, getattr(thing, key)), *_text(inspect.getdoc(value))]
        return lines
    return [*lines, *_signature(name.rpartition(".")[2], thing), *_text(inspect.getdoc(thing))]


def _signature(name: str, thing: Any) -> list[str]:
    found = inspect.signature(thing)
    parameters = [argument for key, argument in found.parameters.items() if key != "self"]
    arguments = [_argument(argument) for argument in parameters]
    kinds = [argument.kind for argument in parameters]
    if (named := inspect.Parameter.KEYWORD_ONLY) in kinds:
        arguments.insert(kinds.index(named), "*")
    result = found.return_annotation
    line = f"{name}({', '.join(arguments)}) -> {result}"
    if len(line) > 110:
        line = "\n".join([f"{name}(", *(f"    {argument}," for argument in arguments), f") -> {result}"])
    return ["```python", line, "```", ""]


def _argument(argument: inspect.Parameter) -> str:
    # Annotations are texts, since the modules import them from __future__.
    stars = {inspect.Parameter.VAR_POSITIONAL: "*", inspect.Parameter.VAR_KEYWORD: "**"}.get(argument.kind, "")
    default = "" if argument.default is inspect.Parameter.empty else f" = {argument.default!r}"
    return f"{stars}{argument.name}: {argument.annotation}{default}"


def _text(docstring: str | None) -> list[str]:
    """A docstring as Markdown: its sections as lists."""
    assert docstring, "what is public has a docstring"
    lines: list[str] = []
    inside = False
    for line in docstring.splitlines():
        if section := _SECTION.fullmatch(line):
            inside = True
            lines += [f"**{section[1]}**", ""]
        elif not inside or not line.startswith("    "):
            inside = inside and not line
            lines.append(line)
        elif line.startswith("     "):
            lines[-1] += f" {line.strip()}"
        elif item := _ITEM.fullmatch(line.strip()):
            lines.append(f"- `{item[1]}`: {item[2]}")
        else:
            lines.append(f"- {line.strip()}")
    return [*lines, ""]


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
