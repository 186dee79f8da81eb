"""What a concept's pictures are trained with: sentences that are drawn for each, or captions beside the pictures."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from perfusion.config import ConceptConfig, ConfigError
from perfusion.data.images import ConceptImageError, find_images
from perfusion.data.prompts import PromptError, contains, fill, templates

FILES = "files"  # value of `concept.captions`
SUFFIX = ".txt"


@dataclass(frozen=True)
class TrainingPrompts:
    """Ready prompts, with the concept's placeholder in them.

    Attributes:
        drawn: one of them is drawn for each sample.
        captions: of each picture, in the place of a drawn prompt; None for a picture without one. Or empty: none has.
    """

    drawn: Sequence[str]
    captions: Sequence[str | None] = ()

    @property
    def own(self) -> list[str]:
        """All that may be used, each once."""
        return [*dict.fromkeys((*self.drawn, *(caption for caption in self.captions if caption is not None)))]


def own_prompts(concept: ConceptConfig, set_name: str, fixed: str | None) -> TrainingPrompts | None:
    """The captions and templates that a config asks for; for pictures without either those of the set `set_name`. None
    where it asks for none.

    Args:
        fixed: the one prompt that the method has for all pictures, if it has one.

    Raises:
        ConfigError: beside a fixed prompt; captions without pictures; or pictures without captions, all of them.
        ConceptImageError: a caption that cannot be read, or does not name the concept.
        PromptError: no such set; a file of templates that cannot be read, or a template without a place for the
            concept.
    """
    asked = [key for key in ("captions", "templates") if getattr(concept, key) is not None]
    if not asked:
        return None
    if fixed is not None:
        raise ConfigError(
            f"concept.{asked[0]}: found it beside method.prompt={fixed!r}, which all pictures have, expected "
            "method.prompt=null"
        )
    own = templates(set_name) if concept.templates is None else read_templates(concept.templates)
    drawn = [fill(template, concept.placeholder) for template in own]
    if concept.captions is None:
        return TrainingPrompts(drawn)
    if concept.images is None:
        raise ConfigError(f"concept.captions={concept.captions}: captions of what? concept.images is not given")
    paths = find_images(concept.images)
    captions = [_named(path, concept.placeholder) for path in paths]
    if not any(captions):
        raise ConfigError(
            f"concept.captions={concept.captions}: found none, expected a text file beside a picture, such as "
            f"{paths[0].with_suffix(SUFFIX)}"
        )
    return TrainingPrompts(drawn, captions)


def caption_beside(path: Path, key: str) -> str | None:
    """What the text file beside a picture says, in one line; None where there is none, or nothing in it.

    Raises:
        ConceptImageError: it cannot be read; the message begins with `key`.
    """
    file = path.with_suffix(SUFFIX)
    try:
        return " ".join(file.read_text(encoding="utf-8").split()) or None if file.exists() else None
    except (OSError, UnicodeDecodeError) as error:
        raise ConceptImageError(f"{key}: {file}: expected a caption in UTF-8: {error}.") from error


def read_templates(spec: Any) -> list[str]:
    """Templates with one `{}` each: a list of them, or the lines of a text file that is named. Raises PromptError."""
    key = "concept.templates"
    if isinstance(spec, str):
        try:
            found = Path(spec).expanduser().read_text(encoding="utf-8").splitlines()
        except (OSError, UnicodeDecodeError) as error:
            raise PromptError(
                f"{key}: {spec}: expected a text file with a template in each line, such as 'a photo of a {{}}', or a "
                f"list of templates: {getattr(error, 'strerror', None) or error}"
            ) from error
    else:
        found = spec if isinstance(spec, list) else [spec]
    if wrong := [template for template in found if not isinstance(template, str)]:
        raise PromptError(f"{key}: found {wrong[0]!r}, expected a template such as 'a photo of a {{}}'")
    kept = [" ".join(template.split()) for template in found if template.strip()]
    if not kept:
        raise PromptError(f"{key}: found no template in {spec!r}, expected at least one, such as 'a photo of a {{}}'")
    for template in kept:
        try:
            fill(template, "x")
        except PromptError as error:
            raise PromptError(f"{key}: {error}") from error
    return kept


def _named(path: Path, placeholder: str) -> str | None:
    """The caption of a picture with the concept's placeholder in it."""
    caption = caption_beside(path, "concept.captions")
    if caption is None:
        return None
    named = caption.replace("{}", placeholder)
    if not contains(named, placeholder):
        raise ConceptImageError(
            f"concept.captions: {path.with_suffix(SUFFIX)}: found {caption!r}, expected {{}} or {placeholder} where "
            "the concept stands"
        )
    return named
