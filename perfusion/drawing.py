"""Pictures from a pipeline, one seed each, so that none depends on those that are drawn beside it; and pictures with
attached concepts, each written as soon as it is drawn, with all that is known of it beside it.
"""

from __future__ import annotations

import inspect
import itertools
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from diffusers import DiffusionPipeline
from PIL import Image

from perfusion.bars import Bar
from perfusion.concept import Attached, Concept
from perfusion.manifest import JOINED, ImageRecord, known_records, named, save_png, slug, write_manifest

Setting = Sequence[Mapping[str, Any]]  # for each attached concept, what its dials are set to; others stay
_SEEDS = range(-(2**63), 2**64)  # what torch.Generator takes


class SamplingError(ValueError):
    """A request for pictures that no pipeline can follow."""


def sample(
    pipe: DiffusionPipeline,
    prompts: Sequence[str],
    seeds: Sequence[int],
    steps: int = 50,
    guidance: float = 6.0,
    batch_size: int = 8,
    progress: bool = False,
    *,
    size: int | tuple[int, int] | None = None,
    exact: bool = True,
) -> list[Image.Image]:
    """One picture per prompt and seed, in their order.

    Each picture has a generator of its own, so it is the one of the stock call
    `pipe(prompt, generator=torch.Generator().manual_seed(seed))`, whatever stands beside it in a batch. Kernels round
    differently for every batch shape, though, which would turn a pixel by one level now and then. So a CPU, where
    batches gain least, denoises one picture at a time, and the same seed gives the same bytes. On other devices
    pictures of different batch sizes agree up to that rounding; `batch_size=1` is exact there, too.

    Args:
        pipe: any stock text-to-image pipeline, with or without a concept attached. It is left as it was.
        prompts: n prompts.
        seeds: n seeds.
        steps: denoising steps.
        guidance: classifier-free guidance; 1 switches it off.
        batch_size: pictures in one call of the denoiser.
        progress: show a progress bar that counts denoising steps, of all pictures.
        size: side in pixels, or width and height; default: the pipeline's own.
        exact: False lets a CPU take whole batches: about twice as fast for small models.

    Returns:
        n RGB pictures.

    Raises:
        SamplingError: steps or batch size below 1, more steps than the schedule has, a seed beyond 64 bits; or a
            picture became NaN, which would be black.
    """
    return list(stream(pipe, prompts, seeds, steps, guidance, batch_size, progress, size=size, exact=exact))


def stream(
    pipe: Any,
    prompts: Sequence[str],
    seeds: Sequence[int],
    steps: int = 50,
    guidance: float = 6.0,
    batch_size: int = 8,
    progress: bool = False,
    *,
    size: int | tuple[int, int] | None = None,
    exact: bool = True,
    negative_prompt: str | None = None,
    given: Mapping[str, Any] | None = None,
    prepare: Callable[[slice], None] | None = None,
) -> Iterator[Image.Image]:
    """What `sample` gives, each picture as soon as its batch is drawn, so that it can be saved before the next.

    `negative_prompt` is that of all, and so is what else the pipeline's call takes, `given`: pictures, or numbers.
    `prepare` is called before each batch, with the place of its pictures among all.
    """
    assert len(prompts) == len(seeds), f"{len(prompts)} prompts, {len(seeds)} seeds"
    if batch_size < 1:
        raise SamplingError(f"batch size: found {batch_size}, expected at least 1")
    trained = pipe.scheduler.config.num_train_timesteps
    if not 1 <= steps <= trained:
        raise SamplingError(f"steps: found {steps}, expected 1 to {trained}, as many as in training")
    if not math.isfinite(guidance):
        raise SamplingError(f"guidance: found {guidance}, expected a finite number")
    if beyond := [seed for seed in seeds if seed not in _SEEDS]:
        raise SamplingError(f"seed: found {beyond[0]}, expected {_SEEDS.start} to {_SEEDS.stop - 1}")
    if exact and pipe.device.type == "cpu":
        batch_size = 1
    width, height = size if isinstance(size, tuple) else (size, size)
    known = inspect.signature(type(pipe).__call__).parameters
    settings: dict[str, Any] = {"num_inference_steps": steps, "guidance_scale": guidance}
    # Image to image has the size of its image.
    settings |= {key: side for key, side in (("height", height), ("width", width)) if key in known}
    # A placeholder is no text to be cleaned of its symbols, and a picture has the size that was asked for.
    settings |= {name: False for name in ("clean_caption", "use_resolution_binning") if name in known}
    with Bar(total=len(prompts) * steps, desc="Sampling", unit="step", disable=not progress) as bar:
        for start in range(0, len(prompts), batch_size):
            batch = slice(start, start + batch_size)
            if prepare is not None:
                prepare(batch)

            def count(step: int, timestep: Any, latents: torch.Tensor, at_once: int = len(prompts[batch])) -> None:
                # Some schedulers take one step more than asked for, and image to image fewer.
                taken = getattr(pipe, "num_timesteps", len(pipe.scheduler.timesteps))
                bar.total = len(prompts) * taken
                bar.update(at_once)
                if step == taken - 1 and not bool(latents.isfinite().all()):
                    raise SamplingError(
                        f"a picture became NaN or infinite, drawn in {str(latents.dtype).split('.')[-1]}: a concept's "
                        "or model's numbers are beyond its range; float32 (dtype=float32) has a larger one"
                    )

            def at_step_end(
                pipe: Any, step: int, timestep: Any, kept: dict[str, Any], count: Any = count
            ) -> dict[str, Any]:
                count(step, timestep, kept["latents"])
                return {}

            at_end = "callback_on_step_end"
            told: dict[str, Any] = {at_end: at_step_end} if at_end in known else {"callback": count}
            if negative_prompt is not None:
                told["negative_prompt"] = [negative_prompt] * len(prompts[batch])
            own_bar = getattr(pipe, "_progress_bar_config", {})
            pipe.set_progress_bar_config(disable=True)
            try:
                images = pipe(
                    prompt=list(prompts[batch]),
                    generator=[torch.Generator().manual_seed(seed) for seed in seeds[batch]],
                    **settings,
                    **told,
                    **{key: _for_each(value, len(prompts[batch])) for key, value in (given or {}).items()},
                ).images
            finally:
                pipe.set_progress_bar_config(**own_bar)
            yield from images


def _for_each(value: Any, count: int) -> Any:
    """A picture once for each of the batch, so that each has noise of its own generator; numbers as they are."""
    return [value] * count if isinstance(value, Image.Image) else value


@dataclass(frozen=True)
class Shot:
    """One picture to draw.

    Attributes:
        record: of the picture; it is drawn by its prompt, seed, steps and guidance.
        folder: that its file is written to.
        dials: see `Setting`.
    """

    record: ImageRecord
    folder: Path
    dials: Setting = ()


def draw(
    pipe: DiffusionPipeline,
    attached: Sequence[Attached],
    shots: Sequence[Shot],
    batch: int = 8,
    *,
    size: int | tuple[int, int] | None = None,
    exact: bool = True,
    progress: bool = False,
    again: bool = True,
    given: Mapping[str, Any] | None = None,
) -> list[Image.Image]:
    """Draw pictures, write them and name them in their folders' manifests; returns those that were drawn, in order.

    What else a manifest names stays in it. When interrupted, manifests name what was finished. The concepts are set
    back to what they were set to before.

    Args:
        batch, size, exact, progress: see `sample`; given: see `stream`.
        again: False leaves out pictures that lie there, made by the same training.
    """
    missing = [k for k, shot in enumerate(shots) if again or not _is_there(shot)]
    finished = {*range(len(shots))} - {*missing}
    images: dict[int, Image.Image] = {}
    before = [one.dials for one in attached]
    dials = [
        [{**own, **given} for own, given in zip(before, shot.dials or [{}] * len(before), strict=True)]
        for shot in shots
    ]
    try:
        for together in _by_what_a_batch_shares(attached, shots, dials, missing):
            records = [shots[k].record for k in together]

            def prepare(batch: slice, together: Sequence[int] = together) -> None:
                _set(attached, [dials[k] for k in together[batch]])

            drawn = stream(
                pipe,
                [record.prompt for record in records],
                [record.seed for record in records],  # type: ignore[misc]
                records[0].steps,  # type: ignore[arg-type]
                records[0].guidance,  # type: ignore[arg-type]
                batch,
                progress,
                size=size,
                exact=exact,
                negative_prompt=records[0].negative_prompt,
                given=given,
                prepare=prepare,
            )
            for k, image in zip(together, drawn, strict=True):
                shots[k].folder.mkdir(parents=True, exist_ok=True)
                save_png(shots[k].folder, image, shots[k].record, flush=again)  # `_is_there` looks into it
                images[k] = image
    finally:
        _set(attached, [before])
        _name([shots[k] for k in sorted(finished | {*images})])
    return [images[k] for k in missing]


def planned(
    pipe: DiffusionPipeline,
    attached: Sequence[Attached],
    pictures: Iterable[tuple[str, Setting, int]],
    folder: Path,
    names: Iterable[str],
    **more: Any,
) -> list[Shot]:
    """Shots of pictures, under file names that no other picture in the folder has.

    Args:
        pictures: for each its prompt, what each of the concepts is set to, and its seed.
        names: of the concepts, for the records.
        more: what else all records say.
    """
    pictures = [*pictures]
    said = described(pipe, [one.concept for one in attached], names) | more
    records = [ImageRecord("", prompt, seed, dials=recorded(attached, row), **said) for prompt, row, seed in pictures]
    rows = (row for _, row, _ in pictures)
    return [Shot(record, folder, row) for record, row in zip(named(records, folder), rows, strict=True)]


def name_of(file: Path, placeholder: str) -> str:
    """What to call a concept: its file's name if that says more than that it is one, else its placeholder's letters."""
    return slug(placeholder) if file.stem == "concept" else file.stem


def described(pipe: DiffusionPipeline, concepts: Sequence[Concept], names: Iterable[str]) -> dict[str, Any]:
    """What records say of the concepts that are drawn together, under these names; of none, the base model draws."""
    return {
        "scheduler": type(pipe.scheduler).__name__,
        "concept": JOINED.join(names) or None,
        "concept_hash": JOINED.join(concept.hash for concept in concepts) or None,
        "placeholder": JOINED.join(concept.placeholder for concept in concepts) or None,
        "superclass": JOINED.join(concept.superclass for concept in concepts) or None,
        "method": JOINED.join(dict.fromkeys(concept.method for concept in concepts)) or None,
        "backbone": next((concept.fingerprint.get("family") for concept in concepts), None),
    }


def recorded(attached: Sequence[Attached], dials: Setting) -> dict[str, float | str]:
    """What a record says of concepts' dials: each in one value if the concepts agree, else joined."""
    values = [{**one.dials, **given} for one, given in zip(attached, dials, strict=True)]
    names = dict.fromkeys(name for row in values for name in row)
    return {name: _as_one([row.get(name) for row in values]) for name in names}


def _as_one(row: Sequence[Any]) -> float | str:
    """Infinity is text, for JSON has no number for it."""
    if len({*row}) == 1:
        return "inf" if row[0] == math.inf else row[0]
    return JOINED.join("none" if value is None else value if isinstance(value, str) else f"{value:g}" for value in row)


def _by_what_a_batch_shares(
    attached: Sequence[Attached], shots: Sequence[Shot], dials: Sequence[Sequence[Mapping[str, Any]]], of: Iterable[int]
) -> list[list[int]]:
    """The shots `of` in groups whose pictures can be in one batch."""

    def shared(k: int) -> str:
        common = [
            {name: value for name, value in given.items() if not one.concept.dials[name].per_picture}
            for one, given in zip(attached, dials[k], strict=True)
        ]
        record = shots[k].record
        return repr((record.steps, record.guidance, record.negative_prompt, common))

    groups: dict[str, list[int]] = {}
    for k in of:
        groups.setdefault(shared(k), []).append(k)
    return [*groups.values()]


def _set(attached: Sequence[Attached], rows: Sequence[Sequence[Mapping[str, Any]]]) -> None:
    """Set the dials for a batch: those that differ between its pictures to a value for each."""
    for one, settings in zip(attached, zip(*rows, strict=True), strict=True):
        for name in settings[0]:
            values = [given[name] for given in settings]
            setattr(one, name, values[0] if len({*values}) == 1 else torch.tensor(values))


def _name(shots: Sequence[Shot]) -> None:
    """Write the manifests anew, read at this moment: another command may have drawn into a folder meanwhile."""
    for folder, mine in itertools.groupby(sorted(shots, key=lambda shot: shot.folder), key=lambda shot: shot.folder):
        records = [*known_records(folder), *(shot.record for shot in mine)]
        write_manifest(folder, {record.file: record for record in records}.values())


def _is_there(shot: Shot) -> bool:
    """Whether the picture lies there, made by the same training."""
    try:
        with Image.open(shot.folder / shot.record.file) as image:
            image.load()
            said = getattr(image, "text", {})
            return (said.get("prompt"), said.get("concept_hash")) == (shot.record.prompt, shot.record.concept_hash)
    except OSError:
        return False
