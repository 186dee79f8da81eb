"""`python -m perfusion.generate`: pictures of a concept. `--help` says how it is used."""

from __future__ import annotations

import difflib
import itertools
import json
import math
import sys
from collections.abc import Mapping, Sequence
from contextlib import ExitStack, suppress
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

from omegaconf import MISSING

from perfusion.cli import parse_key_values, run_cli
from perfusion.config import ConfigError
from perfusion.data.prompts import contains

# Torch and its friends take seconds to import: `--help` and a mistyped key do without them.
if TYPE_CHECKING:
    from PIL.Image import Image

    from perfusion.concept import Attached, Concept
    from perfusion.manifest import ImageRecord

USAGE = """
Usage: python -m perfusion.generate concept=<file> prompt='a photo of <cat*> on the beach' [key=value ...]

Draws pictures of a trained concept. Each has a seed of its own: picture k of `seed` is the one that `seed + k` gives
alone. All of this is written beside the pictures (manifest.json), and into them (PNG text).
Several prompts:  prompt='["a photo of <cat*> on the beach", "a sketch of <cat*>"]'
What the concept's method can be set to is a key, too: beta, tau and key_lock of Perfusion, scale of a LoRA.
  beta: the gate's threshold, lower is more of the concept; tau: its softness; key_lock: local or global, where the
  prompt's keys come from; scale: strength of a LoRA, 0 to 1 and beyond
Several strengths, one row of pictures each:  beta=0.4,0.55,0.7
The strength with the best harmonic mean of CLIP-I and CLIP-T:  beta=auto
Several concepts:  concept='[cat.safetensors, teddy.safetensors]' prompt='<cat*> and <teddy*> on the beach'
  with strengths of their own:  beta='[[0.6, 0.4]]', and gates of their own softness:  tau='[[0.15, 0.1]]'
The base model beside them, its superclass in the concept's place:  beta=0.5,0.7,inf
What others made for the same model:  lora=style.safetensors lora_scale=0.8 embedding=sketchy.safetensors
From a picture:  image=room.jpg strength=0.6, and only where a mask is white:  mask=sofa.png
Along a picture:  controlnet=<folder or hub id> control_image=edges.png
"""

GRID = "grid.png"
_GRID_OF = "grid_of"  # key of the PNG text that says which concept a grid shows
AUTO = "auto"


@dataclass
class GenerateConfig:
    """The options of `python -m perfusion.generate`."""

    concept: Any = MISSING  # concept file, folder of its run, or hub:owner/name; or a list that are drawn together
    prompt: Any = MISSING  # text with the concept's placeholder, or a list of texts
    dials: dict[str, Any] = field(default_factory=dict)  # see above; beta=0.6 is short for dials.beta=0.6
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
    negative_prompt: str | None = None  # what guidance leads away from
    width: int | None = None  # pixels; null: the backbone's
    height: int | None = None  # pixels; null: the backbone's
    scheduler: str | None = None  # ddim, dpm++, unipc or euler; null: DDIM
    lora: Any = None  # .safetensors file of a LoRA for the model, or a list
    lora_scale: Any = 1.0  # their strength, or a list of as many
    embedding: Any = None  # file of a textual inversion, or a list; its word can then stand in prompts
    image: str | None = None  # picture to start from; what is drawn has its shape, or width= and height= crop it
    strength: float | None = None  # how much of it is drawn anew, to 1; null: 0.8, with a mask 1
    mask: str | None = None  # what of the image is drawn anew: white; black stays
    controlnet: str | None = None  # folder or hub id of a diffusers ControlNet for the model
    control_image: str | None = None  # what it follows, made ready for it (edges, depth, a pose)
    controlnet_scale: float | None = None  # how closely; null: 1
    references: Any = None  # for beta=auto: pictures of the concept; null: those that it was trained on
    scorer: str | None = None  # for beta=auto: toyland, an open_clip name, or a folder; null: Toyland's own on Toyland
    pretrained: str | None = None  # for beta=auto: the scorer's weights, a file or a tag
    batch: int = 8  # pictures at once on a GPU; a CPU takes one at a time, so that none depends on the others


_KEYS = [field.name for field in fields(GenerateConfig)]
_TEXTS = ("concept", "prompt", "lora", "embedding")  # a text, or a list of them
_CONDITIONS = ("image", "strength", "mask", "controlnet", "control_image", "controlnet_scale")


def main(argv: Sequence[str]) -> None:
    """Generate what a command line describes."""
    generate(parse_key_values([_readable(word) for word in argv], GenerateConfig, USAGE))


def generate(config: GenerateConfig) -> Path:
    """Draw, and write each picture, `manifest.json` and `grid.png` into one folder; returns it.

    What lies there stays: a picture is replaced by the same picture only, and `grid.png` by one of the same concept.
    Where another file has the name, the new one is called `...-2.png`.

    Raises:
        ConfigError: an option that cannot be used, one that no concept's method has, or no such backbone.
        ConceptFileError: no concept file, or one for another backbone.
        ConceptImageError: a picture or mask that cannot be read.
        TokenError: a prompt is so long that a concept's placeholder would be cut off; nothing is drawn then.
        BackboneError, SamplingError, ManifestError: what cannot be loaded, drawn, or read in the folder.
        HubError: a concept that the hub does not give.
    """
    from perfusion import addons
    from perfusion.backbones import backbone_class, chosen, load_backbone
    from perfusion.concept import Concept
    from perfusion.conditions import read_conditions
    from perfusion.drawing import draw, name_of, planned
    from perfusion.manifest import known_records, slug

    prompts, files = _texts("prompt", config.prompt, "text"), _texts("concept", config.concept, "file")
    dials = {name: value for name, value in config.dials.items() if value is not None}
    auto = dials.get("beta") == AUTO
    if auto and len(files) > 1:
        raise ConfigError("beta=auto: found several concepts, expected one; find the strength of each on its own")
    if config.num < 1:
        raise ConfigError(f"num: found {config.num}, expected at least 1")
    loras, scales = _loras(config)
    embeddings = [] if config.embedding is None else _texts("embedding", config.embedding, "file")
    asked = _size(config)
    conditions = read_conditions(**{key: getattr(config, key) for key in _CONDITIONS})
    concepts = [Concept.load(_file_of(file)) for file in files]
    if auto:
        concepts[0].check_dial("beta")
        del dials["beta"]
    given = {name: _rows(name, value, concepts) for name, value in dials.items()}
    for prompt in prompts:
        if not any(contains(prompt, concept.placeholder) for concept in concepts):
            words = " or ".join(concept.placeholder for concept in concepts)
            print(
                f"warning: {prompt!r} does not name the concept; put its placeholder {words} where it shall be",
                file=sys.stderr,
            )
    names = [name_of(Path(file), concept.placeholder) for file, concept in zip(files, concepts, strict=True)]
    out = Path(config.out or Path("generated") / f"{'-'.join(names)}-{slug(prompts[0])}").expanduser()
    known_records(out)  # which raises before anything is loaded
    model = chosen(config, default=concepts[0].family)
    steps = model.steps if config.steps is None else config.steps
    conditions.check_steps(steps)
    if (net := conditions.steering) is not None:
        backbone_class(model.name).check_controlnet(model, net)
    backbone = load_backbone(config, default=concepts[0].family)
    size = conditions.size(asked, backbone.config.resolution)
    width, height = size or (None, None)
    if config.scheduler is not None:
        addons.set_scheduler(backbone.pipe, config.scheduler)
    addons.load_loras(backbone.pipe, loras, scales)
    words = addons.load_embeddings(backbone.pipe, embeddings)
    if words:
        print(f"words of embeddings: {', '.join(words)}")
    with ExitStack() as stack:
        attached = [stack.enter_context(concept.attach(backbone)) for concept in concepts]
        backbone.check_prompts(prompts)
        if auto:
            given["beta"] = [(_best(config, attached[0]),)]
        rows = _combined(given, config, attached)
        pipe = stack.enter_context(conditions.pipeline(backbone.pipe))
        said = {
            "steps": steps,
            "guidance": backbone.config.guidance if config.guidance is None else config.guidance,
            "negative_prompt": config.negative_prompt,
            "width": width,
            "height": height,
            "loras": ", ".join(f"{Path(f).name} {s:g}" for f, s in zip(loras, scales, strict=True)) or None,
            "embeddings": ", ".join(words) or None,
            **conditions.recorded,
        }
        seeds = range(config.seed, config.seed + config.num)
        wanted = itertools.product(prompts, rows, seeds)
        shots = planned(backbone.pipe, attached, wanted, out, names, **said)
        more = {"size": size, "given": conditions.arguments(size)}
        images = draw(pipe, attached, shots, config.batch, progress=True, **more)
    records = [shot.record for shot in shots]
    grid = _grid_path(out, records[0])
    _write_grid(grid, records, images, config.num)
    print(f"pictures: {out} ({len(records)} PNG files and manifest.json)")
    print(f"all together: {grid}")
    return out


def _readable(word: str) -> str:
    """A word of the command line as `parse_key_values` wants it.

    The backbone's own keys may be named as in training, `backbone.path=`. A prompt or file is text as it stands, unless
    it is a list. What is no key of this command is a dial of the concept's method.
    """
    key, equals, value = word.removeprefix("backbone.").partition("=")
    if equals and key in _TEXTS and not value.lstrip().startswith("["):
        value = json.dumps(value.replace("${", "\\${"), ensure_ascii=False)
    if equals and key.isidentifier() and key not in _KEYS:
        key = f"dials.{key}"
    return f"{key}{equals}{value}"


def _texts(key: str, given: Any, kind: str) -> list[str]:
    """One text or several, such as prompts or names of files. Raises ConfigError."""
    texts = _listed(given)
    if not texts or not all(isinstance(text, str) and text.strip() for text in texts):
        raise ConfigError(f"{key}: found {given!r}, expected a {kind} or a list of {kind}s")
    return texts


def _file_of(given: str) -> Path:
    """The concept's file, also where the folder of its run or a repository of the hub was given."""
    from perfusion.hub import named_file
    from perfusion.training.run_folder import RunFolder

    path = named_file(given)
    return RunFolder(path).concept if path.is_dir() else path


def _loras(config: GenerateConfig) -> tuple[list[str], list[float]]:
    """Files and scales. Raises ConfigError."""
    files = [] if config.lora is None else _texts("lora", config.lora, "file")
    scales = _listed(config.lora_scale)
    scales = scales * len(files) if len(scales) == 1 else scales
    numbers = [float(s) for s in scales if isinstance(s, (int, float)) and math.isfinite(s)]
    if len(numbers) != len(scales) or len(scales) != len(files):
        raise ConfigError(f"lora_scale: found {config.lora_scale!r}, expected a number, or one for each lora")
    return files, numbers


def _size(config: GenerateConfig) -> tuple[int, int] | None:
    """Width and height, if they were given. Raises ConfigError."""
    given = {"width": config.width, "height": config.height}
    for key, value in given.items():
        if value is not None and (value < 8 or value % 8):
            raise ConfigError(f"{key}: found {value}, expected a multiple of 8 pixels")
    if (config.width is None) != (config.height is None):
        raise ConfigError("width, height: found one of them, expected both or none")
    return None if config.width is None or config.height is None else (config.width, config.height)


def _rows(name: str, given: Any, concepts: Sequence[Concept]) -> list[tuple[Any, ...]]:
    """For each row of pictures, what a dial of each concept is set to; None is the concept's own value.

    One value for all concepts is for those that have such a dial. Raises ConfigError.
    """
    dial = next((concept.dials[name] for concept in concepts if name in concept.dials), None)
    if dial is None:
        _check_key(name)
        concepts[0].check_dial(name)
    number = dial is None or dial.number
    rows: list[tuple[Any, ...]] = []
    try:
        for row in given.split(",") if isinstance(given, str) else _listed(given):
            values = [None if value is None else _value(value, number) for value in _listed(row)]
            if len(values) == 1:
                values = [values[0] if name in concept.dials else None for concept in concepts]
            rows.append(tuple(values))
    except (TypeError, ValueError):
        rows = []
    if not rows or any(len(row) != len(concepts) for row in rows):
        kind, example = ("number", "0.4,0.55,0.7") if number else ("word", "one,another")
        auto = ", or auto" if name == "beta" else ""
        each = "" if len(concepts) == 1 else f", or [[...]] with {len(concepts)} {kind}s, one for each concept"
        raise ConfigError(f"{name}: found {given!r}, expected a {kind}, several as in {name}={example}{auto}{each}")
    if any(isinstance(value, float) and (math.isnan(value) or value == -math.inf) for row in rows for value in row):
        raise ConfigError(f"{name}: found {given!r}, expected finite numbers, or inf for the base model")
    for concept, values in zip(concepts, zip(*rows, strict=True), strict=True):
        if any(value is not None for value in values):
            concept.check_dial(name)
    return rows


def _value(value: Any, number: bool) -> float | str:
    if not number and not isinstance(value, str):
        raise TypeError
    return float(value) if number else value.strip()


def _check_key(name: str) -> None:
    """Hold that some method has such a dial. Raises ConfigError."""
    from perfusion.methods.base import available, method_class

    known = [*_KEYS, *dict.fromkeys(dial.name for method in available() for dial in method_class(method).dials)]
    if name not in known:
        near = difflib.get_close_matches(name, known, n=1)
        hint = f"; did you mean {near[0]!r}?" if near else "."
        raise ConfigError(f"{name}: unknown key{hint} Known here: {', '.join(known)}")


def _combined(
    given: Mapping[str, Sequence[tuple[Any, ...]]], config: GenerateConfig, attached: Sequence[Attached]
) -> list[list[dict[str, Any]]]:
    """For each row of pictures, the dials of each concept: all combinations of what was given, own values filled in."""
    own = [one.dials for one in attached]
    filled: dict[str, list[tuple[Any, ...]]] = {}
    for name, rows in given.items():
        values = [
            tuple(mine.get(name) if value is None else value for value, mine in zip(row, own, strict=True))
            for row in rows
        ]
        if len({*values}) < len(values):
            raise ConfigError(f"{name}: found {config.dials[name]!r}, which is {values}; expected each value once")
        filled[name] = values
    return [
        [
            {name: values[k] for name, values in zip(filled, chosen, strict=True) if values[k] is not None}
            for k in range(len(attached))
        ]
        for chosen in itertools.product(*filled.values())
    ]


def _listed(value: Any) -> list[Any]:
    return value if isinstance(value, list) else [value]


def _best(config: GenerateConfig, attached: Attached) -> float:
    """The strength that the scores speak for, said aloud."""
    from perfusion.strength import choose

    beta = choose(attached, config.references, config.scorer, config.pretrained)
    print(f"beta=auto: {beta:g} has the best harmonic mean of CLIP-I and CLIP-T")
    return beta


def _grid_path(folder: Path, record: ImageRecord) -> Path:
    """Where the grid goes: no file is there, or one that shows the same concept."""
    from PIL import Image

    from perfusion.manifest import numbered

    for path in (folder / name for name in numbered(Path(GRID).stem)):
        if not path.exists():
            return path
        with suppress(OSError):  # no picture
            if path.is_file():
                with Image.open(path) as image:
                    if getattr(image, "text", {}).get(_GRID_OF) == record.concept_hash:
                        return path
    raise AssertionError


def _write_grid(path: Path, records: Sequence[ImageRecord], images: Sequence[Image], columns: int) -> None:
    """All pictures, those that differ in their seed alone in one row."""
    from PIL.PngImagePlugin import PngInfo

    from perfusion.contact_sheet import captioned_sheet
    from perfusion.files import atomic_path
    from perfusion.manifest import differing_dials, spelled

    differing = differing_dials(records)
    groups = []
    for start in range(0, len(records), columns):
        first = records[start]
        dials = ", ".join(spelled(name, first.dials[name]) for name in differing)
        groups.append((f"{first.prompt}   {dials}".rstrip(), images[start : start + columns]))
    info = PngInfo()
    info.add_itxt(_GRID_OF, records[0].concept_hash or "")
    with atomic_path(path) as temporary:
        captioned_sheet(groups).save(temporary, pnginfo=info)


if __name__ == "__main__":
    sys.exit(run_cli(main))
