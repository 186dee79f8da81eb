"""What workers do: train a concept, draw with it, measure the pictures. Models are loaded once in a process and kept.

Pictures of one concept at one setting lie in one folder with their manifest; a picture that is there is not drawn
again, so a folder can grow by prompts and seeds.
"""

from __future__ import annotations

import dataclasses
import functools
import gc
import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from eval.scores import Point
from experiments.protocol import Toy, filled
from perfusion.config import BackboneConfig, TrainConfig, checked

# Torch and its friends take seconds to import: the process that only plans does without them.
if TYPE_CHECKING:
    from perfusion.backbones.base import Backbone
    from perfusion.concept import Attached, Concept
    from perfusion.manifest import ImageRecord

AT_ONCE = 16  # pictures in one batch
PER_PICTURE = ("beta", "tau")  # dials that every picture of a batch may have for itself
JOINED = " + "  # what is said of several concepts in one picture, as manifests have it


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
    """Pictures to draw and to measure.

    Attributes:
        method: what the manifests call it.
        toys: one, or several that are drawn together.
        words: what stands for each of them in prompts.
        concepts: their files, in the same order; none: the base model draws.
        templates: prompts with a `{}` for each toy.
        measured: folder of what was measured of pictures before.
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
    """What is known of the pictures of a job.

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
    """Draw what is missing and measure all; raises what `perfusion.generate` and `eval.score` raise."""
    _one_thread()
    from perfusion.concept import Concept

    backbone = _backbone(json.dumps(dataclasses.asdict(job.backbone), sort_keys=True))
    concepts = [Concept.load(file) for file in job.concepts]
    groups: dict[Any, list[Look]] = {}
    for look in job.looks:
        own = tuple(name for name in PER_PICTURE if name in look.dials)
        groups.setdefault((own, tuple(_of_batch(look).items())), []).append(look)
    for looks in groups.values():
        _draw(job, looks, concepts, backbone)
    return _measure(job)


def _draw(job: Job, looks: Sequence[Look], concepts: Sequence[Concept], backbone: Backbone) -> None:
    """The pictures of looks that differ in β and τ alone, which every picture of a batch may have for itself."""
    from perfusion.manifest import known_records, save_png, write_manifest
    from perfusion.sampling import stream

    with _attached(concepts, backbone, _of_batch(looks[0])) as attached:
        records = {look.folder: _records(job, look, concepts, attached) for look in looks}
        missing = [
            (look, record) for look in looks for record in records[look.folder] if not _is_there(look.folder, record)
        ]
        missing.sort(key=lambda pair: pair[1].prompt)  # a batch shares what is computed of a prompt
        for look in looks:
            look.folder.mkdir(parents=True, exist_ok=True)

        def dial(batch: slice) -> None:
            _dial(attached, [look.dials for look, _ in missing[batch]])

        images = stream(
            backbone.pipe,
            [record.prompt for _, record in missing],
            [record.seed for _, record in missing],  # type: ignore[misc]
            job.steps,
            job.guidance,
            AT_ONCE,
            size=job.backbone.resolution,
            exact=False,
            prepare=dial,
        )
        for (look, record), image in zip(missing, images, strict=True):
            save_png(look.folder, image, record, flush=False)  # `_is_there` looks into it
    for folder, mine in records.items():
        known = {record.file: record for record in known_records(folder)}
        write_manifest(folder, {**known, **{record.file: record for record in mine}}.values())


@contextmanager
def _attached(concepts: Sequence[Concept], backbone: Backbone, dials: Any) -> Iterator[list[Attached]]:
    with ExitStack() as stack:
        yield [stack.enter_context(concept.attach(backbone, **dials)) for concept in concepts]


def _dial(attached: Sequence[Attached], rows: Sequence[Mapping[str, Any]]) -> None:
    """Give every picture of a batch its own β and τ."""
    import torch

    for name in PER_PICTURE:
        if name in rows[0]:
            for one in attached:
                setattr(one, name, torch.tensor([float(row[name]) for row in rows]))


def _of_batch(look: Look) -> dict[str, Any]:
    """The dials that a whole batch has in common."""
    return {name: value for name, value in look.dials.items() if name not in PER_PICTURE}


def _records(job: Job, look: Look, concepts: Sequence[Concept], attached: Sequence[Attached]) -> list[ImageRecord]:
    from perfusion.generate import slug
    from perfusion.manifest import ImageRecord

    superclasses = tuple(toy.superclass for toy in job.toys)
    dials = {name: _value(attached, name, look) for name in ("beta", "tau", "key_lock", "scale")}
    common: dict[str, Any] = {
        "concept": JOINED.join(toy.name for toy in job.toys),
        "concept_hash": JOINED.join(concept.hash for concept in concepts) or None,
        # Scores read prompts with the superclass in its place, so that looks which are told are no wish of the prompt.
        "placeholder": None if job.words == superclasses else JOINED.join(job.words),
        "superclass": JOINED.join(superclasses),
        "method": job.method,
        "backbone": "toyland",
        "instance": job.toys[0].instance if len(job.toys) == 1 else None,
        "steps": job.steps,
        "guidance": job.guidance,
        "setting": look.said,
        **dials,
    }
    return [
        ImageRecord(file=f"{slug(template)}-{seed}.png", prompt=filled(template, *job.words), seed=seed, **common)
        for template in job.templates
        for seed in job.seeds
    ]


def _value(attached: Sequence[Attached], name: str, look: Look) -> Any:
    """A dial as the manifest has it: what was set, else what the concept has; None for a method without it."""
    if not attached or name not in attached[0].concept.dials:
        return None
    return look.dials.get(name, getattr(attached[0], name))


def _is_there(folder: Path, record: ImageRecord) -> bool:
    """Whether the picture lies there, made by the same training."""
    from PIL import Image

    try:
        with Image.open(folder / record.file) as image:
            image.load()
            return getattr(image, "text", {}).get("concept_hash") == record.concept_hash
    except OSError:
        return False


def _measure(job: Job) -> Judged:
    from eval.folders import Said, read_folder
    from eval.measuring import measure, points_of
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
        measured, _ = measure(folder, scorers, references, None, job.measured, progress=False)
        (point,) = points_of(folder, measured)
        points.append(point)
    shown = {name: [data_uri(image) for image in images[:1]] for name, images in references.shown.items()}
    document = {"made_with": {**scorers.names, **provenance()}, "scorer": scorers.identity, "references": shown}
    return Judged(tuple(points), document)


@functools.cache
def _scorers() -> Any:
    from eval.attributes import load_reader
    from eval.clip import ClipScorer
    from eval.scorers import Scorers

    return Scorers(ClipScorer("toyland"), None, load_reader())


@functools.lru_cache(maxsize=1)
def _backbone(config: str) -> Backbone:
    from perfusion.backbones import backbone_class
    from perfusion.training.trainer import quieten

    quieten()
    chosen = checked(BackboneConfig, json.loads(config))
    return backbone_class(chosen.name).load(chosen)


def _one_thread() -> None:
    import torch

    torch.set_num_threads(1)
