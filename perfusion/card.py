"""A concept's model card: Markdown for people, with the header that the Hugging Face hub reads."""

from __future__ import annotations

import re
import shlex
from collections.abc import Mapping

from huggingface_hub import ModelCardData

from perfusion.hub import PREFIX, SAMPLES

UNKNOWN = "unknown"  # the hub's word for a licence that nobody has named
_BRINGS_WEIGHTS = "toyland"


def model_card(
    placeholder: str,
    superclass: str,
    method: str,
    family: str,
    facts: Mapping[str, str],
    repository: str | None = None,
    license: str | None = None,
    samples: bool = False,
) -> str:
    """The card as Markdown.

    Every text may be a stranger's, who may have written Markdown into it: it is shown as code.

    Args:
        family: kind of backbone that it was trained on, as `perfusion.load` takes it.
        facts: name -> what else there is to say, in the order of the list.
        repository: `owner/name` on the hub, where it can be had; None: it is a file.
        license: an identifier of the hub, such as `cc-by-4.0`; None: nobody has named one.
        samples: whether `samples.png` lies beside the card.
    """
    header = ModelCardData(
        license=license or UNKNOWN,
        library_name="perfusion",
        pipeline_tag="text-to-image",
        tags=["text-to-image", "concept", method, family],
    )
    own = "" if family == _BRINGS_WEIGHTS else ", '<path of the weights that it was trained on>'"
    concept = f"from_pretrained({repository!r})" if repository else "load('concept.safetensors')"
    prompt = f"a photo of {placeholder} on the beach"
    source = f"{PREFIX}{repository}" if repository else "concept.safetensors"
    path = "" if family == _BRINGS_WEIGHTS else " path=<weights>"
    lines = [
        "---",
        header.to_yaml().strip(),
        "---",
        "",
        f"# {code(placeholder)}",
        "",
        f"One particular {code(superclass)}, for prompts that have {code(placeholder)} in them. The file holds what",
        "was learned of it and no model: it is drawn with the weights that it was trained on.",
        "",
        *([f"![What the base model draws, and below it the concept]({SAMPLES})", ""] if samples else []),
        "## Use",
        "",
        *fenced(
            "python",
            "import perfusion",
            "",
            f"pipe = perfusion.load({family!r}{own})",
            f"perfusion.Concept.{concept}.attach(pipe)",
            f"pipe({prompt!r}).images[0].save('picture.png')",
        ),
        "",
        *fenced("bash", f"python -m perfusion.generate concept={source}{path} prompt={shlex.quote(prompt)}"),
        "",
        "## What it is",
        "",
        *(f"- {name}: {code(value)}" for name, value in facts.items()),
        f"- licence: {code(license) if license else 'not named by its author'}",
    ]
    return "\n".join(lines) + "\n"


def code(text: str) -> str:
    """`text` as a code span, whatever it has of backticks."""
    ticks = _longer_than_in(text, 1)
    space = " " * ("`" in text)
    return f"{ticks}{space}{text}{space}{ticks}"


def fenced(language: str, *lines: str) -> list[str]:
    """Lines as a block of code, whatever they have of backticks."""
    fence = _longer_than_in("\n".join(lines), 3)
    return [f"{fence}{language}", *lines, fence]


def _longer_than_in(text: str, least: int) -> str:
    runs = [len(run) for run in re.findall("`+", text)]
    return "`" * max([least, *(run + 1 for run in runs)])
