"""What the commands share: how a user's mistake is answered, and how `key=value` command lines are read.

Every exception class that this project defines is a message to the user, printed without a traceback. Any other
exception is a bug of ours and keeps its traceback.
"""

from __future__ import annotations

import dataclasses
import errno
import inspect
import io
import os
import re
import sys
import textwrap
import types
import typing
from collections.abc import Callable, Iterable, Sequence
from typing import Any, TypeVar

import yaml
from omegaconf import MISSING, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from perfusion.config import ConfigError, checked

# Threads that wait for others sleep instead of spinning against whatever else runs on the machine. Read when torch is
# loaded, so it counts for the commands that load it after this module: for all that train or draw, not for eval.score.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

T = TypeVar("T")

OK, USER_ERROR, INTERRUPTED = 0, 2, 130
_OURS = ("perfusion", "eval", "experiments")
# What a user can mend.
_DISK = {errno.ENOSPC, errno.EDQUOT, errno.EACCES, errno.EPERM, errno.EROFS, errno.EISDIR, errno.ENOTDIR}
_DISK |= {errno.EEXIST, errno.ENAMETOOLONG, errno.ELOOP, errno.EFBIG, errno.EIO}
_ASSIGNMENT = re.compile(r"[A-Za-z_][\w.]*=")


def run_cli(main: Callable[[Sequence[str]], int | None], argv: Sequence[str] | None = None) -> int:
    """Run a command and turn what it raises into an exit status: `sys.exit(run_cli(main))`.

    Args:
        main: takes the arguments after the program's name; returns an exit status, None being 0.
        argv: these arguments; default: those of this process.

    Returns:
        `main`'s status; 2 after a mistake of the user, printed on stderr as one `error: ...`; 130 after Ctrl-C.
    """
    for stream in (sys.stdout, sys.stderr):  # a terminal without Unicode shall not hide what there is to say
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")
    try:
        return main(sys.argv[1:] if argv is None else argv) or OK
    except BrokenPipeError:  # the reader of our output, such as `head`, has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # else Python complains when it flushes at exit
        return OK
    except KeyboardInterrupt as error:
        print(str(error) or "interrupted", file=sys.stderr)
        return INTERRUPTED
    except Exception as error:
        if not is_user_error(error):
            raise
        print(f"error: {error}", file=sys.stderr)
        return USER_ERROR


def is_user_error(error: BaseException) -> bool:
    """Whether an exception tells the user something (see the module's docstring), rather than being a bug."""
    module = type(error).__module__
    if module == "__main__" and (spec := getattr(sys.modules[module], "__spec__", None)):
        module = spec.name  # of a command that is run by `python -m`
    if module.split(".")[0] in _OURS:
        return True
    return isinstance(error, OSError) and error.errno in _DISK


def aligned(rows: Sequence[Sequence[str]], right: Iterable[int] = ()) -> list[str]:
    """Rows as lines of aligned columns; those in `right` are aligned to the right."""
    right = {*right}
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return [
        "  ".join(
            text.rjust(width) if k in right else text.ljust(width)
            for k, (text, width) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in rows
    ]


def parse_key_values(argv: Sequence[str], schema: type[T], usage: str, positional: str | None = None) -> T:
    """A command line of `key=value` words as an instance of the dataclass `schema`.

    Text fields (`str`, `str | None`) take their value verbatim, so prompts need no quotes but the shell's; only a whole
    `null` is None where None is allowed. All other values follow YAML: `3`, `0.5`, `1e-3`, `true`, `null`, `[a, b]`.
    Dots reach into nested dataclasses. Of a key given twice the last counts. `--help` prints `usage` and every key with
    its type, default and the comment behind it in the source, then exits with status 0.

    Args:
        positional: the field that a word without `key=` sets; default: such words are errors.

    Raises:
        ConfigError: an unknown key (with the nearest known one), a value of the wrong type, a missing key.
    """
    if any(word in ("-h", "--help") for word in argv):
        print(usage.strip(), *_key_lines(schema), sep="\n")
        raise SystemExit(OK)
    values: dict[str, Any] = {}
    for word in argv:
        if _ASSIGNMENT.match(word):
            key, _, text = word.partition("=")
        elif positional is not None and not word.startswith("-"):
            key, text = positional, word
        else:
            raise ConfigError(f"{word!r}: expected key=value; --help lists the keys")
        _put(values, key, _value(_hint(schema, key), key, text))
    for name in required(schema):
        if name not in values:
            raise ConfigError(f"{name}: missing. {_first_line(usage)}")
    return checked(schema, values)


def required(schema: type) -> list[str]:
    """The fields of a dataclass that have no default (or omegaconf's MISSING)."""
    return [f.name for f in dataclasses.fields(schema) if f.default == MISSING or _no_default(f)]


def _no_default(field: dataclasses.Field[Any]) -> bool:
    return field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING


def _hint(schema: type, key: str) -> Any:
    """The type of a dotted key; Any if there is no such key, which `checked` reports."""
    hint: Any = schema
    for part in key.split("."):
        hint = typing.get_type_hints(hint).get(part, Any) if dataclasses.is_dataclass(hint) else Any
    return hint


def _value(hint: Any, key: str, text: str) -> Any:
    """`text` as a value for a field of type `hint`, before `checked` looks at its type."""
    if hint is str or _is_optional_text(hint):
        if text == "null" and hint is not str:
            return None
        return re.sub(r"(\\*)\$\{", r"\1\1\\${", text)  # omegaconf shall see no interpolation
    try:
        parsed = OmegaConf.from_dotlist([f"x={text}"])
        return OmegaConf.to_container(parsed, resolve=False)["x"]  # type: ignore[index,call-overload]
    except (yaml.YAMLError, OmegaConfBaseException) as error:
        raise ConfigError(f"{key}: cannot read {text!r}: {_first_line(str(error))}") from error


def _is_optional_text(hint: Any) -> bool:
    union = typing.get_origin(hint) in (typing.Union, types.UnionType)
    return union and set(typing.get_args(hint)) == {str, type(None)}


def _put(values: dict[str, Any], key: str, value: Any) -> None:
    *parents, last = key.split(".")
    for parent in parents:
        inner = values.setdefault(parent, {})
        if not isinstance(inner, dict):
            raise ConfigError(f"{key}: {parent} was already given as {inner!r}")
        values = inner
    values[last] = value


def _first_line(text: str) -> str:
    return text.strip().splitlines()[0] if text.strip() else ""


def _key_lines(schema: type, prefix: str = "") -> list[str]:
    """One line per key: name, default, comment."""
    lines = [] if prefix else ["", "Keys (key=value):"]
    comments, hints = _comments(schema), typing.get_type_hints(schema)
    for field in dataclasses.fields(schema):
        name, hint = prefix + field.name, hints[field.name]
        if dataclasses.is_dataclass(hint):
            assert isinstance(hint, type)
            lines += _key_lines(hint, f"{name}.")
            continue
        if field.name in required(schema):
            default = "(required)"
        else:
            made = field.default if field.default is not dataclasses.MISSING else field.default_factory()  # type: ignore[misc]
            default = f"[{_spelled(made)}]"
        head = f"  {name:<18} {default:<14}"
        comment = textwrap.wrap(comments.get(field.name, ""), 88)
        lines += [f"{head} {first}".rstrip() for first in comment[:1] or [""]]
        lines += [" " * 36 + more for more in comment[1:]]
    return lines


def _spelled(value: Any) -> str:
    """A default as one would type it."""
    return "null" if value is None else str(value).lower() if isinstance(value, bool) else str(value)


def _comments(schema: type) -> dict[str, str]:
    """Field name -> the comment that ends its line in the source."""
    return dict(re.findall(r"^ +(\w+): .*?  # (.*)$", inspect.getsource(schema), re.MULTILINE))
