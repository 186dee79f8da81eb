"""What is missing of some settings: planned here, trained, drawn and scored in workers, and taken in again.

Below the root lie `trained/`, ordinary run folders; `pictures/`, a folder with a manifest for each setting and subject;
`measured/`, their scores. The root's last part is a hash of the model's weights: with others nothing of it would be
true.
A picture that is there is not drawn again, so a folder can grow by prompts and seeds.
"""

from __future__ import annotations

import functools
import gc
import json
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from eval.record import Point
from experiments.pool import Outcome, Pool, Task
from experiments.settings import PERFUSION, Setting, Training, config_of, snapshot_file, step_of
from experiments.world import Subject, World, filled
from perfusion.config import BackboneConfig, ConfigError, TrainConfig, checked
from perfusion.files import atomic_write_text
from perfusion.manifest import FILE_NAME, JOINED, ImageRecord, slug
from perfusion.provenance import provenance
from perfusion.training.run_folder import RunFolder

# Torch and its friends take seconds to import: the process that only plans does without them.
if TYPE_CHECKING:
    from perfusion.backbones.base import Backbone
    from perfusion.concept import Attached

SECONDS = "seconds.json"  # how long the pictures of each folder took
_PACE = {"train": 0.03, "draw": 0.45}  # seconds of a core for a training picture and for a drawn one, on Toyland
_TIMED = 3  # steps of a picture that is drawn to know how long it takes
_PICTURES = 192  # of one task, at most: small enough that all cores end at about the same time

Together = tuple[Subject, ...]  # subjects in one picture


@dataclass(frozen=True)
class Wanted:
    """Pictures of one setting, for an experiment that draws so many times as many of each prompt as others do."""

    setting: Setting
    subjects: Together
    times: int = 1

    @property
    def whose(self) -> str:
        """What it shows, and how often, in words."""
        names = " and ".join(one.name for one in self.subjects)
        return f"{names}, {self.times} times" if self.times > 1 else names

    @property
    def name(self) -> str:
        return f"{self.setting.label} {self.setting.name}, {self.whose}"


@dataclass(frozen=True)
class Look:
    """Pictures of one setting of the dials."""

    wanted: Wanted
    folder: Path  # where they lie, with their manifest
    said: str | None  # what else sets them apart, for the manifest


@dataclass(frozen=True)
class Job:
    """Pictures to draw and to score, of the same subjects and of one training or the base model."""

    protocol: World
    backbone: BackboneConfig
    concepts: tuple[Path, ...]  # files of the subjects' concepts, in their order; none: the base model draws
    looks: tuple[Look, ...]
    measured: Path  # folder of scores that are kept

    @property
    def wanted(self) -> Wanted:
        """What all looks have in common."""
        return self.looks[0].wanted

    @property
    def words(self) -> list[str]:
        """What stands for each subject in prompts."""
        setting = self.wanted.setting
        kind = "placeholder" if setting.training else "description" if setting.described else "superclass"
        return [getattr(one, kind) for one in self.wanted.subjects]

    @property
    def prompts(self) -> dict[str, str]:
        """Each template and the prompt that it becomes."""
        return {template: filled(template, *self.words) for template in self.protocol.templates(*self.wanted.subjects)}


class Runner:
    """Knows what is there and what is missing below a folder."""

    def __init__(self, root: Path, protocol: World, changes: tuple[str, ...] = ()) -> None:
        """`changes` are words of `python -m perfusion.train` for every training."""
        self.weights = protocol.weights
        self.root, self.protocol, self.changes = root / protocol.folder, protocol, changes
        self.made_with = provenance()  # now: results that are written later would count as changes of the checkout
        self.points: dict[Wanted, Point] = {}
        self.pace = dict(_PACE)  # until it is measured
        self.document: Mapping[str, Any] = {}
        file = self.root / SECONDS
        self._seconds: dict[str, float] = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}

    def config(self, training: Training, subject: Subject) -> TrainConfig:
        """The config of one run. Raises ConfigError for a setting that cannot be."""
        training = self.protocol.training(training)
        training = replace(training, changes=(*training.changes, *self.changes))
        config = config_of(training, subject, self.root, words=self.protocol.words)
        if not training.joint:
            return config
        return replace(config, experiment=f"{config.experiment}-with-{self.protocol.partner(subject).name}")

    def run_folder(self, training: Training, subject: Subject) -> RunFolder:
        return RunFolder.of(self.config(training, subject))

    def tasks(self, wanted: Iterable[Wanted], trainings: Iterable[Training] = ()) -> list[Task]:
        """What has to be done for these settings, and to train these trainings, those that are finished left out.
        Raises ConfigError: a setting that cannot be, or two that are the same."""
        tasks: dict[str, Task] = {}
        groups: dict[Any, list[Wanted]] = {}
        folders: dict[Path, Wanted] = {}
        for one in dict.fromkeys(wanted):
            if (other := folders.setdefault(self.folder(one), one)) != one:
                raise ConfigError(f"{one.name} is the same as {other.name}: expected different settings")
            key = (one.setting.training, one.setting.share, one.setting.described, one.subjects, one.times)
            groups.setdefault(key, []).append(one)
        for (training, _, _, subjects, times), members in groups.items():
            needed = {} if training is None else {task.name: task for task in self._trainings(training, subjects)}
            tasks |= needed
            each = len(self.protocol.templates(*subjects)) * len(self.protocol.seeds_of(times))
            at_once = max(1, _PICTURES // each)
            for start in range(0, len(members), at_once):
                task = self._drawing(members[start : start + at_once], tuple(needed))
                tasks[task.name] = task
        for training in trainings:
            tasks |= {task.name: task for task in self._trainings(training, self.protocol.subjects)}
        return list(tasks.values())

    def timing(self) -> Task:
        """The task that measures how long a picture takes, from which `keep` knows how long tasks take."""
        backbone = self.config(PERFUSION, self.protocol.subjects[0]).backbone
        return Task("time a picture of the base model", time_picture, (self.protocol, backbone), "time")

    def amount(self, tasks: Iterable[Task]) -> tuple[int, int, int]:
        """How many trainings and pictures tasks are, and how many pictures of superclasses the trainings need."""
        trainings = [task for task in tasks if task.kind == "train"]
        pictures = sum(int(task.size) for task in tasks if task.kind == "draw" and task.size > 1)
        priors = {}
        for task in trainings:
            for config in task.arguments[0]:
                if (count := config.method.get("prior_images")) and config.concept.prior is None:
                    kind = json.dumps({key: value for key, value in config.method.items() if key.startswith("prior_")})
                    priors[config.concept.superclass, kind] = count
        return len(trainings), pictures, sum(priors.values())

    def run(self, pool: Pool, tasks: Sequence[Task], then: Callable[[str], None] = lambda name: None) -> list[str]:
        """Run tasks and keep what they find; `then` is called with the name of each after that. Gives what failed."""

        def done(outcome: Outcome) -> None:
            self.keep(outcome)
            then(outcome.task.name)

        return pool.run(tasks, done)

    def keep(self, outcome: Outcome) -> None:
        """Take in what a task has found."""
        task = outcome.task
        if outcome.error is not None or task.kind == "train":
            return
        if task.kind == "time":
            # A step of drawing with guidance runs the denoiser forward twice, one of training once and then backward,
            # which takes as long as two further runs.
            self.pace = {"draw": outcome.value, "train": 1.5 * outcome.value / self.protocol.steps}
            return
        if task.size > 1:
            for one in task.about:
                self._seconds[self._place(one)] = round(self.seconds(one) + outcome.seconds / len(task.about), 1)
            atomic_write_text(self.root / SECONDS, json.dumps(self._seconds, indent=1) + "\n")
        points, document = outcome.value
        self.points |= zip(task.about, points, strict=True)
        self.document = {**document, "references": {**self.document.get("references", {}), **document["references"]}}

    def trained(self, trainings: Iterable[Training]) -> bool:
        """Whether all subjects have been learned by all of them."""
        subjects = self.protocol.subjects
        return all(self.run_folder(training, one).finished for training in trainings for one in subjects)

    def seconds(self, wanted: Wanted) -> float:
        """How long the pictures of a setting took to draw, when they were drawn."""
        return self._seconds.get(self._place(wanted), 0.0)

    def folder(self, wanted: Wanted) -> Path:
        """Where the pictures of a setting are."""
        training = wanted.setting.training
        if training is None:
            name = "base-" + "+".join(one.name for one in wanted.subjects)
        else:
            name = "+".join(self.run_folder(training, one).path.name for one in wanted.subjects)
            name += "-together" if training.joint else ""
        drawn = f"{self.protocol.steps}-steps-of-{self.protocol.sampler}-guidance-{self.protocol.guidance:g}"
        drawn += f"-{wanted.times}-times" if wanted.times > 1 else ""  # two tasks never draw into one folder
        return self.root / "pictures" / name / f"{wanted.setting.name}-{drawn}"

    def _place(self, wanted: Wanted) -> str:
        return self.folder(wanted).relative_to(self.root).as_posix()

    def _trainings(self, training: Training, subjects: Iterable[Subject]) -> Iterator[Task]:
        """The tasks for what is not trained yet."""
        for together in [tuple(subjects)] if training.joint else [(one,) for one in subjects]:
            configs = [self.config(training, one) for one in together]
            if not all(RunFolder.of(config).finished for config in configs):
                method = configs[0].method
                # Each term that preserves the prior has as many pictures again as the concept.
                terms = sum(bool(method.get(key)) for key in ("prior_images", "preservation_weight"))
                size = method["steps"] * method["batch_size"] * (1 + terms) * len(configs)
                name = task_name(self.protocol.training(training), *together)
                yield Task(name, train, (configs, self.protocol.threads), "train", size, pace=self.pace["train"])

    def _drawing(self, members: Sequence[Wanted], needs: tuple[str, ...]) -> Task:
        setting, subjects, times = members[0].setting, members[0].subjects, members[0].times
        looks = tuple(Look(one, self.folder(one), self._said(one)) for one in members)
        concepts = () if setting.training is None else tuple(self._concept(setting, one) for one in subjects)
        backbone = self.config(setting.training or PERFUSION, subjects[0]).backbone
        protocol = replace(self.protocol, seeds=self.protocol.seeds_of(times))
        job = Job(protocol, backbone, concepts, looks, self.root / "measured")
        new = sum(not (look.folder / FILE_NAME).exists() for look in looks)
        size = max(1, new * len(job.prompts) * len(protocol.seeds))
        name = f"draw {setting.label} {', '.join(one.setting.name for one in members)}, {members[0].whose}"
        return Task(name, draw, (job,), "draw", size, needs, tuple(members), self.pace["draw"])

    def _concept(self, setting: Setting, subject: Subject) -> Path:
        assert setting.training is not None
        folder = self.run_folder(setting.training, subject)
        return folder.concept if setting.share == 1 else snapshot_file(folder.path, self._step(setting, subject))

    def _step(self, setting: Setting, subject: Subject) -> int:
        assert setting.training is not None
        return step_of(setting.share, self.config(setting.training, subject).method["steps"])

    def _said(self, wanted: Wanted) -> str | None:
        """How long it was trained, of methods whose dial that is; and how many concepts there are, where they are
        several: their pictures are of other prompts, and no report should take the mean over both kinds."""
        training = wanted.setting.training
        first, *others = wanted.subjects
        said = [f"{1 + len(others)} concepts"] if others else []
        if training is not None and training.shares:
            said.append(f"trained {self._step(wanted.setting, first)} steps")
        return ", ".join(said) or None


def task_name(training: Training, *subjects: Subject) -> str:
    """The name of the task that trains a subject, or several together."""
    return f"train {training.label}, {' and '.join(one.name for one in subjects)}"


# --- what workers do; models are loaded once in a process and kept ----------------------------------------------------


def train(configs: Sequence[TrainConfig], threads: int = 1) -> None:
    """Train a concept, unless it is there, or several together. Raises what `perfusion.train` raises."""
    _take(threads)
    from experiments.joint import train_together
    from perfusion.train import train as run

    try:
        if len(configs) == 1:
            run(configs[0])
        else:
            train_together(configs)
    finally:
        gc.collect()


def time_picture(world: World, config: BackboneConfig) -> float:
    """Seconds that a picture of the base model takes here, drawn and scored. What cannot be loaded for it is found
    before anything long begins."""
    _take(world.threads)
    from perfusion.drawing import sample

    scorers = world.scorers()
    backbone = _loaded(config, world)
    count = 1 if backbone.pipe.device.type == "cpu" else world.at_once
    steps = min(world.steps, _TIMED)
    prompts, seeds = ["a photo"] * count, list(range(count))
    started = drawn = 0.0
    for number in (1, steps):  # the first call also loads kernels
        started = time.monotonic()
        images = sample(backbone.pipe, prompts, seeds, number, world.guidance, count, size=config.resolution)
        drawn = time.monotonic()
        for scorer in (scorers.clip, scorers.dino):
            if scorer is not None:
                scorer.image_embeddings(images)
    return ((drawn - started) / steps * world.steps + time.monotonic() - drawn) / count


def draw(job: Job) -> tuple[list[Point], dict[str, Any]]:
    """Draw what is missing and score all: the point of each look, and what a record of scores says of itself.

    Raises what `perfusion.generate` and `eval.score` raise.
    """
    _take(job.protocol.threads)
    from eval.folder_scores import points_of, score_folder, scored_with
    from eval.folders import ImageFolder
    from perfusion.concept import Concept
    from perfusion.drawing import Shot, draw

    backbone = _loaded(job.backbone, job.protocol)
    with ExitStack() as stack:
        attached = [stack.enter_context(Concept.load(file).attach(backbone)) for file in job.concepts]
        folders = [ImageFolder(look.folder, _records(job, look, backbone.pipe, attached)) for look in job.looks]
        shots = [
            Shot(record, look.folder, [dict(look.wanted.setting.dials)] * len(attached))
            for look, folder in zip(job.looks, folders, strict=True)
            for record in folder.records
        ]
        shots.sort(key=lambda shot: shot.record.prompt)  # a batch shares what is computed of a prompt
        stack.enter_context(job.protocol.autocast(backbone.pipe.device))
        at_once = job.protocol.at_once
        draw(backbone.pipe, attached, shots, at_once, size=job.backbone.resolution, exact=False, again=False)
    scorers, references = job.protocol.scorers(), job.protocol.references(job.wanted.subjects)
    points: list[Point] = []
    for folder in folders:
        scores, _ = score_folder(folder, scorers, references, None, job.measured, progress=False)
        points += points_of(folder, scores)
    return points, scored_with(scorers, references, 1)


def _records(job: Job, look: Look, pipe: Any, attached: Sequence[Attached]) -> tuple[ImageRecord, ...]:
    from perfusion.drawing import described, recorded

    setting, subjects = look.wanted.setting, look.wanted.subjects
    superclasses = [one.superclass for one in subjects]
    common: dict[str, Any] = {
        **described(pipe, [one.concept for one in attached], [one.name for one in subjects]),
        # Scores read prompts with the superclass in its place, so that looks which are told are no wish of the prompt.
        "placeholder": None if job.words == superclasses else JOINED.join(job.words),
        "superclass": JOINED.join(superclasses),
        "method": setting.label,
        "backbone": job.backbone.name,
        "instance": subjects[0].instance if len(subjects) == 1 else None,
        "dials": recorded(attached, [dict(setting.dials)] * len(attached)),
        "steps": job.protocol.steps,
        "guidance": job.protocol.guidance,
        "setting": look.said,
    }
    records, seen = [], Counter[str]()
    for template, prompt in job.prompts.items():
        name = slug(template)
        seen[name] += 1
        name += f"--{seen[name]}" if seen[name] > 1 else ""  # long prompts may begin alike
        records += [ImageRecord(f"{name}-{seed}.png", prompt, seed, **common) for seed in job.protocol.seeds]
    return tuple(sorted(records, key=lambda record: record.prompt))  # as they are drawn and named in the manifest


def _loaded(config: BackboneConfig, world: World) -> Backbone:
    return _backbone(json.dumps(asdict(config), sort_keys=True), world.scheduler)


@functools.lru_cache(maxsize=1)
def _backbone(config: str, scheduler: str) -> Backbone:
    import diffusers

    from perfusion.backbones import backbone_class
    from perfusion.training.trainer import quieten

    quieten()
    chosen = checked(BackboneConfig, json.loads(config))
    backbone = backbone_class(chosen.name).load(chosen)
    backbone.pipe.scheduler = getattr(diffusers, scheduler).from_config(backbone.pipe.scheduler.config)
    return backbone


def _take(threads: int) -> None:
    import torch

    torch.set_num_threads(threads)
