"""`python -m eval.score`: pictures in, a table of scores out. `--help` says how it is used."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from omegaconf import MISSING

from eval.aggregate import RESAMPLES, Bootstrap, Summary, as_json, labels_of, prompt_scores, summarize, summary
from eval.folders import Base, ImageFolder, References, find_folders, read_folder, shows_concept
from eval.record import Point, ScoreError, merged, write_scores
from eval.score_kinds import ordered
from perfusion.cli import aligned, parse_key_values, run_cli

USAGE = """
Usage: python -m eval.score images=<folder> [key=value ...]

Scores every folder with a manifest.json below `images`, which may be a list: one point for each method, concept and
setting (beta, tau, ...) that the manifests tell apart, from as many folders as it takes. What was measured of a picture
is kept, so only what is new is measured. The result goes to `python -m eval.pareto` and `python -m eval.report`.
References by concept:  references=photos (with photos/cat, photos/dog, ...) or references='{cat: a/*.jpg, dog: b}'
A toy of Toyland:  instance=16 or instance='{cat: 16, dog: 3}'; not needed where the manifest or the run says it
Pictures of another tool:  method=lora concept=cat superclass=cat placeholder=sks setting='rank 8'
"""
_SHOWN = 4  # references of a concept that the record carries


@dataclass
class ScoreConfig:
    """The options of `python -m eval.score`."""

    images: Any = MISSING  # folder with manifest.json in it or below it, or a list of folders
    references: Any = None  # pictures of the concept; null: renders of the toy, else what its run was trained on
    scorer: str | None = None  # toyland, an open_clip name, or a folder; null: Toyland's own on Toyland
    pretrained: str | None = None  # the scorer's weights: a file or a tag
    dino: str | None = None  # timm name or folder, as vit_small_patch16_224.dino; null: no DINO score
    dino_pretrained: str | None = None  # its weights: a safetensors file; null: the hub's
    reader: str = "auto"  # Toyland's attribute reader: auto (on pictures of Toyland), none, or a folder
    instance: Any = None  # seed of a toy that Toyland draws; null: as the manifest or the run says
    base: str | None = None  # folder with the base model's pictures of prompts without the concept, for the drift
    method: str | None = None  # of pictures whose manifest does not say it; null: their folder's name
    concept: str | None = None  # where the manifest does not say it
    superclass: str | None = None  # where the manifest does not say it: takes the placeholder's place in prompts
    placeholder: str | None = None  # where the manifest does not say it: the concept's word in prompts
    setting: str | None = None  # where the manifest does not say it: what sets pictures apart from others of a method
    out: str = "scores.json"  # the record
    cache: str = "~/.cache/perfusion/scores"  # where the scores of folders are kept
    device: str = "auto"  # auto: cuda, then mps, then cpu
    resamples: int = RESAMPLES  # of the bootstrap over concepts and seeds that gives the intervals
    seed: int = 0  # of the bootstrap
    progress: bool = True  # show bars


def main(argv: Sequence[str]) -> None:
    """Command line entry point."""
    score(parse_key_values(argv, ScoreConfig, USAGE))


def score(config: ScoreConfig) -> list[Summary]:
    """Score pictures, write the record and print its table; returns the scores over concepts.

    Raises:
        ScoreError, ManifestError, ConfigError: pictures, manifests or options that cannot be used.
        ScorerError, BackboneError: a model or device that cannot be had.
        ConceptImageError: a picture or a reference that cannot be read.
    """
    bootstrap = Bootstrap(config.resamples, config.seed)
    out = Path(config.out).expanduser()
    if not out.parent.is_dir():
        raise ScoreError(f"out={config.out}: the folder {out.parent} is not there")
    said = {key: getattr(config, key) for key in ("method", "concept", "superclass", "placeholder", "setting")}
    folders = [read_folder(path, **said) for path in find_folders(config.images)]
    base = None if config.base is None else read_folder(Path(config.base).expanduser(), concept="none")
    points, document = _points(config, folders, base)
    if not points:
        raise ScoreError(f"images={config.images}: no prompt names a concept, and base= is not given: nothing to score")
    summaries = summarize(points, bootstrap)
    document |= {"bootstrap": asdict(bootstrap), "summary": [_summary(s) for s in summaries]}
    write_scores(out, document, [(point, _said(point, bootstrap)) for point in points])
    print(table(summaries))
    print(f"scores: {out}")
    return summaries


def _points(
    config: ScoreConfig, folders: Sequence[ImageFolder], base: ImageFolder | None
) -> tuple[list[Point], dict[str, Any]]:
    """All points of the folders, and what the record says of how they were scored."""
    # Torch and its friends take seconds to import: `--help` and a mistyped key do without them.
    from eval.folder_scores import points_of, score_folder, scored_with
    from eval.scorers import Scorers, attribute_reader, clip_scorer, dino_scorer

    references = References(config.references, config.instance)
    before = None if base is None else Base(base)
    scorers = Scorers(
        clip_scorer(config.scorer, config.pretrained, config.device, folders),
        dino_scorer(config.dino, config.dino_pretrained, config.device),
        attribute_reader(config.reader, folders, config.instance is not None),
    )
    cache = Path(config.cache).expanduser()
    found, kept, left = [], 0, 0
    for folder in folders:
        scores, known = score_folder(folder, scorers, references, before, cache, config.progress)
        kept += known
        left += 0 if base else sum(not shows_concept(record) for record in folder.records)
        found += points_of(folder, scores)
    print(f"folders: {len(folders)}, of which {kept} had been measured before")
    if left:
        print(f"not scored: {left} pictures whose prompt does not name the concept; base=<folder> gives their drift")
    return merged(found), scored_with(scorers, references, _SHOWN)


def _summary(s: Summary) -> dict[str, Any]:
    said = {"method": s.method, "setting": dict(s.setting), "concepts": list(s.concepts), "images": s.images}
    return {**said, "scores": as_json(s.scores)}


def _said(point: Point, bootstrap: Bootstrap) -> dict[str, Any]:
    """What the record says of a point for people to read."""
    prompts = [
        {**row, "scores": {name: round(value, 6) for name, value in row["scores"].items()}}
        for row in prompt_scores(point)
    ]
    return {"images": len(point.pictures), "scores": as_json(summary([point], bootstrap).scores), "prompts": prompts}


def table(summaries: Sequence[Summary]) -> str:
    """The scores as aligned text, one line for each method and setting."""
    kinds = ordered({name for s in summaries for name in s.scores})
    rows = [["method", *(kind.title for kind in kinds)]]
    for s, label in zip(summaries, labels_of(summaries), strict=True):
        cells = [s.scores[kind.name].spelled(" ±") if kind.name in s.scores else "-" for kind in kinds]
        rows.append([f"{s.method}, {label}" if label else s.method, *cells])
    return "\n".join(aligned(rows, right=range(1, len(kinds) + 1)))


if __name__ == "__main__":
    sys.exit(run_cli(main))
