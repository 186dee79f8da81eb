"""The schema of every config group, and the one place where a config is checked against it.

Hydra composes YAML, `checked` turns the result into these dataclasses, and plain code builds from them. A key that no
dataclass has, or a value of the wrong type, is a `ConfigError` that names the key; a typo never becomes a default.
A method's options are a dataclass beside the method (`perfusion/methods/<name>.py`), checked by the same function.
"""

from __future__ import annotations

import dataclasses
import difflib
import math
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

from omegaconf import MISSING, DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

T = TypeVar("T")

NAME_LENGTH = 100  # of a concept's name, which is a part of file names


def conf_folder(package: Path) -> Path:
    """The folder of the presets: inside the package in an installed wheel, beside it in a checkout."""
    inside = package / "conf"
    return inside if inside.is_dir() else package.parent / "conf"


CONF = conf_folder(Path(__file__).resolve().parent)


class ConfigError(ValueError):
    """A config that does not fit the schema; names the key, what was found and what was expected."""


@dataclass
class CovarianceConfig:
    """Where the second moment `C` of the text encodings comes from."""

    captions: str = "everyday"  # built-in set ("everyday", "toyland") or a text file, one caption per line
    count: int = 10_000  # captions taken
    positions: str = "all"  # all: every position that the cross-attention sees; words: no beginning, end and padding
    matrix: str | None = None  # .safetensors or .npy file with a ready C (d, d); the three keys above do not count then
    ridge: float = 1e-2  # added to the diagonal, as a share of its mean
    cache: str = "~/.cache/perfusion/covariance"


@dataclass
class BackboneConfig:
    """A frozen text-to-image model."""

    name: str = MISSING  # module of perfusion.backbones
    path: str | None = None  # diffusers folder, .safetensors file or hub id; None: the weights that the backbone ships
    layout: str | None = None  # configs of a .safetensors file: known layout or diffusers folder; None: as it looks
    dtype: str = "float32"  # float32, float16 or bfloat16
    device: str = "auto"  # auto: cuda, then mps, then cpu
    resolution: int = 512  # pixels
    prompts: str = "imagenet"  # template set of perfusion.data.prompts
    steps: int = 50  # DDIM steps of samples
    guidance: float = 6.0
    gradient_checkpointing: bool = False  # of the denoiser, in training: less memory and more time, the same result
    covariance: CovarianceConfig = field(default_factory=CovarianceConfig)


def which_weights(config: BackboneConfig) -> dict[str, str]:
    """Keys of a command line, and their values, that say which weights a config names, as far as it has not the
    defaults."""
    values = {"path": config.path, "layout": config.layout, "dtype": config.dtype}
    return {f"backbone.{key}": value for key, value in values.items() if value not in (None, "float32")}


@dataclass
class ToylandConcept:
    """Images drawn by Toyland's renderer instead of photos: one fixed instance."""

    instance: int = 0  # seed of the instance
    count: int = 1  # training images


@dataclass
class ConceptConfig:
    """What is learned: images of it, its superclass, and the word that will stand for it."""

    name: str = MISSING
    superclass: str = MISSING  # one or several words, e.g. "cat", "teddy bear"
    placeholder: str = MISSING  # a word the tokenizer does not know, e.g. "<cat*>"
    images: Any = None  # folder, glob, file, or a list of these; None: drawn by Toyland
    masks: Any = None  # likewise, paired by file name; "clipseg": drawn by CLIPSeg for the superclass; None: no masks
    captions: str | None = None  # files: what cat.txt says is the prompt of cat.jpg; None: a template, drawn each time
    templates: Any = None  # own ones, a list or a text file of them, each with a {}; None: those of backbone.prompts
    mirror: bool = False  # mirror half of the samples, pictures and masks, as the seed draws it
    clipseg: str = "CIDAS/clipseg-rd64-refined"  # hub id or folder of the CLIPSeg model, for masks=clipseg
    masks_cache: str = "~/.cache/perfusion/masks"  # where the masks that CLIPSeg has drawn are kept
    prior: Any = None  # real pictures of the superclass, as images=, for methods that preserve it; None: drawn, once
    prior_cache: str = "~/.cache/perfusion/prior"  # where the drawn ones are kept
    toyland: ToylandConcept = field(default_factory=ToylandConcept)


@dataclass
class RunConfig:
    """Where results go. The folder follows from the config, not from the clock, so that a run can resume."""

    dir: str | None = None  # None: <root>/<experiment>/<concept>-<method>-<hash of the config>
    root: str = "runs"
    overwrite: bool = False  # train again although the folder holds a finished run
    requeue: bool = False  # at SIGUSR1 (sbatch --signal=B:USR1@120): save the step, and queue SLURM's job again


@dataclass
class TrainConfig:
    """The whole config of `python -m perfusion.train`."""

    experiment: str = "default"
    seed: int = 0
    backbone: BackboneConfig = field(default_factory=BackboneConfig)
    method: dict[str, Any] = field(default_factory=dict)  # `name` plus the options of perfusion.methods.<name>
    concept: ConceptConfig = field(default_factory=ConceptConfig)
    trainer: dict[str, Any] = field(default_factory=dict)  # keywords of lightning.Trainer
    logger: dict[str, Any] = field(default_factory=dict)  # `_target_` entries, besides the CSV log
    callbacks: dict[str, Any] = field(default_factory=dict)  # `_target_` entries
    run: RunConfig = field(default_factory=RunConfig)


def checked(schema: type[T], values: Any, where: str = "") -> T:
    """`values` (a mapping or DictConfig) as an instance of the dataclass `schema`.

    Raises:
        ConfigError: an unknown key (with the nearest known one), a wrong type, or a missing value; the message starts
            with the full key, `where` being the prefix.
    """
    plain = OmegaConf.to_container(values, resolve=True) if isinstance(values, DictConfig) else dict(values)
    _reject_unknown(schema, plain, where)
    try:
        merged = OmegaConf.merge(OmegaConf.structured(schema), plain)
        result = OmegaConf.to_object(merged)
    except OmegaConfBaseException as error:
        key = ".".join(part for part in (where, str(error.full_key or "")) if part)
        raise ConfigError(f"{key}: {str(error).splitlines()[0]}") from error
    assert isinstance(result, schema)
    return result


def check_ranges(config: TrainConfig) -> None:
    """Hold what values must hold that no library refuses, or only later and in its own words. Raises ConfigError."""
    backbone, concept = config.backbone, config.concept
    drawn = concept.toyland
    for key, value, holds, expected in (
        ("backbone.resolution", backbone.resolution, backbone.resolution >= 1, "a number of pixels, at least 1"),
        ("backbone.steps", backbone.steps, backbone.steps >= 1, "at least 1"),
        ("backbone.guidance", backbone.guidance, math.isfinite(backbone.guidance), "a finite number"),
        (
            "concept.name",
            concept.name,
            0 < len(concept.name.strip()) <= NAME_LENGTH and concept.name.isprintable(),
            f"1 to {NAME_LENGTH} printable characters",
        ),
        ("concept.captions", concept.captions, concept.captions in (None, "files"), "files, or null for none"),
        ("concept.toyland.count", drawn.count, drawn.count >= 1, "at least 1 picture"),
        ("concept.toyland.instance", drawn.instance, drawn.instance >= 0, "a seed, at least 0"),
    ):
        if not holds:
            raise ConfigError(f"{key}: found {value!r}, expected {expected}")


def hint(found: str, known: Iterable[str]) -> str:
    """What to add to a message about an unknown name: the nearest known one, if one is near."""
    near = difflib.get_close_matches(found, known, n=1)
    return f" (did you mean {near[0]!r}?)" if near else ""


def _reject_unknown(schema: type, values: Any, where: str) -> None:
    known = {f.name: f for f in dataclasses.fields(schema)}
    if not isinstance(values, dict):
        raise ConfigError(f"{where or 'config'}: expected a mapping, found {values!r}")
    for key, value in values.items():
        full = f"{where}.{key}" if where else str(key)
        if key not in known:
            near = difflib.get_close_matches(str(key), known, n=1)
            hint = f"; did you mean {near[0]!r}?" if near else "."
            raise ConfigError(f"{full}: unknown key{hint} Known here: {', '.join(known)}")
        inner = known[key].default_factory
        if isinstance(inner, type) and dataclasses.is_dataclass(inner) and value is not None:
            _reject_unknown(inner, value, full)
