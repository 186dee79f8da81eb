"""The claims on a folder of photos, with a model such as Stable Diffusion. Likeness is CLIP-I, prompts are followed by
CLIP-T.

Which subjects there are, and the prompts of each, a protocol says: a YAML file with the keys of `ProtocolFile`, one of
`experiments/protocols/` or a person's own. Either it names the class of each folder of photos, as for DreamBench, or a
list in JSON that does, as that of CustomConcept101.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import json
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from omegaconf import OmegaConf

from eval.score_kinds import BY_NAME
from experiments.settings import ONE, SEVERAL, Setting, Training
from experiments.world import PHOTOS, Published, World
from perfusion.config import ConceptConfig, ConfigError, checked

# Torch and its friends take seconds to import: `--help` and a mistyped key do without them.
if TYPE_CHECKING:
    from eval.folders import References
    from eval.scorers import Scorers

PROTOCOLS = Path(__file__).with_name("protocols")
OWN = "protocol.yaml"  # of a data folder
OBJECT, LIVE = "object", "live"  # kinds of prompts
CLIPSEG = "clipseg"
_TOYLAND = "_toyland"  # at the end of Toyland's presets
_UNMASKED = "method.masked_loss=false"
_SELECT = "callbacks=select"
_ENTRY = ("class_prompt", "instance_data_dir", "prompt_filename")  # what an entry of a list in JSON must have


@dataclass(frozen=True)
class PhotoOptions:
    """What the command line says of `world=photos`; None: the default."""

    data: str | None = None
    protocol: str | None = None
    masks: str | None = None
    backbone: str | None = None
    path: str | None = None
    layout: str | None = None
    dtype: str | None = None
    device: str | None = None
    scorer: str | None = None
    pretrained: str | None = None
    dino: str | None = None
    dino_pretrained: str | None = None


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


@dataclass(frozen=True)
class PhotoSubject:
    """One thing to learn from the photos in a folder.

    Attributes:
        photos: the folder; `first` of them is what is learned from where one picture is to be enough.
        masks: `clipseg`, or a folder with a mask for each photo.
        prompts: templates with one `{}`.
    """

    name: str
    superclass: str
    photos: str
    first: str
    count: int
    prompts: tuple[str, ...]
    masks: str | None = None

    @property
    def placeholder(self) -> str:
        return f"<{_word(self.name)}*>"

    @property
    def instance(self) -> None:
        return None

    @property
    def description(self) -> str:
        return self.superclass

    def about(self) -> dict[str, Any]:
        return {"name": self.name, "superclass": self.superclass, "photos": self.count}

    def concept(self, given: ConceptConfig, pictures: int | None) -> ConceptConfig:
        return replace(
            given,
            name=self.name,
            superclass=self.superclass,
            placeholder=self.placeholder,
            images=self.first if pictures == ONE else self.photos,
            masks=self.masks,
        )


@dataclass(frozen=True)
class Photos(World):
    """Photos of subjects, judged by CLIP.

    The slack of CLIP-T is a twentieth of what separates the methods of a published comparison (0.199 to 0.307), and
    what counts as slight is to it as in Toyland. Both were set before anything was measured.

    Attributes:
        protocol: the name of the protocol.
        model: the options that name the base model and the scorers.
        workers: processes that share this machine's cores.
    """

    kind = PHOTOS
    title = "photos"
    thing, ys = "subject", "values of CLIP-I"
    several, several_pictures = "all", "all pictures"
    x, y = "clip_t", "clip_i"
    slack, slack_means = 0.005, "a twentieth of what separates published methods"
    slight = 0.0125
    scheduler, sampler = "DDIMScheduler", "ddim"
    at_once = 4
    measured = True
    tables = True

    protocol: str = ""
    model: PhotoOptions = field(default_factory=PhotoOptions)
    learned: tuple[PhotoSubject, ...] = ()
    pair_prompts: tuple[str, ...] = ()
    reported: tuple[Published, ...] = ()
    workers: int = 1

    @property
    def subjects(self) -> tuple[PhotoSubject, ...]:
        return self.learned

    @property
    def prompts_each(self) -> int:
        return max(len(one.prompts) for one in self.learned)

    def templates(self, *of: PhotoSubject) -> tuple[str, ...]:
        return of[0].prompts if len(of) == 1 else self.pair_prompts

    def listed_prompts(self, pairs: bool) -> list[list[str]]:
        each = self.pair_prompts if pairs else [prompt for one in self.learned for prompt in one.prompts]
        return [[prompt] for prompt in dict.fromkeys(each)]

    def smaller(self, concepts: int, prompts: int, seeds: int, steps: int) -> Photos:
        return replace(
            self,
            learned=tuple(replace(one, prompts=one.prompts[:prompts]) for one in self.learned[:concepts]),
            pair_prompts=self.pair_prompts[:prompts],
            seeds=tuple(range(seeds)),
            steps=steps,
        )

    @property
    def published(self) -> tuple[Published, ...]:
        return self.reported

    @property
    def weights(self) -> str:
        model = self.model
        return _weights_digest(_preset(model), model.path, model.layout, model.dtype)

    @property
    def folder(self) -> str:
        return f"{self.protocol}-{self.weights}"

    @property
    def threads(self) -> int:
        return max(1, (os.cpu_count() or 1) // self.workers)

    @property
    def words(self) -> tuple[str, ...]:
        keys = {key: getattr(self.model, key) for key in ("path", "layout", "dtype", "device")}
        model = tuple(f"backbone.{key}={value}" for key, value in keys.items() if value is not None)
        # The preset asks for superclass and images; the subject's own take the places of these.
        concept = ("concept=photos", "concept.superclass=thing", "concept.images=none")
        return f"backbone={_preset(self.model)}", *model, *concept

    def training(self, training: Training) -> Training:
        """Published settings, and all photos where several are asked for; the kept step is chosen by the scorer."""
        training = training.usual if training.pictures == SEVERAL else training
        training = replace(training, preset=training.preset.removesuffix(_TOYLAND))
        scorer = {key: getattr(self.model, key) for key in ("scorer", "pretrained")}
        words = tuple(f"callbacks.select.{key}={value}" for key, value in scorer.items() if value is not None)
        if _SELECT not in training.changes or words[0] in training.changes:
            return training
        return replace(training, changes=(*training.changes, *words))

    def lacks(self, settings: Sequence[Setting]) -> str | None:
        if any(setting.described for setting in settings):
            return "subjects whose looks can be told in words, as world=toyland has them"
        unmasked = any(s.training is not None and _UNMASKED in s.training.changes for s in settings)
        return "masks of the photos, masks=" if unmasked and all(one.masks is None for one in self.learned) else None

    def references(self, subjects: Sequence[PhotoSubject]) -> References:
        from eval.folders import References

        return References(references={one.name: one.photos for one in subjects})

    def scorers(self) -> Scorers:
        model = self.model
        return _scorers(model.scorer, model.pretrained, model.dino, model.dino_pretrained, model.device or "auto")

    def autocast(self, device: Any) -> contextlib.AbstractContextManager[Any]:
        return contextlib.nullcontext()


def read_photos(options: PhotoOptions, workers: int) -> Photos:
    """The world that a command line describes, all of its files looked at; no model is loaded.

    Raises:
        ConfigError: an option that is missing, a protocol or a folder that cannot be used.
    """
    data = _folder(options.data, "data", "a folder with a folder of photos for each subject")
    if options.scorer is None:
        raise ConfigError(
            "scorer: not given beside world=photos; expected an open_clip model that gives CLIP-T and CLIP-I, with its "
            "weights, as in scorer=ViT-B-32 pretrained=<file or tag>"
        )
    _check_model(options)
    name = options.protocol or _usual_protocol(data)
    values, file = _read_protocol(name)
    listed = _listed(data, values.listed_in) if values.listed_in else _by_class(data, values, file)
    subjects = tuple(_with_masks(subject, options.masks) for subject in listed)
    _check_names(subjects)
    for prompt in values.pair_prompts:
        _check_places(prompt, 2, f"{file}: pair_prompts")
    return Photos(
        seeds=tuple(range(values.seeds)),
        steps=values.steps,
        guidance=values.guidance,
        protocol=_word(file.parent.name if file.name == OWN else file.stem),
        model=options,
        learned=subjects,
        pair_prompts=tuple(dict.fromkeys(values.pair_prompts)),
        reported=tuple(_published(values.published, file)),
        workers=workers,
    )


# --- the protocol -----------------------------------------------------------------------------------------------------


def _usual_protocol(data: Path) -> str:
    """The data folder's own protocol; else that of the data set whose list lies there; else DreamBench's."""
    if (data / OWN).is_file():
        return str(data / OWN)
    return "customconcept101" if (data / "dataset.json").is_file() else "dreambench"


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
        raise ConfigError(f"protocol: {file} holds {values!r}, expected the keys {', '.join(_keys())}")
    protocol = checked(ProtocolFile, values, str(file))
    if protocol.based_on is not None:
        below, _ = _read_protocol(protocol.based_on, (*above, file))
        merged = OmegaConf.merge(OmegaConf.create(asdict(below)), OmegaConf.create(values))
        protocol = checked(ProtocolFile, merged, str(file))
    if not above:
        _check_protocol(protocol, file)
    return protocol, file


def _keys() -> list[str]:
    return list(ProtocolFile.__dataclass_fields__)


def _check_protocol(protocol: ProtocolFile, file: Path) -> None:
    if bool(protocol.classes) == bool(protocol.listed_in):
        raise ConfigError(
            f"protocol: {file} has {'both' if protocol.classes else 'neither'} classes and listed_in, expected one: "
            "the class of each folder of photos, or a file in the data folder that lists them"
        )
    for key, least in (("seeds", 1), ("steps", 1)):
        if getattr(protocol, key) < least:
            raise ConfigError(f"{file}: {key}: found {getattr(protocol, key)}, expected at least {least}")


def _published(entries: Mapping[str, Any], file: Path) -> Iterator[Published]:
    for key, value in entries.items():
        if not isinstance(value, dict):
            raise ConfigError(f"{file}: published.{key}: found {value!r}, expected source, setting, concepts, methods")
        report = checked(_Report, value, f"{file}: published.{key}")
        for method, scores in report.methods.items():
            if unknown := [name for name in scores if name not in BY_NAME]:
                raise ConfigError(
                    f"{file}: published.{key}: found {unknown[0]!r}, expected some of {', '.join(BY_NAME)}"
                )
            yield Published(method, report.setting, report.source, report.concepts, tuple(scores.items()))


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
            found.append(_subject(name, superclass, data / name, _prompts_of(superclass, values, file)))
    return found


def _prompts_of(superclass: str, values: ProtocolFile, file: Path) -> list[str]:
    kind = superclass if superclass in values.prompts else LIVE if superclass in values.live else OBJECT
    prompts = values.prompts.get(kind)
    if not isinstance(prompts, list) or not prompts:
        raise ConfigError(f"{file}: prompts.{kind}: found {prompts!r}, expected the prompts of a {superclass}")
    return [_check_places(prompt, 1, f"{file}: prompts.{kind}") for prompt in prompts]


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
    for key in _ENTRY:
        found = entry.get(key) if isinstance(entry, dict) else None
        if not isinstance(found, str) or not found.strip():
            raise ConfigError(f"data: {where}: {key}: found {found!r}, expected text")
    prompts = data / entry["prompt_filename"]
    try:
        lines = [line.strip() for line in prompts.read_text(encoding="utf-8").splitlines()]
    except (OSError, ValueError) as error:
        raise ConfigError(f"data: {where}: prompt_filename: {prompts} cannot be read: {error}") from error
    templates = [_check_places(line, 1, str(prompts)) for line in lines if line]
    if not templates:
        raise ConfigError(f"data: {where}: prompt_filename: {prompts} has no prompt")
    photos = data / entry["instance_data_dir"]
    return _subject(photos.name, entry["class_prompt"].strip(), photos, templates)


def _subject(name: str, superclass: str, photos: Path, prompts: Sequence[str]) -> PhotoSubject:
    from perfusion.data.images import ConceptImageError, find_images

    if not photos.is_dir():
        raise ConfigError(f"data: found no folder {photos}, expected the photos of {name}")
    try:
        found = find_images(str(photos), key=f"data: {name}")
    except ConceptImageError as error:
        raise ConfigError(str(error)) from error
    first = photos / found[0].name
    return PhotoSubject(name, superclass, str(photos), str(first), len(found), tuple(dict.fromkeys(prompts)))


def _with_masks(subject: PhotoSubject, masks: str | None) -> PhotoSubject:
    if masks in (None, CLIPSEG):
        return replace(subject, masks=masks)
    folder = _folder(masks, "masks", f"{CLIPSEG}, or a folder with a folder of masks for each subject") / subject.name
    if not folder.is_dir():
        raise ConfigError(f"masks: found no folder {folder}, expected a mask for each photo of {subject.name} there")
    return replace(subject, masks=str(folder))


def _check_names(subjects: Sequence[PhotoSubject]) -> None:
    taken: dict[str, str] = {}
    for one in subjects:
        word = one.placeholder.casefold()
        if word in taken:
            raise ConfigError(
                f"data: found the subjects {taken[word]!r} and {one.name!r}, expected names that differ in letters"
            )
        taken[word] = one.name


def _word(name: str) -> str:
    """A name of letters, digits and underscores."""
    return re.sub(r"\W+", "_", name).strip("_") or "subject"


def _check_places(prompt: Any, count: int, where: str) -> str:
    if not isinstance(prompt, str) or prompt.count("{}") != count:
        raise ConfigError(f"{where}: found the prompt {prompt!r}, expected {count} {{}} in it, for the concept")
    return prompt


def _folder(value: str | None, key: str, expected: str) -> Path:
    if value is None:
        raise ConfigError(f"{key}: not given beside world=photos; expected {expected}")
    folder = Path(value).expanduser()
    if not folder.is_dir():
        raise ConfigError(f"{key}: found no folder {value}, expected {expected}")
    return folder


# --- models -----------------------------------------------------------------------------------------------------------


def _preset(model: PhotoOptions) -> str:
    return model.backbone or "sd15"


def _check_model(model: PhotoOptions) -> None:
    from perfusion.backbones import PRESETS, backbone_class, backbone_config
    from perfusion.backbones.loading import resolve_device

    if _preset(model) not in (known := sorted(file.stem for file in PRESETS.glob("*.yaml"))):
        raise ConfigError(f"backbone: found {_preset(model)!r}, expected one of {', '.join(known)}")
    config = backbone_config(_preset(model), model.path, layout=model.layout)
    if backbone_class(config.name).family == "toyland":
        raise ConfigError("backbone: found toyland, which draws toys alone; expected sd15, sd21 or sdxl for photos")
    if config.path is None:
        raise ConfigError(
            f"path: not given beside world=photos, and {_preset(model)} ships no weights; expected path=<folder, "
            ".safetensors file or hub id>"
        )
    resolve_device(model.device or "auto")


@functools.cache
def _weights_digest(*said: str | None) -> str:
    """12 hexadecimal digits over the files that a model is read from, and how it is read."""
    from perfusion.training.inputs import model_digests

    content = [said, model_digests(said[1]), model_digests(said[2])]
    return hashlib.sha256(json.dumps(content).encode()).hexdigest()[:12]


@functools.cache
def _scorers(name: str, pretrained: str | None, dino: str | None, dino_pretrained: str | None, device: str) -> Scorers:
    from eval.scorers import Scorers, dino_scorer
    from perfusion.backbones.loading import resolve_device
    from perfusion.scoring.clip import ClipScorer

    clip = ClipScorer(name, pretrained, resolve_device(device))
    return Scorers(clip, dino_scorer(dino, dino_pretrained, device))
