"""Plans what is missing of some settings, and takes in what workers have found.

Below the root lie `trained/`, ordinary run folders; `pictures/`, a folder with a manifest for each setting and toy;
`measured/`, their scores. The root's last part is a hash of Toyland's weights: with others nothing of it
would be true.
"""

from __future__ import annotations

import functools
import hashlib
import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from eval.record import Point
from experiments.pool import Outcome, Task
from experiments.protocol import Protocol, Toy
from experiments.settings import Setting, Training, config_of
from experiments.snapshot_files import snapshot_file, step_of
from experiments.tasks import Job, Look, draw, train
from perfusion import toyland
from perfusion.config import ConfigError, TrainConfig
from perfusion.files import atomic_write_text
from perfusion.manifest import FILE_NAME
from perfusion.provenance import provenance
from perfusion.training.run_folder import RunFolder

WEIGHTS = Path(toyland.__file__).with_name("weights")
SECONDS = "seconds.json"  # how long the pictures of each folder took
_PICTURES = 192  # of one task, at most: small enough that all cores end at about the same time

Together = tuple[Toy, ...]  # toys in one picture


@dataclass(frozen=True)
class Wanted:
    """Pictures of one setting."""

    setting: Setting
    toys: Together

    @property
    def name(self) -> str:
        return f"{self.setting.label} {self.setting.name}, {' and '.join(toy.name for toy in self.toys)}"


class Runner:
    """Knows what is there and what is missing below a folder."""

    def __init__(self, root: Path, protocol: Protocol, changes: tuple[str, ...] = ()) -> None:
        """`changes` are words of `python -m perfusion.train` for every training."""
        self.weights = weights_digest()
        self.root, self.protocol, self.changes = root / self.weights, protocol, changes
        self.made_with = provenance()  # now: results that are written later would count as changes of the checkout
        self.points: dict[Wanted, Point] = {}
        self.document: Mapping[str, Any] = {}
        self._seconds = _read_seconds(self.root / SECONDS)

    def config(self, training: Training, toy: Toy) -> TrainConfig:
        """The config of one run. Raises ConfigError for a setting that cannot be."""
        return _config(replace(training, changes=(*training.changes, *self.changes)), toy, self.root)

    def run_folder(self, training: Training, toy: Toy) -> RunFolder:
        return RunFolder.of(self.config(training, toy))

    def tasks(self, wanted: Iterable[Wanted], trainings: Iterable[Training] = ()) -> list[Task]:
        """What has to be done for these settings, and to train these trainings, those that are finished left out.

        Raises:
            ConfigError: a setting that cannot be, or two that are the same.
        """
        tasks: dict[str, Task] = {}
        groups: dict[Any, list[Wanted]] = {}
        folders: dict[Path, Wanted] = {}
        for one in dict.fromkeys(wanted):
            if (other := folders.setdefault(self.folder(one), one)) != one:
                raise ConfigError(f"{one.name} is the same as {other.name}: expected different settings")
            key = (one.setting.training, one.setting.share, one.setting.described, one.toys)
            groups.setdefault(key, []).append(one)
        for (training, _, _, toys), members in groups.items():
            needs = []
            for task in () if training is None else self._trainings(training, toys):
                tasks.setdefault(task.name, task)
                needs.append(task.name)
            each = len(self.protocol.templates(*toys)) * len(self.protocol.seeds)
            at_once = max(1, _PICTURES // each)
            for start in range(0, len(members), at_once):
                task = self._drawing(members[start : start + at_once], tuple(needs))
                tasks[task.name] = task
        for training in trainings:
            for task in self._trainings(training, self.protocol.toys):
                tasks.setdefault(task.name, task)
        return list(tasks.values())

    def keep(self, outcome: Outcome) -> None:
        """Take in what a task has found."""
        if outcome.task.kind != "draw" or outcome.error is not None:
            return
        wanted: tuple[Wanted, ...] = outcome.task.about
        if outcome.task.size > 1:
            self._spend({one: outcome.seconds / len(wanted) for one in wanted})
        self.points |= zip(wanted, outcome.value.points, strict=True)
        shown = {**self.document.get("references", {}), **outcome.value.document["references"]}
        self.document = {**outcome.value.document, "references": shown}

    def trained(self, trainings: Iterable[Training]) -> bool:
        """Whether all toys have been learned by all of them."""
        return all(self.run_folder(training, toy).finished for training in trainings for toy in self.protocol.toys)

    def seconds(self, wanted: Wanted) -> float:
        """How long the pictures of a setting took to draw, when they were drawn."""
        return self._seconds.get(self._place(wanted), 0.0)

    def _spend(self, spent: Mapping[Wanted, float]) -> None:
        for one, seconds in spent.items():
            self._seconds[self._place(one)] = round(self.seconds(one) + seconds, 1)
        atomic_write_text(self.root / SECONDS, json.dumps(self._seconds, indent=1) + "\n")

    def _place(self, wanted: Wanted) -> str:
        return self.folder(wanted).relative_to(self.root).as_posix()

    def training_name(self, training: Training, toy: Toy) -> str:
        """The name of the task that trains a toy."""
        return f"train {training.label}, {toy.name}"

    def _trainings(self, training: Training, toys: Together) -> Iterator[Task]:
        """The tasks for what is not trained yet."""
        for toy in toys:
            config = self.config(training, toy)
            if not RunFolder.of(config).finished:
                # Pictures of the superclass are as many again as those of the concept.
                pictures = config.method["batch_size"] * (2 if config.method.get("prior_images") else 1)
                size = config.method["steps"] * pictures
                yield Task(self.training_name(training, toy), train, (config,), "train", size)

    def _drawing(self, members: Sequence[Wanted], needs: tuple[str, ...]) -> Task:
        setting, toys, protocol = members[0].setting, members[0].toys, self.protocol
        looks = tuple(Look(self.folder(one), dict(one.setting.dials), self._said(one)) for one in members)
        templates = protocol.templates(*toys)
        missing = sum(len(templates) * len(protocol.seeds) for look in looks if not (look.folder / FILE_NAME).exists())
        job = Job(
            backbone=self.config(setting.training or _ANY, toys[0]).backbone,
            method=setting.label,
            toys=toys,
            words=tuple(_word(setting, toy) for toy in toys),
            concepts=tuple(self._file(setting, toy) for toy in toys if setting.training is not None),
            looks=looks,
            templates=templates,
            seeds=protocol.seeds,
            steps=protocol.steps,
            guidance=protocol.guidance,
            measured=self.root / "measured",
        )
        names = ", ".join(one.setting.name for one in members)
        name = f"draw {setting.label} {names}, {' and '.join(toy.name for toy in toys)}"
        return Task(name, draw, (job,), "draw", max(missing, 1), needs, about=tuple(members))

    def folder(self, wanted: Wanted) -> Path:
        """Where the pictures of a setting are."""
        training = wanted.setting.training
        if training is None:
            name = "base-" + "+".join(toy.name for toy in wanted.toys)
        else:
            name = "+".join(self.run_folder(training, toy).path.name for toy in wanted.toys)
        drawn = f"{self.protocol.steps}-steps-of-dpm-guidance-{self.protocol.guidance:g}"
        return self.root / "pictures" / name / f"{wanted.setting.name}-{drawn}"

    def _file(self, setting: Setting, toy: Toy) -> Path:
        assert setting.training is not None
        folder = self.run_folder(setting.training, toy)
        return folder.concept if setting.share == 1 else snapshot_file(folder.path, self._step(setting, toy))

    def _step(self, setting: Setting, toy: Toy) -> int:
        assert setting.training is not None
        return step_of(setting.share, self.config(setting.training, toy).method["steps"])

    def _said(self, wanted: Wanted) -> str | None:
        """How long it was trained, of methods whose dial that is; and how many concepts there are, where they are
        several: their pictures are of other prompts, and no report should take the mean over both kinds."""
        training = wanted.setting.training
        said = [f"{len(wanted.toys)} concepts"] if len(wanted.toys) > 1 else []
        if training is not None and training.shares:
            said.append(f"trained {self._step(wanted.setting, next(iter(wanted.toys)))} steps")
        return ", ".join(said) or None


def _word(setting: Setting, toy: Toy) -> str:
    """What stands for a toy in prompts."""
    if setting.training is not None:
        return toy.placeholder
    return toy.description if setting.described else toy.superclass


_ANY = Training("base", "perfusion_toyland")  # whose backbone is the base model


def _read_seconds(file: Path) -> dict[str, float]:
    return json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}


@functools.cache
def _config(training: Training, toy: Toy, root: Path) -> TrainConfig:
    return config_of(training, toy, root)


@functools.cache
def weights_digest() -> str:
    """12 hexadecimal digits over all of Toyland's weights.

    Raises:
        ConfigError: they are not there.
    """
    files = sorted(WEIGHTS.rglob("*.safetensors"))
    if not files:
        raise ConfigError(f"{WEIGHTS}: found no weights; run `make toyland`")
    total = hashlib.sha256()
    for file in files:
        with open(file, "rb") as opened:
            total.update(file.relative_to(WEIGHTS).as_posix().encode() + hashlib.file_digest(opened, "sha256").digest())
    return total.hexdigest()[:12]
