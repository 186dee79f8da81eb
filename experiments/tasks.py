"""What workers do: train a concept, draw with it, score the pictures. Models are loaded once in a process and kept.

Pictures of one concept at one setting lie in one folder with their manifest; a picture that is there is not drawn
again, so a folder can grow by prompts and seeds.
"""

from __future__ import annotations

import dataclasses
import functools
import gc
import json
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from eval.record import Point
from experiments.protocol import Toy, filled
from perfusion.config import BackboneConfig, TrainConfig, checked

# Torch and its friends take seconds to import: the process that only plans does without them.
if TYPE_CHECKING:
    from perfusion.backbones.base import Backbone
    from perfusion.concept import Attached
    from perfusion.manifest import ImageRecord

AT_ONCE = 16  # pictures in one batch


@dataclass(frozen=True)
class Look:
    """One setting of the dials, and the folder of its pictures.

    Attributes:
        said: what else sets these pictures apart, for the manifest.
    """

    folder: Path
    dials: Mapping[str, Any]
    said: str | None = None


@dataclass(frozen=True)
class Job:
    """Pictures to draw and to score.

    Attributes:
        method: what the manifests call it.
        toys: one, or several that are drawn together.
        words: what stands for each of them in prompts.
        concepts: their files, in the same order; none: the base model draws.
        templates: prompts with a `{}` for each toy.
        measured: folder of scores that are kept.
    """

    backbone: BackboneConfig
    method: str
    toys: tuple[Toy, ...]
    words: tuple[str, ...]
    concepts: tuple[Path, ...]
    looks: tuple[Look, ...]
    templates: tuple[str, ...]
    seeds: tuple[int, ...]
    steps: int
    guidance: float
    measured: Path


@dataclass(frozen=True)
class Judged:
    """The scores of the pictures of a job.

    Attributes:
        points: of each look.
        document: what a record of scores says of itself: the scorers, and small pictures of the concepts.
    """

    points: tuple[Point, ...]
    document: Mapping[str, Any]


def train(config: TrainConfig) -> None:
    """Train a concept, unless it is there. Raises what `perfusion.train` raises."""
    _one_thread()
    from perfusion.train import train as run

    try:
        run(config)
    finally:
        gc.collect()


def draw(job: Job) -> Judged:
    """Draw what is missing and score all; raises what `perfusion.generate` and `eval.score` raise."""
    _one_thread()
    from perfusion.concept import Concept
    from perfusion.drawing import Shot, draw
    from perfusion.toyland.precision import autocast

    backbone = _backbone(json.dumps(dataclasses.asdict(job.backbone), sort_keys=True))
    with ExitStack() as stack:
        attached = [stack.enter_context(Concept.load(file).attach(backbone)) for file in job.concepts]
        shots = [
            Shot(record, look.folder, [look.dials] * len(attached))
            for look in job.looks
            for record in _records(job, look, backbone.pipe, attached)
        ]
        shots.sort(key=lambda shot: shot.record.prompt)  # a batch shares what is computed of a prompt
        stack.enter_context(autocast(backbone.pipe.device))
        draw(backbone.pipe, attached, shots, AT_ONCE, size=job.backbone.resolution, exact=False, again=False)
    return _judged(job)


def _records(job: Job, look: Look, pipe: Any, attached: Sequence[Attached]) -> list[ImageRecord]:
    from perfusion.drawing import described, recorded
    from perfusion.generate import slug
    from perfusion.manifest import JOINED, ImageRecord

    superclasses = tuple(toy.superclass for toy in job.toys)
    common: dict[str, Any] = {
        **described(pipe, [one.concept for one in attached], [toy.name for toy in job.toys]),
        # Scores read prompts with the superclass in its place, so that looks which are told are no wish of the prompt.
        "placeholder": None if job.words == superclasses else JOINED.join(job.words),
        "superclass": JOINED.join(superclasses),
        "method": job.method,
        "backbone": "toyland",
        "instance": job.toys[0].instance if len(job.toys) == 1 else None,
        "dials": recorded(attached, [look.dials] * len(attached)),
        "steps": job.steps,
        "guidance": job.guidance,
        "setting": look.said,
    }
    return [
        ImageRecord(file=f"{slug(template)}-{seed}.png", prompt=filled(template, *job.words), seed=seed, **common)
        for template in job.templates
        for seed in job.seeds
    ]


def _judged(job: Job) -> Judged:
    from eval.folder_scores import points_of, score_folder
    from eval.folders import Said, read_folder
    from eval.references import References
    from eval.sheets import data_uri
    from perfusion.provenance import provenance

    scorers = _scorers()
    references = References(instance={toy.name: toy.instance for toy in job.toys})
    asked = {filled(template, *job.words) for template in job.templates}
    points: list[Point] = []
    for look in job.looks:
        folder = read_folder(look.folder, Said())
        records = tuple(r for r in folder.records if r.prompt in asked and r.seed in job.seeds)
        folder = dataclasses.replace(folder, records=records)
        scores, _ = score_folder(folder, scorers, references, None, job.measured, progress=False)
        (point,) = points_of(folder, scores)
        points.append(point)
    shown = {name: [data_uri(image) for image in images[:1]] for name, images in references.shown.items()}
    document = {"made_with": {**scorers.names, **provenance()}, "scorer": scorers.identity, "references": shown}
    return Judged(tuple(points), document)


@functools.cache
def _scorers() -> Any:
    from eval.attributes import load_reader
    from eval.scorers import Scorers
    from perfusion.scoring.clip import ClipScorer

    return Scorers(ClipScorer("toyland"), None, load_reader())


@functools.lru_cache(maxsize=1)
def _backbone(config: str) -> Backbone:
    from diffusers import DPMSolverMultistepScheduler

    from perfusion.backbones import backbone_class
    from perfusion.training.trainer import quieten

    quieten()
    chosen = checked(BackboneConfig, json.loads(config))
    backbone = backbone_class(chosen.name).load(chosen)
    backbone.pipe.scheduler = DPMSolverMultistepScheduler.from_config(backbone.pipe.scheduler.config)
    return backbone


def _one_thread() -> None:
    import torch

    torch.set_num_threads(1)
