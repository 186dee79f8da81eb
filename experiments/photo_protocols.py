"""Reads which subjects a folder of photos has, and the prompts of each.

A protocol says so: a YAML file with the keys of `ProtocolFile`, one of `experiments/protocols/` or a person's own.
Either it names the class of each folder of photos, as for DreamBench, or a list in JSON that does, as that of
CustomConcept101.
"""

from __future__ import annotations

import itertools
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf

from eval.score_kinds import BY_NAME
from eval.tables import Reported
from experiments.photos import PhotoOptions, Photos, PhotoSubject, word
from perfusion.config import ConfigError, checked

PROTOCOLS = Path(__file__).with_name("protocols")
OWN = "protocol.yaml"  # of a data folder
CLIPSEG = "clipseg"


@dataclass
class ProtocolFile:
    """The keys of a protocol file."""

    based_on: str | None = None  # a shipped protocol, whose values hold where this file has none
    classes: dict[str, str] = field(default_factory=dict)  # folder of photos -> class
    listed_in: str | None = None  # or a file in the data folder, laid out like CustomConcept101's dataset.json
    live: list[str] = field(default_factory=list)  # classes that have the prompts `live`
    prompts: dict[str, Any] = field(default_factory=dict)  # `object`, `live`, or a class -> its prompts, with one {}
    pair_prompts: list[str] = field(default_factory=list)  # of two subjects, with two {}
    seeds: int = 4  # pictures of each prompt
    steps: int = 50  # of DDIM
    guidance: float = 6.0
    published: dict[str, Any] = field(default_factory=dict)  # what others report


@dataclass
class _Report:
    """One entry of `published`."""

    source: str = "???"
    setting: str = "???"
    concepts: int = 0
    methods: dict[str, dict[str, float]] = field(default_factory=dict)


def read_photos(options: PhotoOptions, workers: int) -> Photos:
    """The world that a command line describes, all of its files looked at; no model is loaded. Raises ConfigError: an
    option that is missing, a protocol or a folder that cannot be used."""
    data = _folder(options.data, "data", "a folder with a folder of photos for each subject")
    if options.scorer is None:
        raise ConfigError(
            "scorer: not given beside world=photos; expected an open_clip model that gives CLIP-T and CLIP-I, with its "
            "weights, as in scorer=ViT-B-32 pretrained=<file or tag>"
        )
    _check_model(options)
    if (protocol := options.protocol) is None:  # the data folder's own, else that of the data set whose list lies there
        shipped = "customconcept101" if (data / "dataset.json").is_file() else "dreambench"
        protocol = str(data / OWN) if (data / OWN).is_file() else shipped
    values, file = _read_protocol(protocol)
    if bool(values.classes) == bool(values.listed_in):
        raise ConfigError(
            f"protocol: {file} has {'both' if values.classes else 'neither'} classes and listed_in, expected one: "
            "the class of each folder of photos, or a file in the data folder that lists them"
        )
    for key, number in (("seeds", values.seeds), ("steps", values.steps)):
        if number < 1:
            raise ConfigError(f"{file}: {key}: found {number}, expected at least 1")
    listed = _listed(data, values.listed_in) if values.listed_in else _by_class(data, values, file)
    return Photos(
        subjects=_told_apart([_with_masks(subject, options.masks) for subject in listed]),
        pair_prompts=_templates(values.pair_prompts, 2, f"{file}: pair_prompts"),
        published=tuple(_published(values.published, file)),
        seeds=tuple(range(values.seeds)),
        steps=values.steps,
        guidance=values.guidance,
        protocol=word(file.parent.name if file.name == OWN else file.stem),
        model=options,
        workers=workers,
    )


# --- the protocol -----------------------------------------------------------------------------------------------------


def _read_protocol(name: str, above: tuple[Path, ...] = ()) -> tuple[ProtocolFile, Path]:
    """The protocol of that name, or in that file, over what it is based on; and its file."""
    shipped = {path.stem: path for path in PROTOCOLS.glob("*.yaml")}
    file = shipped.get(name, Path(name).expanduser())
    known = ", ".join(sorted(shipped))
    if not file.is_file():
        raise ConfigError(f"protocol: found {name!r}, expected one of {known}, or a YAML file")
    if file in above:
        raise ConfigError(f"{file}: is based on itself, expected based_on: one of {known}")
    try:
        values = OmegaConf.to_container(OmegaConf.load(file))
    except Exception as error:  # YAML errors are of many kinds
        raise ConfigError(f"protocol: {file} is not readable as YAML: {error}") from error
    if not isinstance(values, dict):
        keys = ", ".join(one.name for one in fields(ProtocolFile))
        raise ConfigError(f"protocol: {file} holds {values!r}, expected the keys {keys}")
    protocol = checked(ProtocolFile, values, str(file))
    if protocol.based_on is not None:
        below, _ = _read_protocol(protocol.based_on, (*above, file))
        merged = OmegaConf.merge(OmegaConf.create(asdict(below)), OmegaConf.create(values))
        protocol = checked(ProtocolFile, merged, str(file))
    return protocol, file


def _published(entries: Mapping[str, Any], file: Path) -> Iterator[Reported]:
    for key, value in entries.items():
        if not isinstance(value, dict):
            raise ConfigError(f"{file}: published.{key}: found {value!r}, expected source, setting, concepts, methods")
        report = checked(_Report, value, f"{file}: published.{key}")
        for method, scores in report.methods.items():
            if unknown := [name for name in scores if name not in BY_NAME]:
                raise ConfigError(
                    f"{file}: published.{key}: found {unknown[0]!r}, expected some of {', '.join(BY_NAME)}"
                )
            yield Reported(method, report.setting, report.source, report.concepts, scores)


# --- subjects ---------------------------------------------------------------------------------------------------------


def _by_class(data: Path, values: ProtocolFile, file: Path) -> list[PhotoSubject]:
    """The folders of photos that lie in the data folder, in the order of the protocol's classes."""
    there = {path.name for path in data.iterdir() if path.is_dir() and not path.name.startswith(".")}
    if not there:
        raise ConfigError(f"data: found no folder in {data}, expected one with photos for each subject")
    if unknown := sorted(there - {*values.classes}):
        raise ConfigError(
            f"data: found {data / unknown[0]}, whose class {file} does not say; expected it in its classes, or a "
            f"protocol.yaml of your own in {data} (see docs/experiments.md)"
        )
    found = []
    for name, superclass in values.classes.items():
        if name in there:
            kind = superclass if superclass in values.prompts else "live" if superclass in values.live else "object"
            prompts, where = values.prompts.get(kind), f"{file}: prompts.{kind}"
            if not isinstance(prompts, list) or not prompts:
                raise ConfigError(f"{where}: found {prompts!r}, expected the prompts of a {superclass}")
            found.append(_subject(name, superclass, data / name, _templates(prompts, 1, where)))
    return found


def _listed(data: Path, name: str) -> list[PhotoSubject]:
    """The subjects of a list like CustomConcept101's dataset.json."""
    file = data / name
    try:
        entries = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ConfigError(f"data: {file} is not readable as JSON: {error}") from error
    if not isinstance(entries, list) or not entries:
        raise ConfigError(f"data: {file}: expected a list of subjects, found {type(entries).__name__}")
    return [_entry(entry, f"{file}, entry {k}", data) for k, entry in enumerate(entries)]


def _entry(entry: Any, where: str, data: Path) -> PhotoSubject:
    for key in ("class_prompt", "instance_data_dir", "prompt_filename"):
        found = entry.get(key) if isinstance(entry, dict) else None
        if not isinstance(found, str) or not found.strip():
            raise ConfigError(f"data: {where}: {key}: found {found!r}, expected text")
    prompts = data / entry["prompt_filename"]
    try:
        lines = [line.strip() for line in prompts.read_text(encoding="utf-8").splitlines()]
    except (OSError, ValueError) as error:
        raise ConfigError(f"data: {where}: prompt_filename: {prompts} cannot be read: {error}") from error
    templates = _templates([line for line in lines if line], 1, str(prompts))
    if not templates:
        raise ConfigError(f"data: {where}: prompt_filename: {prompts} has no prompt")
    photos = data / entry["instance_data_dir"]
    return _subject(photos.name, entry["class_prompt"].strip(), photos, templates)


def _subject(name: str, superclass: str, photos: Path, prompts: tuple[str, ...]) -> PhotoSubject:
    from perfusion.data.images import ConceptImageError, find_images

    if not photos.is_dir():
        raise ConfigError(f"data: found no folder {photos}, expected the photos of {name}")
    try:
        found = find_images(str(photos), key=f"data: {name}")
    except ConceptImageError as error:
        raise ConfigError(str(error)) from error
    return PhotoSubject(name, superclass, str(photos), str(photos / found[0].name), len(found), prompts)


def _with_masks(subject: PhotoSubject, masks: str | None) -> PhotoSubject:
    if masks in (None, CLIPSEG):
        return replace(subject, masks=masks)
    folder = _folder(masks, "masks", f"{CLIPSEG}, or a folder with a folder of masks for each subject") / subject.name
    if not folder.is_dir():
        raise ConfigError(f"masks: found no folder {folder}, expected a mask for each photo of {subject.name} there")
    return replace(subject, masks=str(folder))


def _told_apart(subjects: Sequence[PhotoSubject]) -> tuple[PhotoSubject, ...]:
    """The subjects, if no two have the same placeholder."""
    for one, other in itertools.combinations(subjects, 2):
        if one.placeholder.casefold() == other.placeholder.casefold():
            raise ConfigError(
                f"data: found the subjects {one.name!r} and {other.name!r}, expected names that differ in letters"
            )
    return tuple(subjects)


def _templates(prompts: Sequence[Any], places: int, where: str) -> tuple[str, ...]:
    """Prompts, each once, if all have so many places for a concept."""
    for prompt in prompts:
        if not isinstance(prompt, str) or prompt.count("{}") != places:
            raise ConfigError(f"{where}: found the prompt {prompt!r}, expected {places} {{}} in it, for the concept")
    return tuple(dict.fromkeys(prompts))


def _folder(value: str | None, key: str, expected: str) -> Path:
    if value is None:
        raise ConfigError(f"{key}: not given beside world=photos; expected {expected}")
    folder = Path(value).expanduser()
    if not folder.is_dir():
        raise ConfigError(f"{key}: found no folder {value}, expected {expected}")
    return folder


def _check_model(model: PhotoOptions) -> None:
    from perfusion.backbones import PRESETS, backbone_class, backbone_config
    from perfusion.backbones.loading import resolve_device

    if model.preset not in (known := sorted(file.stem for file in PRESETS.glob("*.yaml"))):
        raise ConfigError(f"backbone: found {model.preset!r}, expected one of {', '.join(known)}")
    config = backbone_config(model.preset, model.path, layout=model.layout)
    if backbone_class(config.name).family == "toyland":
        raise ConfigError("backbone: found toyland, which draws toys alone; expected sd15, sd21 or sdxl for photos")
    if config.path is None:
        raise ConfigError(
            f"path: not given beside world=photos, and {model.preset} ships no weights; expected path=<folder, "
            ".safetensors file or hub id>"
        )
    resolve_device(model.device or "auto")
