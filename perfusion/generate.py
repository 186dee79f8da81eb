"""`python -m perfusion.generate`: pictures of a concept. `--help` says how it is used."""

from __future__ import annotations

import json
import math
import re
import sys
from collections.abc import Iterable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from omegaconf import MISSING

from perfusion.cli import parse_key_values, run_cli
from perfusion.config import ConfigError
from perfusion.data.prompts import contains

# Torch and its friends take seconds to import: `--help` and a mistyped key do without them.
if TYPE_CHECKING:
    from perfusion.concept import Attached, Concept
    from perfusion.manifest import ImageRecord

USAGE = """
Usage: python -m perfusion.generate concept=<file> prompt='a photo of <cat*> on the beach' [key=value ...]

Draws pictures of a trained concept. Each has a seed of its own: picture k of `seed` is the one that `seed + k` gives
alone. All of this is written beside the pictures (manifest.json), and into them (PNG text).
Several prompts:  prompt='["a photo of <cat*> on the beach", "a sketch of <cat*>"]'
Several strengths, one row of pictures each:  beta=0.4,0.55,0.7
The strength with the best harmonic mean of CLIP-I and CLIP-T:  beta=auto
Several concepts:  concept='[cat.safetensors, teddy.safetensors]' prompt='<cat*> and <teddy*> on the beach'
  with strengths of their own:  beta='[[0.6, 0.4]]', and gates of their own softness:  tau='[[0.15, 0.1]]'
The base model beside them, its superclass in the concept's place:  beta=0.5,0.7,inf
"""

GRID = "grid.png"
AUTO = "auto"
CHOOSER = "eval.strength.choose"  # what beta=auto asks; by its name, like a callback, since eval stands above perfusion
_SLUG = 48  # characters of a prompt in the name of a file


@dataclass
class GenerateConfig:
    """The options of `python -m perfusion.generate`."""

    concept: Any = MISSING  # concept file, or a list of files that are drawn together
    prompt: Any = MISSING  # text with the concept's placeholder, or a list of texts
    beta: Any = None  # gate's threshold, a list, or auto: lower is more of the concept; null: its own
    tau: Any = None  # gate's softness, or one for each concept as in [[0.15,0.1]]; null: as the concept says
    key_lock: str | None = None  # local or global: where the prompt's keys come from; null: as the concept says
    scale: float | None = None  # strength of a LoRA, 0 to 1 and beyond; null: as the concept says
    num: int = 4  # pictures of each prompt, and of each beta
    seed: int = 0  # of the first of these; the others follow on
    out: str | None = None  # folder; null: generated/<concept>-<prompt>
    backbone: str | None = None  # toyland, sd15, sdxl, ...; null: the kind that the concept was trained on
    path: str | None = None  # backbone's diffusers folder, .safetensors file or hub id; null: the weights that it ships
    layout: str | None = None  # configs of a .safetensors file: known layout or diffusers folder; null: as it looks
    dtype: str = "float32"  # float32, float16 or bfloat16
    device: str = "auto"  # auto: cuda, then mps, then cpu
    steps: int | None = None  # denoising steps; null: the backbone's
    guidance: float | None = None  # classifier-free guidance; null: the backbone's
    references: Any = None  # for beta=auto: pictures of the concept; null: those that it was trained on
    scorer: str | None = None  # for beta=auto: toyland, an open_clip name, or a folder; null: Toyland's own on Toyland
    pretrained: str | None = None  # for beta=auto: the scorer's weights, a file or a tag
    batch: int = 8  # pictures at once on a GPU; a CPU takes one at a time, so that none depends on the others


def main(argv: Sequence[str]) -> None:
    """Generate what a command line describes."""
    generate(parse_key_values([_readable(word) for word in argv], GenerateConfig, USAGE))


def generate(config: GenerateConfig) -> Path:
    """Draw, and write each picture, `manifest.json` and `grid.png` into one folder; returns it.

    What lies there from former runs stays, and stays in the manifest; a picture is replaced by the same picture only.

    Raises:
        ConfigError: an option that cannot be used, one that no concept's method has, or no such backbone.
        ConceptFileError: no concept file, or one for another backbone.
        TokenError: a prompt is so long that a concept's placeholder would be cut off; nothing is drawn then.
        BackboneError, SamplingError, ManifestError: what cannot be loaded, drawn, or read in the folder.
    """
    from perfusion.concept import Concept
    from perfusion.manifest import known_records

    prompts, files = _prompts(config), _files(config)
    strengths, softness = _strengths(config, len(files)), _softness(config, len(files))
    if config.num < 1:
        raise ConfigError(f"num: found {config.num}, expected at least 1")
    concepts = [Concept.load(Path(file).expanduser()) for file in files]
    _check_dials(config, concepts, strengths, softness)
    for prompt in prompts:
        if not any(contains(prompt, concept.placeholder) for concept in concepts):
            names = " or ".join(concept.placeholder for concept in concepts)
            print(
                f"warning: {prompt!r} does not name the concept; put its placeholder {names} where it shall be",
                file=sys.stderr,
            )
    names = [_name(file, concept) for file, concept in zip(files, concepts, strict=True)]
    out = Path(config.out or Path("generated") / f"{'-'.join(names)}-{slug(prompts[0])}").expanduser()
    known = known_records(out)
    with ExitStack() as stack:
        attached = _attached(config, concepts, softness, stack)
        attached[0].backbone.check_prompts(prompts)
        defaults = attached[0].backbone.config
        steps = defaults.steps if config.steps is None else config.steps
        guidance = defaults.guidance if config.guidance is None else config.guidance
        if config.beta == AUTO:
            strengths = [(_best(config, attached),)]
        chosen = [_chosen(row, attached) for row in strengths]
        if len({*chosen}) < len(chosen):
            raise ConfigError(f"beta: found {config.beta!r}, which is {chosen}; expected each value once")
        records = _records(config, prompts, chosen, names, attached, steps, guidance)
        records = named(records, known)
        per_picture = [row for _ in prompts for row in chosen for _ in range(config.num)]
        _draw(config, attached, records, per_picture, out)
    print(f"pictures: {out} ({len(records)} PNG files and manifest.json)")
    print(f"all together: {out / GRID}")
    return out


def slug(text: str) -> str:
    """A prompt as part of a file's name."""
    return re.sub(r"[\W_]+", "-", text.lower()).strip("-")[:_SLUG].rstrip("-") or "image"


def named(records: Iterable[ImageRecord], known: Iterable[ImageRecord]) -> list[ImageRecord]:
    """The records with a file name each: `<prompt>-<seed>.png`, counted on where another picture has that name.

    Where they differ in β, it is part of the name.
    """
    taken = {record.file: record for record in known}
    records = list(records)
    front = _is_front(records)
    result: list[ImageRecord] = []
    for record in records:
        strength = "-beta-" + _shown(record.beta).replace(" + ", "-") if front else ""
        stem = f"{slug(record.prompt)}-{record.seed:04d}{strength}"
        choices = (replace(record, file=f"{stem}{suffix}.png") for suffix in _suffixes())
        free = next(choice for choice in choices if taken.get(choice.file, choice) == choice)
        taken[free.file] = free
        result.append(free)
    return result


def _is_front(records: Sequence[ImageRecord]) -> bool:
    return len({record.beta for record in records}) > 1


def _shown(beta: float | str | None) -> str:
    return f"{beta:g}" if isinstance(beta, float) else str(beta)


def _suffixes() -> Iterable[str]:
    yield ""
    number = 2
    while True:
        yield f"-{number}"
        number += 1


def _readable(word: str) -> str:
    """A word of the command line as `parse_key_values` wants it.

    The backbone's own keys may be named as in training, `backbone.path=`. A prompt or file is text as it stands, unless
    it is a list.
    """
    key, equals, value = word.removeprefix("backbone.").partition("=")
    if equals and key in ("concept", "prompt") and not value.lstrip().startswith("["):
        value = json.dumps(value.replace("${", "\\${"), ensure_ascii=False)
    return f"{key}{equals}{value}"


def _prompts(config: GenerateConfig) -> list[str]:
    prompts = [config.prompt] if isinstance(config.prompt, str) else config.prompt
    if not isinstance(prompts, list) or not prompts or not all(isinstance(p, str) and p.strip() for p in prompts):
        raise ConfigError(f"prompt: found {config.prompt!r}, expected a text or a list of texts")
    return prompts


def _files(config: GenerateConfig) -> list[str]:
    files = _listed(config.concept)
    if not files or not all(isinstance(file, str) and file.strip() for file in files):
        raise ConfigError(f"concept: found {config.concept!r}, expected a file or a list of files")
    return files


def _strengths(config: GenerateConfig, concepts: int) -> list[tuple[float | None, ...]]:
    """For each row of pictures, β of each concept; None is the concept's own."""
    given = config.beta
    if given == AUTO:
        if concepts > 1:
            raise ConfigError("beta=auto: found several concepts, expected one; find the strength of each on its own")
        return [(None,)]
    rows = _rows(given, concepts)
    if not rows:
        raise ConfigError(
            f"beta: found {given!r}, expected a number, several as in beta=0.4,0.55,0.7, or auto{_each(concepts)}"
        )
    if any(beta is not None and (math.isnan(beta) or beta == -math.inf) for row in rows for beta in row):
        raise ConfigError(f"beta: found {given!r}, expected finite numbers, or inf for the base model")
    return rows


def _softness(config: GenerateConfig, concepts: int) -> tuple[float | None, ...]:
    """τ of each concept, in all pictures; None is the concept's own."""
    rows = _rows(config.tau, concepts)
    if len(rows) != 1:
        raise ConfigError(f"tau: found {config.tau!r}, expected a number{_each(concepts)}")
    return rows[0]


def _rows(given: Any, concepts: int) -> list[tuple[float | None, ...]]:
    """For each row of a setting, its value for each concept; empty for what cannot be read as that."""
    if isinstance(given, str):  # 0.4,0.55 on a command line
        given = given.split(",")
    rows: list[tuple[float | None, ...]] = []
    try:
        for row in _listed(given):
            values = [None if value is None else float(value) for value in _listed(row)]
            rows.append(tuple(values * concepts if len(values) == 1 else values))
    except (TypeError, ValueError):
        return []
    return rows if all(len(row) == concepts for row in rows) else []


def _each(concepts: int) -> str:
    return "" if concepts == 1 else f", or [[...]] with {concepts} numbers, one for each concept"


def _check_dials(
    config: GenerateConfig,
    concepts: Sequence[Concept],
    strengths: Sequence[tuple[float | None, ...]],
    softness: Sequence[float | None],
) -> None:
    """Hold, before a model is loaded, that each β, and each τ of a list, belongs to a concept with a gate, and each
    other setting to one of the concepts. Raises ConfigError."""
    for concept, betas, tau in zip(concepts, zip(*strengths, strict=True), softness, strict=True):
        if config.beta == AUTO or any(beta is not None for beta in betas):
            concept.check_dial("beta")
        if isinstance(config.tau, list) and tau is not None:
            concept.check_dial("tau")
    for name in _given(config):
        if not any(name in concept.dials for concept in concepts):
            concepts[0].check_dial(name)


def _given(config: GenerateConfig) -> dict[str, Any]:
    """What was asked for besides β."""
    given = {"tau": config.tau, "key_lock": config.key_lock, "scale": config.scale}
    return {name: value for name, value in given.items() if value is not None}


def _best(config: GenerateConfig, attached: Sequence[Attached]) -> float:
    """The strength that the scores speak for, said aloud."""
    from hydra.utils import get_method

    beta = get_method(CHOOSER)(attached[0], config.references, config.scorer, config.pretrained)
    print(f"beta=auto: {beta:g} has the best harmonic mean of CLIP-I and CLIP-T")
    return beta


def _chosen(row: Sequence[float | None], attached: Sequence[Attached]) -> tuple[float | None, ...]:
    """The same with the concepts' own β filled in; None for a method without a gate."""
    own = _dial(attached, "beta")
    return tuple(mine if beta is None else beta for beta, mine in zip(row, own, strict=True))


def _dial(attached: Sequence[Attached], name: str) -> list[Any]:
    """Each concept's setting of that name; None for a method that has none."""
    return [getattr(a, name) if name in a.concept.dials else None for a in attached]


def _listed(value: Any) -> list[Any]:
    return value if isinstance(value, list) else [value]


def _name(file: str, concept: Concept) -> str:
    """What to call a concept: its file's name if that says more than that it is one, else its placeholder's letters."""
    stem = Path(file).stem
    return slug(concept.placeholder) if stem == "concept" else stem


def _attached(
    config: GenerateConfig, concepts: Sequence[Concept], softness: Sequence[float | None], stack: ExitStack
) -> list[Attached]:
    """The concepts in a backbone that was loaded for them, until `stack` is closed."""
    from perfusion.presets import load_for

    backbone = load_for(concepts[0].fingerprint, config)
    attached: list[Attached] = []
    for concept, tau in zip(concepts, softness, strict=True):
        given = {**_given(config), "tau": tau}
        dials: Any = {name: value for name, value in given.items() if name in concept.dials}
        attached.append(stack.enter_context(concept.attach(backbone, **dials)))
    return attached


def _records(
    config: GenerateConfig,
    prompts: Sequence[str],
    strengths: Sequence[tuple[float | None, ...]],
    names: Sequence[str],
    attached: Sequence[Attached],
    steps: int,
    guidance: float,
) -> list[ImageRecord]:
    """What is known of each picture before it is drawn, prompt by prompt and β by β, but for its file."""
    from perfusion.manifest import ImageRecord

    concepts = [a.concept for a in attached]
    common: dict[str, Any] = {
        "file": "",
        "concept": _joined(names),
        "concept_hash": _joined(concept.hash for concept in concepts),
        "placeholder": _joined(concept.placeholder for concept in concepts),
        "superclass": _joined(concept.superclass for concept in concepts),
        "method": _joined(dict.fromkeys(concept.method for concept in concepts)),
        "backbone": concepts[0].fingerprint.get("family"),
        "tau": _as_one(_dial(attached, "tau")),
        "key_lock": next((lock for lock in _dial(attached, "key_lock") if lock is not None), None),
        "scale": _as_one(_dial(attached, "scale")),
        "steps": steps,
        "guidance": guidance,
    }
    return [
        ImageRecord(prompt=prompt, seed=config.seed + k, beta=_as_one(row), **common)
        for prompt in prompts
        for row in strengths
        for k in range(config.num)
    ]


def _joined(parts: Iterable[str]) -> str:
    return " + ".join(parts)


def _as_one(row: Sequence[float | None]) -> float | str | None:
    """A setting of all concepts, in one number if they agree; infinity as text, which JSON has no number for."""
    if len({*row}) == 1:
        return "inf" if row[0] == math.inf else row[0]
    return _joined("none" if beta is None else f"{beta:g}" for beta in row)


def _draw(
    config: GenerateConfig,
    attached: Sequence[Attached],
    records: Sequence[ImageRecord],
    strengths: Sequence[tuple[float | None, ...]],
    out: Path,
) -> None:
    """Draw the pictures of `records` into `out`; when interrupted, the manifest names those that were finished."""
    import torch

    from perfusion.contact_sheet import captioned_sheet
    from perfusion.files import atomic_path
    from perfusion.manifest import known_records, save_png, write_manifest
    from perfusion.sampling import stream

    def set_strength(batch: slice) -> None:
        for concept, betas in zip(attached, zip(*strengths[batch], strict=True), strict=True):
            if betas[0] is not None:
                concept.beta = betas[0] if len({*betas}) == 1 else torch.tensor(betas)

    drawn = stream(
        attached[0].backbone.pipe,
        [record.prompt for record in records],
        [record.seed for record in records],  # type: ignore[misc]
        records[0].steps,  # type: ignore[arg-type]
        records[0].guidance,  # type: ignore[arg-type]
        config.batch,
        progress=True,
        prepare=set_strength,
    )
    out.mkdir(parents=True, exist_ok=True)
    images = []
    try:
        for record, image in zip(records, drawn, strict=True):
            save_png(out, image, record)
            images.append(image)
    finally:
        # Read again: another command may have drawn into the folder meanwhile.
        written = {record.file: record for record in (*known_records(out), *records[: len(images)])}
        write_manifest(out, written.values())
    front = _is_front(records)
    captions = [r.prompt + (f"   β {_shown(r.beta)}" if front else "") for r in records[:: config.num]]
    groups = [(caption, images[i * config.num : (i + 1) * config.num]) for i, caption in enumerate(captions)]
    with atomic_path(out / GRID) as temporary:
        captioned_sheet(groups).save(temporary)


if __name__ == "__main__":
    sys.exit(run_cli(main))
