"""The one pipeline of the page: concepts that fit it, those that are attached, and pictures with their records."""

from __future__ import annotations

import itertools
import json
import shlex
import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from PIL import Image
from safetensors import SafetensorError, safe_open

from perfusion import addons
from perfusion.backbones.base import Backbone
from perfusion.concept import Attached, Concept
from perfusion.concept_file import ConceptFileError, entry, texts, words
from perfusion.config import ConfigError, which_weights
from perfusion.data.prompts import contains, fill, replace_placeholder, validation_prompts
from perfusion.drawing import Setting, draw, name_of, planned
from perfusion.files import atomic_path
from perfusion.manifest import numbered, slug, spelled
from perfusion.methods.base import Dial, method_class
from perfusion.training.run_folder import CHECKPOINTS, RunFolder

if TYPE_CHECKING:
    from torch import Tensor

    from perfusion.scoring.clip import ClipScorer
    from perfusion.studio.__main__ import StudioConfig

FOLDER = "studio"  # below the root, for all that the page writes itself
MOST = 3  # concepts in one picture
BATCH = 8
_STEPS, _STEPS_TOYLAND = 25, 12  # of DPM-Solver++
_SMALL = 128  # pixels: smaller pictures are shown pixel by pixel


@dataclass(frozen=True)
class Found:
    """A concept file that this backbone can draw, known by its metadata alone."""

    file: Path
    placeholder: str
    superclass: str
    method: str

    @property
    def place(self) -> Path:
        """What commands call it: the run's folder where there is one."""
        return self.file.parent if RunFolder(self.file.parent).concept == self.file else self.file

    @property
    def label(self) -> str:
        return f"{self.placeholder} · {self.place.name}"

    @property
    def dials(self) -> dict[str, Dial]:
        return {dial.name: dial for dial in method_class(self.method).dials}


@dataclass(frozen=True)
class Request:
    """Pictures that are wanted.

    Attributes:
        concepts: files.
        prompt: with their placeholders.
        dials: for each concept, what differs from its own values.
        row: dial that differs within a row of pictures, with a value for each; or "".
        base: draw the base model's pictures, too.
    """

    concepts: tuple[str, ...]
    prompt: str
    dials: tuple[Mapping[str, Any], ...] = ()
    seed: int = 0
    num: int = 4
    steps: int = 12
    scheduler: str = "dpm++"
    row: str = ""
    values: tuple[Any, ...] = ()
    base: bool = False


@dataclass(frozen=True)
class Row:
    """Pictures side by side."""

    title: str
    files: list[Path]
    captions: list[str]
    scores: list[dict[str, float]] = field(default_factory=list)


class Drawing:
    """Draws what is asked for, one request at a time; the model stays loaded, and the concepts attached."""

    def __init__(self, config: StudioConfig, backbone: Backbone) -> None:
        self.config, self.backbone = config, backbone
        self.root = Path(config.root).expanduser()
        self.attached: list[Attached] = []
        self._chosen: list[tuple[str, int]] = []  # files that are attached, and when they were written
        self._scorer: ClipScorer | None = None
        self.templates = validation_prompts(backbone.config.prompts)
        self.steps = _STEPS_TOYLAND if backbone.family == "toyland" else _STEPS
        self.classes = ["small"] if backbone.config.resolution <= _SMALL else []  # of what shows pictures

    def concepts(self) -> dict[str, Found]:
        """Files of concepts below the root that fit this backbone, the newest first."""
        found: list[tuple[float, Found]] = []
        for path in self.root.rglob("*.safetensors"):
            parts = path.relative_to(self.root).parts
            if any(part.startswith(".") or part in (CHECKPOINTS, "diffusers") for part in parts):
                continue
            if one := self._about(path):
                found.append((path.stat().st_mtime, one))
        return {str(one.file): one for _, one in sorted(found, key=lambda pair: -pair[0])}

    def _about(self, path: Path) -> Found | None:
        """What a file says of itself; None if it is no concept, or one of another backbone."""
        try:
            with safe_open(path, framework="pt") as file:
                metadata = file.metadata() or {}
            needs = {"world": "1", **texts(path, metadata, "fingerprint")}
            if any(needs.get(part, "") != value for part, value in self.backbone.kind().items()):
                return None
            found = Found(path, *words(path, metadata), entry(path, metadata, "method"))
            method_class(found.method)
            return found
        except (SafetensorError, OSError, ValueError):  # all that this project raises are of these
            return None

    def add(self, upload: Path) -> str:
        """Keep a concept file below the root; returns its path. Raises ConceptFileError where it is none for this
        backbone."""
        about = self._about(upload)
        if about is None:
            Concept.load(upload)  # which says what is wrong with it
            raise ConceptFileError(f"{upload.name}: made for another backbone than {self.backbone.family}")
        folder = self.root / FOLDER / "concepts"
        folder.mkdir(parents=True, exist_ok=True)
        names = numbered(name_of(upload, about.placeholder), ".safetensors")
        paths = (folder / name for name in names)
        path = next(path for path in paths if not path.exists() or path.read_bytes() == upload.read_bytes())
        with atomic_path(path) as temporary:
            shutil.copyfile(upload, temporary)
        return str(path)

    def choose(self, files: Sequence[str]) -> list[Attached]:
        """Have these concepts attached, and no others. Raises ConfigError where two have one word, and what
        `Concept.attach` raises; none is attached then."""
        if len(files) > MOST:
            raise ConfigError(f"concepts: found {len(files)}, expected {MOST} at most")
        chosen = [(file, Path(file).stat().st_mtime_ns) for file in files]
        if chosen != self._chosen:
            self.leave()
            concepts = [Concept.load(file) for file in files]
            for one, other in itertools.combinations(concepts, 2):
                if one.placeholder == other.placeholder:
                    raise ConfigError(
                        f"{one.source} and {other.source} have the same word, {one.placeholder}: choose one, or "
                        "teach one under another word"
                    )
            with ExitStack() as undo:
                for concept in concepts:
                    self.attached.append(concept.attach(self.backbone))
                    undo.callback(self.leave)
                undo.pop_all()
            self._chosen = chosen
        return self.attached

    def leave(self) -> None:
        """Detach all concepts."""
        for one in self.attached:
            one.detach()
        self.attached, self._chosen = [], []

    @contextmanager
    def _base_model(self) -> Iterator[None]:
        files = [file for file, _ in self._chosen]
        self.leave()
        try:
            yield
        finally:
            self.choose(files)

    def draw(self, request: Request) -> Iterator[list[Row]]:
        """The rows that are there so far, after each batch; every picture is written, with a manifest.

        Raises:
            ConfigError, ConceptFileError, TokenError, SamplingError: as `perfusion.generate`.
        """
        if not request.prompt.strip():
            raise ConfigError("prompt: found none, expected a text")
        attached = self.choose(request.concepts)
        seeds = range(request.seed, request.seed + request.num)
        given = request.dials or [{} for _ in attached]
        rows: list[Row] = []
        if request.row:
            settings = [_set(given, attached, {request.row: value}) for value in request.values]
            captions = [spelled(request.row, value) for value in request.values]
            for seed in seeds:
                files = self.pictures(request, [(setting, seed) for setting in settings])
                rows.append(Row(f"seed {seed}", files, captions))
                yield rows
        else:
            files = self.pictures(request, [(given, seed) for seed in seeds])
            spoken = [one.concept.placeholder for one in attached]
            missing = [word for word in spoken if not contains(request.prompt, word)]
            title = f"{missing[0]} is not in the prompt" if missing else " and ".join(spoken) or "base model"
            rows.append(Row(title, files, [f"seed {seed}" for seed in seeds]))
            yield rows
        if request.base and attached:
            prompt = request.prompt
            for one in attached:
                prompt = replace_placeholder(prompt, one.concept.placeholder, one.concept.superclass)
            out = self._out(request)
            with self._base_model():
                files = self.pictures(request, [([], seed) for seed in seeds], prompt, out)
            yield [*rows, Row(f"base model: {prompt}", files, [f"seed {seed}" for seed in seeds])]

    def pictures(
        self,
        request: Request,
        wanted: Sequence[tuple[Setting, int]],
        prompt: str | None = None,
        out: Path | None = None,
    ) -> list[Path]:
        """A picture for each setting and seed, in one batch where the method allows it, by the concepts that are
        attached. What lies there already, made in the same way, is not drawn again."""
        attached, pipe = self.attached, self.backbone.pipe
        # The concept beside a base picture tells which weights drew it; without one it may be of others.
        again = not attached and out is None
        prompt, out = prompt or request.prompt, out or self._out(request)
        self.backbone.check_prompts([prompt])
        addons.set_scheduler(pipe, request.scheduler)
        config, family = self.backbone.config, self.backbone.family
        said = {"steps": request.steps, "guidance": config.guidance, "backbone": family}
        pictures = [(prompt, row, seed) for row, seed in wanted]
        shots = planned(pipe, attached, pictures, out, self._names(), **said)
        draw(pipe, attached, shots, BATCH, size=config.resolution, exact=False, again=again)
        return [out / shot.record.file for shot in shots]

    def compare(
        self, request: Request, columns: str, across: Sequence[Any], rows: str, down: Sequence[Any], scored: bool
    ) -> Iterator[list[Row]]:
        """One concept over two of its dials, the same noise in all pictures; a dial that it has not counts for nothing.

        Raises:
            ConfigError, ConceptImageError, ScorerError: `scored`, and there is no scorer or no picture of the concept;
                and what `draw` raises.
        """
        (attached,) = self.choose(request.concepts)
        measure = self._measure(attached, request.prompt) if scored else None
        has = attached.concept.dials
        across, down = [*across] if columns in has else [None], [*down] if rows in has and rows != columns else [None]
        done: list[Row] = []
        for low in down:
            pairs = [{rows: low, columns: value} for value in across]
            settings = [{name: value for name, value in pair.items() if value is not None} for pair in pairs]
            files = self.pictures(request, [([setting], request.seed) for setting in settings])
            scores = [measure(file) for file in files] if measure else []
            captions = ["" if value is None else spelled(columns, value) for value in across]
            done.append(Row("" if low is None else spelled(rows, low), files, captions, scores))
            yield done

    def _measure(self, attached: Attached, prompt: str) -> Any:
        from perfusion.scoring.metrics import clip_scores
        from perfusion.strength import reference_pictures, scorer_for

        if self._scorer is None:
            self._scorer = scorer_for(self.backbone, self.config.scorer, self.config.pretrained)
        scorer, concept = self._scorer, attached.concept
        references: Tensor = scorer.image_embeddings(reference_pictures(attached, None))
        text = scorer.text_embeddings([replace_placeholder(prompt, concept.placeholder, concept.superclass)])

        def measure(file: Path) -> dict[str, float]:
            with Image.open(file) as image:
                return clip_scores(scorer.image_embeddings([image]), references, text)

        return measure

    def _names(self) -> list[str]:
        files = (Path(file) for file, _ in self._chosen)
        return [name_of(file, one.concept.placeholder) for one, file in zip(self.attached, files, strict=True)]

    def _out(self, request: Request) -> Path:
        return self.root / FOLDER / f"{'-'.join(self._names()) or 'base-model'}-{slug(request.prompt)}"

    def command(self, request: Request) -> str:
        """The `python -m perfusion.generate` that draws the same pictures, but for those of the base model; "" without
        a concept."""
        known = self.concepts()
        if not request.concepts or any(file not in known for file in request.concepts):
            return ""
        places = [str(known[file].place) for file in request.concepts]
        said: dict[str, Any] = {
            "concept": places[0] if len(places) == 1 else f"[{', '.join(json.dumps(place) for place in places)}]",
            "prompt": request.prompt,
        }
        names = dict.fromkeys(name for given in request.dials for name in given)
        for name in names:
            values = [given.get(name) for given in request.dials]
            shown = ["null" if value is None else _plain(value) for value in values]
            said[name] = shown[0] if len(shown) == 1 else f"[[{', '.join(shown)}]]"
        if request.row:
            said[request.row] = ",".join(_plain(value) for value in request.values)
        said |= {"seed": request.seed, "num": request.num, "steps": request.steps, "scheduler": request.scheduler}
        said |= {key.removeprefix("backbone."): value for key, value in which_weights(self.backbone.config).items()}
        return shlex.join(["python", "-m", "perfusion.generate", *(f"{key}={value}" for key, value in said.items())])

    def prompts(self, placeholders: Sequence[str]) -> list[str]:
        """Examples with all of the concepts' words."""
        return [fill(template, " and a ".join(placeholders or ["cat"])) for template in self.templates]

    def prompt_for(self, prompt: str, placeholders: Sequence[str]) -> str:
        """The prompt if it has all of the concepts' words, else an example that has them."""
        fits = prompt and all(contains(prompt, word) for word in placeholders)
        return prompt if fits else self.prompts(placeholders)[0]


def spread(dial: Dial, count: int = 5) -> list[Any]:
    """Values of a dial that are worth a look, evenly over it."""
    if not dial.number:
        return [*dial.words]
    low, high = dial.between
    return [round(low + (high - low) * k / (count + 1), 2) for k in range(1, count + 1)]


def values_of(dial: Dial, text: str) -> list[Any]:
    """A list as it is typed, such as "0.4, 0.6". Raises ConfigError."""
    parts = [part.strip() for part in text.split(",") if part.strip()]
    try:
        values = [float(part) if dial.number else part for part in parts]
    except ValueError:
        values = []
    if not values or len({*values}) < len(values):
        raise ConfigError(
            f"{dial.name}: found {text!r}, expected different values with commas, as in {typed(spread(dial, 3))}"
        )
    return values


def typed(values: Sequence[Any]) -> str:
    """What `values_of` reads."""
    return ", ".join(map(_plain, values))


def _plain(value: Any) -> str:
    return f"{value:g}" if isinstance(value, float) else str(value)


def _set(given: Setting, attached: Sequence[Attached], more: Mapping[str, Any]) -> Setting:
    """The settings with more dials, where a concept has them."""
    return [
        {**own, **{name: value for name, value in more.items() if name in one.concept.dials}}
        for own, one in zip(given, attached, strict=True)
    ]
