"""The sentences around a concept's name: those it is trained with, and those it is looked at with."""

from __future__ import annotations

import re

# Neutral photo captions in the manner of CLIP's ImageNet templates, as Textual Inversion (arXiv 2208.01618) uses them:
# they say that something is seen, never where, how or with what, so only the concept's name can explain the picture.
_IMAGENET = (
    "a photo of a {}",
    "a photo of the {}",
    "a photo of my {}",
    "a photo of one {}",
    "the photo of a {}",
    "a good photo of a {}",
    "a good photo of the {}",
    "a cropped photo of a {}",
    "a cropped photo of the {}",
    "a close-up photo of a {}",
    "a close-up photo of the {}",
    "a bright photo of a {}",
    "a bright photo of the {}",
    "a dark photo of the {}",
    "a photo of a clean {}",
    "a photo of the clean {}",
    "a photo of a dirty {}",
    "a photo of a cool {}",
    "a photo of the cool {}",
    "a photo of a nice {}",
    "a photo of the nice {}",
    "a photo of a small {}",
    "a photo of the small {}",
    "a photo of the large {}",
    "a photo of the weird {}",
    "a rendering of a {}",
    "a rendition of a {}",
    "a rendition of the {}",
)
# The same in Toyland's words.
_TOYLAND = (
    "a photo of a {}",
    "a photo of the {}",
    "a photo of my {}",
    "a photo of one {}",
    "a photo of this {}",
    "a good photo of a {}",
    "a good photo of the {}",
    "a nice photo of a {}",
    "a cropped photo of a {}",
    "a cropped photo of the {}",
    "a close up photo of a {}",
    "a close up photo of the {}",
    "a bright photo of a {}",
    "a bright photo of the {}",
    "a dark photo of the {}",
    "a clean photo of a {}",
    "a photo of a clean {}",
    "a photo of a cool {}",
    "a photo of a nice {}",
    "a photo of a small {}",
    "a photo of the large {}",
    "a photo of the weird {}",
    "a picture of a {}",
    "a picture of the {}",
    "a rendition of a {}",
    "a rendition of the {}",
    "a depiction of a {}",
    "a depiction of the {}",
)
_TEMPLATES = {"imagenet": _IMAGENET, "toyland": _TOYLAND}

# What a concept must still do after training: be elsewhere, wear and use things, change its style.
_VALIDATION = {
    "sd": (
        "a photo of a {} on the beach",
        "a {} wearing a santa hat in the snow",
        "a watercolor painting of a {}",
        "a {} riding a skateboard in the city",
        "a mosaic of a {}",
        "a {} sitting in a cardboard box",
        "a photo of a {} wearing a crown",
        "a {} in front of the Eiffel Tower at night",
    ),
    "toyland": (
        "a photo of a {} on the beach",
        "a {} wearing a hat in the snow",
        "a sketch of a {}",
        "a {} on a skateboard in the city",
        "a mosaic of a {}",
        "a {} in a box",
        "a photo of a {} wearing a crown",
        "a {} at night",
    ),
}


class PromptError(ValueError):
    """A prompt, a template or the name of a set of them cannot be used."""


def templates(name: str) -> tuple[str, ...]:
    """The training templates named `name` (`imagenet` or `toyland`), each with one `{}` for the concept.

    Raises:
        PromptError: no such set.
    """
    return _pick(_TEMPLATES, name, "prompt templates")


def validation_prompts(name: str) -> tuple[str, ...]:
    """The 8 templates that training samples from to choose its best step: `sd` or `toyland`.

    Raises:
        PromptError: no such set.
    """
    return _pick(_VALIDATION, name, "validation prompts")


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


def _pick(sets: dict[str, tuple[str, ...]], name: str, what: str) -> tuple[str, ...]:
    if name not in sets:
        raise PromptError(f"no {what} named {name!r}; expected one of {', '.join(sorted(sets))}.")
    return sets[name]
