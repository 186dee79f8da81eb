"""`python -m perfusion.generate`: pictures of a concept. `--help` says how it is used."""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Iterable, Sequence
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
"""

GRID = "grid.png"
_SLUG = 48  # characters of a prompt in the name of a file


@dataclass
class GenerateConfig:
    """The options of `python -m perfusion.generate`."""

    concept: str = MISSING  # concept file
    prompt: Any = MISSING  # text with the concept's placeholder, or a list of texts
    beta: Any = None  # gate's threshold, or a list: lower looks more like the concept; null: as the concept says
    tau: float | None = None  # gate's softness; null: as the concept says
    num: int = 4  # pictures of each prompt, and of each beta
    seed: int = 0  # of the first of these; the others follow on
    out: str | None = None  # folder; null: generated/<concept>-<prompt>
    backbone: str | None = None  # toyland, sd15, ...; null: the kind that the concept was trained on
    path: str | None = None  # backbone's diffusers folder or hub id; null: the weights that it ships
    dtype: str = "float32"  # float32, float16 or bfloat16
    device: str = "auto"  # auto: cuda, then mps, then cpu
    steps: int | None = None  # denoising steps; null: the backbone's
    guidance: float | None = None  # classifier-free guidance; null: the backbone's
    batch: int = 8  # pictures at once on a GPU; a CPU takes one at a time, so that none depends on the others


def main(argv: Sequence[str]) -> None:
    """Generate what a command line describes."""
    generate(parse_key_values([_readable(word) for word in argv], GenerateConfig, USAGE))


def generate(config: GenerateConfig) -> Path:
    """Draw, and write each picture, `manifest.json` and `grid.png` into one folder; returns it.

    What lies there from former runs stays, and stays in the manifest; a picture is replaced by the same picture only.

    Raises:
        ConfigError: an option that cannot be used, or no such backbone.
        ConceptFileError: no concept file, or one for another backbone.
        BackboneError, SamplingError, ManifestError: what cannot be loaded, drawn, or read in the folder.
    """
    from perfusion.concept import Concept
    from perfusion.manifest import known_records

    prompts, betas = _prompts(config), _betas(config)
    if config.num < 1:
        raise ConfigError(f"num: found {config.num}, expected at least 1")
    concept = Concept.load(Path(config.concept).expanduser())
    for prompt in prompts:
        if not contains(prompt, concept.placeholder):
            print(
                f"warning: {prompt!r} does not name the concept; put its placeholder {concept.placeholder} where it "
                "shall be",
                file=sys.stderr,
            )
    name = _name(config.concept, concept)
    out = Path(config.out or Path("generated") / f"{name}-{slug(prompts[0])}").expanduser()
    known = known_records(out)
    with _attached(config, concept, betas[0]) as attached:
        defaults = attached.backbone.config
        steps = defaults.steps if config.steps is None else config.steps
        guidance = defaults.guidance if config.guidance is None else config.guidance
        records = _records(config, prompts, betas, name, attached, steps, guidance)
        records = named(records, known)
        _draw(config, attached, records, known, out)
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
    front = len({record.beta for record in records}) > 1
    result: list[ImageRecord] = []
    for record in records:
        stem = f"{slug(record.prompt)}-{record.seed:04d}" + (f"-beta-{record.beta:g}" if front else "")
        choices = (replace(record, file=f"{stem}{suffix}.png") for suffix in _suffixes())
        free = next(choice for choice in choices if taken.get(choice.file, choice) == choice)
        taken[free.file] = free
        result.append(free)
    return result


def _suffixes() -> Iterable[str]:
    yield ""
    number = 2
    while True:
        yield f"-{number}"
        number += 1


def _readable(word: str) -> str:
    """A word of the command line as `parse_key_values` wants it.

    The backbone's own keys may be named as in training, `backbone.path=`. A prompt is text as it stands, unless it is
    a list.
    """
    key, equals, value = word.removeprefix("backbone.").partition("=")
    if equals and key == "prompt" and not value.lstrip().startswith("["):
        value = json.dumps(value.replace("${", "\\${"), ensure_ascii=False)
    return f"{key}{equals}{value}"


def _prompts(config: GenerateConfig) -> list[str]:
    prompts = [config.prompt] if isinstance(config.prompt, str) else config.prompt
    if not isinstance(prompts, list) or not prompts or not all(isinstance(p, str) and p.strip() for p in prompts):
        raise ConfigError(f"prompt: found {config.prompt!r}, expected a text or a list of texts")
    return prompts


def _betas(config: GenerateConfig) -> list[float | None]:
    """One β or several; None is the concept's own."""
    given = config.beta
    if isinstance(given, str):  # 0.4,0.55 on a command line
        given = given.split(",")
    try:
        betas: list[float | None] = [None] if given is None else [float(b) for b in _listed(given)]
    except (TypeError, ValueError):
        betas = []
    if not betas:
        raise ConfigError(f"beta: found {config.beta!r}, expected a number, or several as in beta=0.4,0.55,0.7")
    if len({*betas}) < len(betas):
        raise ConfigError(f"beta: found {config.beta!r}, expected each value once")
    return betas


def _listed(value: Any) -> list[Any]:
    return value if isinstance(value, list) else [value]


def _name(file: str, concept: Concept) -> str:
    """What to call a concept: its file's name if that says more than that it is one, else its placeholder's letters."""
    stem = Path(file).stem
    return slug(concept.placeholder) if stem == "concept" else stem


def _attached(config: GenerateConfig, concept: Concept, beta: float | None) -> Attached:
    """The concept in a backbone that was loaded for it."""
    from perfusion.backbones import backbone_class
    from perfusion.presets import backbone_config

    family = concept.fingerprint.get("family", "toyland")
    chosen = backbone_config(config.backbone or family, config.path, config.dtype, config.device)
    return concept.attach(backbone_class(chosen.name).load(chosen), beta=beta, tau=config.tau)


def _records(
    config: GenerateConfig,
    prompts: Sequence[str],
    betas: Sequence[float | None],
    name: str,
    attached: Attached,
    steps: int,
    guidance: float,
) -> list[ImageRecord]:
    """What is known of each picture before it is drawn, prompt by prompt and β by β, but for its file."""
    from perfusion.manifest import ImageRecord

    concept = attached.concept
    gated = hasattr(type(attached.method), "beta")
    common: dict[str, Any] = {
        "file": "",
        "concept": name,
        "concept_hash": concept.hash,
        "placeholder": concept.placeholder,
        "superclass": concept.superclass,
        "method": concept.method,
        "backbone": concept.fingerprint.get("family"),
        "tau": attached.tau if gated else None,
        "steps": steps,
        "guidance": guidance,
    }
    return [
        ImageRecord(prompt=p, seed=config.seed + k, beta=attached.beta if gated and b is None else b, **common)  # type: ignore[arg-type]
        for p in prompts
        for b in betas
        for k in range(config.num)
    ]


def _draw(
    config: GenerateConfig,
    attached: Attached,
    records: Sequence[ImageRecord],
    known: Sequence[ImageRecord],
    out: Path,
) -> None:
    """Draw the pictures of `records` into `out`; when interrupted, the manifest names those that were finished."""
    import torch

    from perfusion.contact_sheet import captioned_sheet
    from perfusion.files import atomic_path
    from perfusion.manifest import save_png, write_manifest
    from perfusion.sampling import stream

    betas: list[Any] = [record.beta for record in records]
    front = len({*betas}) > 1

    def set_strength(batch: slice) -> None:
        if front:
            attached.beta = torch.tensor(betas[batch])

    drawn = stream(
        attached.backbone.pipe,
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
        written = {record.file: record for record in (*known, *records[: len(images)])}
        write_manifest(out, written.values())
    captions = [r.prompt + (f"   β {r.beta:g}" if front else "") for r in records[:: config.num]]
    groups = [(caption, images[i * config.num : (i + 1) * config.num]) for i, caption in enumerate(captions)]
    with atomic_path(out / GRID) as temporary:
        captioned_sheet(groups).save(temporary)


if __name__ == "__main__":
    sys.exit(run_cli(main))
