"""The sentences around a concept's name: those it is trained with, and those it is looked at with."""

from __future__ import annotations

import functools
import re
from pathlib import Path

import yaml

_FILE = Path(__file__).with_suffix(".yaml")


class PromptError(ValueError):
    """A prompt, a template or the name of a set of them cannot be used."""


def templates(name: str) -> tuple[str, ...]:
    """The training templates of the set `name` (`imagenet` or `toyland`), each with one `{}` for the concept. Raises
    PromptError: no such set."""
    return _set(name)["training"]


def validation_prompts(name: str) -> tuple[str, ...]:
    """The 8 templates of the set `name` that training samples from to choose its best step. Raises PromptError: no such
    set."""
    return _set(name)["validation"]


def fill(template: str, phrase: str) -> str:
    """`template` with `phrase`, a placeholder or a superclass, in the place of its one `{}`.

    Raises:
        PromptError: not exactly one `{}`.
    """
    if template.count("{}") != 1:
        raise PromptError(
            f"the template {template!r} has {template.count('{}')} places for the concept; expected one {{}}, "
            "as in 'a photo of a {}'."
        )
    return template.replace("{}", phrase)


def contains(prompt: str, placeholder: str) -> bool:
    """Whether `placeholder` is a whole word of `prompt`, in upper or lower case, as CLIP's tokenizers read it.

    `<cat*>` is in "my <cat*>'s hat" and in "<cat*>, asleep"; `sks` is in "a sks cat" but not in "she asks".
    """
    return _whole_word(placeholder).search(prompt) is not None


def replace_placeholder(prompt: str, placeholder: str, superclass: str) -> str:
    """`prompt` with each whole-word `placeholder` (see `contains`) replaced by `superclass`, of one or several words;
    without any, the prompt as it is. "<new1> cat", as prompts with modifier tokens have it, is one "cat"."""
    followed = rf"(?:{_whole_word(placeholder).pattern})(?:\s+{re.escape(superclass)}(?!\w))?"
    return re.sub(followed, lambda _: superclass, prompt, flags=re.IGNORECASE)


def _whole_word(placeholder: str) -> re.Pattern[str]:
    assert placeholder, "a placeholder has at least one character"
    # Angle brackets delimit by themselves: `<a*><b*>` are two words. Elsewhere a word ends where letters and marks do,
    # and `cat*` is no word of `<cat*>`.
    before = "" if placeholder.startswith("<") else r"(?<![\w<*])"
    after = "" if placeholder.endswith(">") else r"(?![\w>*])"
    return re.compile(before + re.escape(placeholder) + after, re.IGNORECASE)


def _set(name: str) -> dict[str, tuple[str, ...]]:
    known = _sets()
    if name not in known:
        raise PromptError(f"no prompt templates named {name!r}; expected one of {', '.join(sorted(known))}.")
    return known[name]


@functools.cache
def _sets() -> dict[str, dict[str, tuple[str, ...]]]:
    sets = yaml.safe_load(_FILE.read_text(encoding="utf-8"))
    return {name: {use: tuple(given) for use, given in uses.items()} for name, uses in sets.items()}
