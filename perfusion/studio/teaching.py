"""Photos, masks and words on their way to `perfusion.train`, and a training seen through the folder of its run."""

from __future__ import annotations

import contextlib
import hashlib
import itertools
import re
import shlex
import shutil
import threading
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from omegaconf import OmegaConf
from PIL import Image

from perfusion.config import (
    CONF,
    BackboneConfig,
    ConceptConfig,
    ConfigError,
    ToylandConcept,
    TrainConfig,
    which_weights,
)
from perfusion.data import clipseg
from perfusion.data.images import Examples, find_images, load_examples, read_image
from perfusion.files import atomic_path
from perfusion.manifest import slug
from perfusion.methods.base import available
from perfusion.studio.drawing import FOLDER
from perfusion.toyland.world import SUPERCLASSES
from perfusion.training import composition, job, loggers
from perfusion.training.module import examples_of
from perfusion.training.run_folder import RunFolder

if TYPE_CHECKING:
    from perfusion.studio.__main__ import StudioConfig

WHOLE, PAINTED, DRAWN = "the whole picture", "what I paint", "what CLIPSeg finds"
_PAINTED_SIDE = 768  # pixels of a photo's longer side where a mask is painted on it
_PATIENCE = 60.0  # seconds that a training has to save its step
_hydra = threading.Lock()  # it composes for one thread at a time


@dataclass(frozen=True)
class Lesson:
    """What the form says.

    Attributes:
        photos: files; none: Toyland draws the toy of this number.
        masks: which part of the photos counts.
        painted: path of a photo -> uint8 (H, W), not zero where it was painted.
        more: further words of the command line.
    """

    photos: tuple[Path, ...] = ()
    toy: int = 0
    masks: str = WHOLE
    painted: Mapping[str, np.ndarray] = field(default_factory=dict)
    superclass: str = ""
    placeholder: str = ""
    method: str = "perfusion"
    steps: int | None = None
    more: str = ""


@dataclass(frozen=True)
class Progress:
    """How far a training is.

    Attributes:
        state: starting, learning, drawing (its samples), stopped, finished or failed.
        seconds: since its process began.
        left: seconds to its last step, once that can be told.
        losses: of each step.
        strips: step -> what validation prompts looked like.
        said: why it stopped or failed.
    """

    state: str
    seconds: float
    step: int
    steps: int
    left: float | None
    losses: list[float]
    strips: dict[int, Path]
    said: str = ""

    @property
    def running(self) -> bool:
        return self.state in ("starting", "learning", "drawing")


class Teaching:
    """The trainings of one page, of which one runs at a time, each as the command in a process of its own."""

    def __init__(self, config: StudioConfig, backbone: BackboneConfig) -> None:
        self.config, self.backbone = config, backbone
        self.root = Path(config.root).expanduser()
        self.training: Training | None = None
        self.lesson = Lesson()  # of that training

    @property
    def kinds(self) -> tuple[str, ...]:
        """Superclasses to choose from; none where any will do."""
        return SUPERCLASSES if self.backbone.name == "toyland" else ()

    @property
    def methods(self) -> dict[str, int]:
        """Methods and the steps of their presets."""
        return {name: OmegaConf.load(CONF / "method" / f"{self._preset(name)}.yaml").steps for name in available()}

    @property
    def mask_kinds(self) -> list[str]:
        return [WHOLE, PAINTED, *([DRAWN] if self._clipseg_is_there() else [])]

    def _preset(self, method: str) -> str:
        own = f"{method}_{self.backbone.name}"
        return own if (CONF / "method" / f"{own}.yaml").is_file() else method

    def _clipseg_is_there(self) -> bool:
        from huggingface_hub import try_to_load_from_cache

        model = self.config.clipseg
        if Path(model).expanduser().is_dir():
            return True
        try:
            return isinstance(try_to_load_from_cache(model, "model.safetensors"), str)
        except ValueError:  # neither a folder nor a hub id
            return False

    def crops(self, lesson: Lesson) -> list[Image.Image]:
        """The squares that will be learned from, what no mask covers being pale. Raises ConceptImageError."""
        examples = self._examples(lesson)
        if examples.masks is None:
            return examples.pictures()
        shares = (255 * (0.25 + 0.75 * examples.masks[:, 0])).byte().numpy()
        white = Image.new("RGB", (self.backbone.resolution, self.backbone.resolution), "white")
        squares = zip(examples.pictures(), shares, strict=True)
        return [Image.composite(square, white, Image.fromarray(share)) for square, share in squares]

    def _examples(self, lesson: Lesson) -> Examples:
        resolution = self.backbone.resolution
        if not lesson.photos:
            drawn = ConceptConfig("toy", lesson.superclass, lesson.placeholder, toyland=ToylandConcept(lesson.toy))
            return examples_of(drawn, resolution)
        paths = find_images([str(path) for path in lesson.photos])
        if lesson.masks == DRAWN:
            cache = Path(ConceptConfig.masks_cache).expanduser()
            return load_examples(paths, resolution, clipseg.ClipSeg(self.config.clipseg, lesson.superclass, cache))
        if lesson.masks == WHOLE or not lesson.painted:
            return load_examples(paths, resolution)

        def mask_of(image: Image.Image, path: Path) -> np.ndarray:
            return _mask(image, lesson.painted.get(str(path))) / np.float32(255)

        return load_examples(paths, resolution, mask_of)

    def canvas(self, photo: Path) -> Image.Image:
        """A photo at a size at which it can be painted on."""
        image = read_image(photo)
        image.thumbnail((_PAINTED_SIDE, _PAINTED_SIDE))
        return image

    def words(self, lesson: Lesson, write: bool = False) -> list[str]:
        """The words of `perfusion.train`; with `write`, photos and painted masks are kept where these say.

        Raises:
            ConfigError: something is missing, or `more` is no list of key=value words.
        """
        if not lesson.superclass.strip():
            raise ConfigError("concept.superclass: what is it? One or two words, such as cat or teddy bear")
        if not lesson.placeholder.strip():
            raise ConfigError("concept.placeholder: which word shall stand for it? Such as <cat*>")
        toyland, method = self.backbone.name == "toyland", self._preset(lesson.method)
        said: dict[str, object] = {}
        if not toyland:
            said |= {"backbone": self.config.backbone, "method": method, "concept": "photos", "callbacks": "none"}
            if self.config.scorer:
                said |= {"callbacks": "select", "callbacks.select.scorer": self.config.scorer}
                said |= {"callbacks.select.pretrained": self.config.pretrained} if self.config.pretrained else {}
        elif lesson.method != Lesson.method:
            said["method"] = method
        if self.config.root != "runs":
            said["run.root"] = self.config.root
        said |= which_weights(self.backbone)
        if self.config.device != "auto":
            said["backbone.device"] = self.config.device
        if lesson.photos:
            folder = self._photos(lesson, write)
            said["concept.images"] = folder
            if lesson.masks == DRAWN:
                said |= {"concept.masks": clipseg.SPEC, "concept.clipseg": self.config.clipseg}
            elif lesson.masks == PAINTED and lesson.painted:
                said["concept.masks"] = self._masks(lesson, folder, write)
        elif toyland:
            said["concept.toyland.instance"] = lesson.toy
        else:
            raise ConfigError("concept.images: no photos yet")
        said |= {"concept.superclass": lesson.superclass.strip(), "concept.placeholder": lesson.placeholder.strip()}
        said["concept.name"] = slug(lesson.placeholder)
        if lesson.steps and lesson.steps != self.methods[lesson.method]:
            said["method.steps"] = lesson.steps
        more = shlex.split(lesson.more)
        if wrong := [word for word in more if not re.match(r"\+{0,2}[A-Za-z_][\w.@/]*=", word)]:
            raise ConfigError(f"{wrong[0]!r}: expected key=value")
        return [*(f"{key}={value}" for key, value in said.items()), *more]

    def _photos(self, lesson: Lesson, write: bool) -> Path:
        """Where the photos are kept: a folder that is named by their contents."""
        names = _names(lesson.photos)
        digest = _digest(part for path in lesson.photos for part in (names[path].encode(), path.read_bytes()))
        folder = self.root / FOLDER / f"photos-{digest}"
        if write:
            folder.mkdir(parents=True, exist_ok=True)
            for path, name in names.items():
                with atomic_path(folder / name) as temporary:
                    shutil.copyfile(path, temporary)
        return folder

    def _masks(self, lesson: Lesson, folder: Path, write: bool) -> Path:
        masks, names = {path: lesson.painted.get(str(path)) for path in lesson.photos}, _names(lesson.photos)
        digest = _digest(b"" if mask is None else mask.tobytes() for mask in masks.values())
        if write:
            (folder / f"masks-{digest}").mkdir(exist_ok=True)
            for path, mask in masks.items():
                with atomic_path(folder / f"masks-{digest}" / f"{Path(names[path]).stem}.png") as temporary:
                    Image.fromarray(_mask(read_image(path), mask)).save(temporary)
        return folder / f"masks-{digest}"

    def command(self, lesson: Lesson) -> str:
        """What does the same in a terminal."""
        return shlex.join(["python", "-m", "perfusion.train", *self.words(lesson)])

    def start(self, lesson: Lesson) -> None:
        """Begin, or go on with what was stopped. Raises what the command says before it trains."""
        if self.training is not None and self.training.progress().running:
            raise ConfigError("a training runs already; stop it first, or wait for it")
        self.words(lesson)
        self._examples(lesson)
        self.training, self.lesson = Training(self.words(lesson, write=True)), lesson

    def stop(self) -> None:
        """End the training that runs, once it has saved what there is to save."""
        if self.training is not None:
            self.training.stop()


class Training:
    """`python -m perfusion.train` in a process of its own, begun here. Raises ConfigError for words that it would
    refuse."""

    def __init__(self, words: Sequence[str]) -> None:
        configs: list[TrainConfig] = []
        with _hydra:
            composition.run(words, configs.append)
        self.config = configs[0]
        self.folder = RunFolder.of(self.config)
        self.folder.check_place()
        self.folder.path.mkdir(parents=True, exist_ok=True)
        self._stopped = False
        self._said: str | None = None  # why it ended
        self._began, self._seen = time.time(), (0, 0.0)  # the first step of this process that was seen, and when
        self._process = job.begun([*job.TRAIN, *words], self.folder.log)

    def stop(self) -> None:
        """Have it save its step and end; returns when it has."""
        if self._process.poll() is None:
            self._stopped = True
            job.stop(self._process, 0, _PATIENCE)

    def progress(self) -> Progress:
        """Read from its folder."""
        status = self._process.poll()
        steps, losses = int(self.config.method["steps"]), self._losses()
        step, now = max(losses, default=0), time.time()
        written = self.folder.metrics_csv.stat().st_mtime if self.folder.metrics_csv.exists() else 0.0
        said, left = "", None
        if status is None:
            state = "starting" if written < self._began else "learning" if step < steps else "drawing"
            if state == "learning" and step:
                self._seen = self._seen if self._seen[0] else (step, now)
                first, since = self._seen
                left = (steps - step) * (now - since) / (step - first) if step > first else None
        elif status == 0 and self.folder.finished:
            state = "finished"
        else:
            said = self._why(status)
            state = "stopped" if self._stopped or status == 130 else "failed"
        strips = {int(path.stem.partition("-")[2]): path for path in self.folder.progress.glob("step-*.png")}
        return Progress(
            state, now - self._began, step, steps, left, [*losses.values()], dict(sorted(strips.items())), said
        )

    def _why(self, status: int) -> str:
        """Why it ended; of a run that never began, nothing stays."""
        if self._said is None:
            self._said = job.reason(status, self.folder.log).splitlines()[0]
            if not self.folder.config.exists():
                self.folder.log.unlink(missing_ok=True)
                with contextlib.suppress(OSError):  # not empty
                    self.folder.path.rmdir()
        return self._said

    def _losses(self) -> dict[int, float]:
        rows = loggers.metrics_in(self.folder.metrics_csv)
        return {row["step"]: float(row["loss"]) for row in rows if row.get("loss")}


def _mask(image: Image.Image, painted: np.ndarray | None) -> np.ndarray:
    """uint8 (H, W), 255 where a photo counts: where it was painted, or everywhere if it was not."""
    if painted is None or not painted.any():
        return np.full((image.height, image.width), 255, np.uint8)
    return np.where(painted > 0, 255, 0).astype(np.uint8)


def _names(photos: Sequence[Path]) -> dict[Path, str]:
    """A name for each photo that no other has, also without its suffix: masks find photos by that."""
    names: dict[Path, str] = {}
    taken: set[str] = set()
    for path in photos:
        choices = itertools.chain([path.stem], (f"{path.stem}-{k}" for k in itertools.count(2)))
        stem = next(choice for choice in choices if choice not in taken)
        taken.add(stem)
        names[path] = stem + path.suffix
    return names


def _digest(parts: Iterable[bytes]) -> str:
    total = hashlib.sha256()
    for part in parts:
        total.update(hashlib.sha256(part).digest())
    return total.hexdigest()[:8]
