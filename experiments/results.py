"""What an experiment found: `results/<id>.json`, with everything that it was found with, and `docs/results.md`, a page
with figures that is made from these files and nothing else.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from PIL import Image

from eval.aggregate import Interval, Summary, as_json
from eval.front import fronts
from eval.looks import title
from eval.score_kinds import BY_NAME, ordered, score_kind
from experiments.evidence import Evidence
from experiments.experiment import Experiment, Finding
from experiments.protocol import SCHEDULER
from perfusion.config import ConfigError
from perfusion.files import atomic_path, atomic_write_text

VERSION = 1
PAPER = "Tewel et al. 2023 (arXiv 2305.01644)"
IMAGES = "images/results"  # beside the page
_WIDTH = 900  # pixels of a figure on the page
_COLOURS = 64
_SHOWN = ("identity", "prompt", "superclass", "clip_i", "clip_t", "diversity")
_HEAD = """# Results

Made by `make paper` ([how](experiments.md)); do not edit. Claims are those of Tewel et al., *Key-Locked Rank One
Editing for Text-to-Image Personalization* (SIGGRAPH 2023, arXiv 2305.01644), tried on Toyland. Brackets are 95 %
intervals over concepts and seeds. A claim **holds** or **fails** where the interval of its number lies wholly on one
side of what it claims, and is **undecided** otherwise; each section says which number that is.
"""
_CAVEATS = """
## What to keep in mind

- Toyland is a small world, and its base model makes mistakes of its own: the row "base model" says how well it follows
  the same prompts with the superclass's word, and how much identity chance gives. Nothing here says how large an effect
  is on Stable Diffusion.
- Identity and prompt accuracy are read by a small classifier, which errs as well
  ([model card](../perfusion/toyland/weights/README.md)), for all methods alike.
- CLIP-I and CLIP-T are those of Toyland's own scorer, which agrees but weakly with whether a prompt was followed (model
  card). They are shown since papers show them; verdicts on likeness and prompt do not rest on them.
- Intervals of the numbers that decide are widened for the few concepts there are (Student's t). The brackets behind
  scores are plain percentiles of the bootstrap, which over eight concepts are about a fifth too narrow.
- All methods were trained on the same pictures of each toy, DreamBooth and Custom Diffusion also on pictures of its
  superclass which the base model drew. Settings are those of `conf/method/<method>_toyland.yaml`;
  [experiments.md](experiments.md) says where they come from.
"""


def document(experiment: Experiment, finding: Finding, evidence: Evidence) -> dict[str, Any]:
    """The file's content, in JSON values. `notes` were written by people, `verdict` follows from `checks` alone."""
    protocol = evidence.runner.protocol
    drawn = {
        "groups": len(evidence.groups),
        "concepts": [{"name": toy.name, **asdict(toy.looks)} for toy in evidence.toys],
        "prompts": [list(alternatives) for alternatives in experiment.prompts(protocol)],
        "seeds": list(protocol.seeds_of(experiment.times)),
        "scheduler": SCHEDULER,
        "steps": protocol.steps,
        "guidance": protocol.guidance,
    }
    runs = {t.label: [run.path.name for run in evidence.runs(t)] for t in experiment.trained}
    return {
        "version": VERSION,
        "id": experiment.id,
        "place": experiment.place,
        "claim": experiment.claim,
        "source": f"{PAPER}: {experiment.source}" if experiment.of_paper else experiment.source,
        "verdict": finding.verdict.value,
        "key": finding.key,
        "test": experiment.test,
        "checks": [
            {
                "what": check.what,
                **_numbers(check.value),
                "expected": f"{'above' if check.above else 'below'} {check.threshold:g}",
                "decides": check.decides,
                "verdict": check.verdict.value,
            }
            for check in finding.checks
        ],
        "series": [
            {"label": one.label, "settings": [_scores(evidence.summary(s, one.label), s.name) for s in one.settings]}
            for one in experiment.series
        ],
        "tables": [asdict(table) for table in finding.tables],
        "axes": [experiment.x, experiment.y],
        "caveats": experiment.caveats,
        "notes": experiment.notes,
        "protocol": drawn,
        "bootstrap": asdict(evidence.bootstrap),
        "runs": runs,
        "weights": evidence.runner.weights,
        "config_hash": _hash([runs, drawn, experiment.test]),
        "seconds": _seconds(experiment, evidence),
        "provenance": evidence.runner.made_with,
    }


def write(out: Path, content: Mapping[str, Any]) -> None:
    """Write one experiment's file below `out`, and the page anew, each atomically."""
    for folder in (out / "results", out / "docs"):
        folder.mkdir(parents=True, exist_ok=True)
    atomic_write_text(
        out / "results" / f"{content['id']}.json", json.dumps(content, indent=1, ensure_ascii=False) + "\n"
    )
    atomic_write_text(out / "docs" / "results.md", page(read_all(out / "results")))


def read_all(folder: Path) -> list[dict[str, Any]]:
    """All files of a folder, in the order of the experiments.

    Raises:
        ConfigError: one that cannot be read.
    """
    found = []
    for path in folder.glob("*.json"):
        try:
            content = json.loads(path.read_text(encoding="utf-8"))
            assert content["version"] == VERSION and content["weights"]
        except (OSError, ValueError, KeyError, TypeError, AssertionError) as error:
            raise ConfigError(f"{path}: no result of this version ({error}); remove it to have it made anew") from error
        found.append(content)
    return sorted(found, key=lambda content: content["place"])


def draw(experiment: Experiment, evidence: Evidence, folder: Path, images: Path) -> None:
    """Write `<id>` and `<id>-clip` as PNG and SVG into `folder`, and small PNG files into `images`."""
    from eval.figures import draw_fronts, save_figure  # matplotlib, which takes long to import

    folder.mkdir(parents=True, exist_ok=True)
    images.mkdir(parents=True, exist_ok=True)
    summaries = [evidence.summary(s, series.label) for series in experiment.series for s in series.settings]
    axes = {experiment.id: (experiment.x, experiment.y), f"{experiment.id}-clip": ("clip_t", "clip_i")}
    for name, (right, up) in axes.items():
        x, y = score_kind(right, "x"), score_kind(up, "y")
        save_figure(draw_fronts(fronts(summaries, x, y, (0.0, 0.0), evidence.bootstrap.level), x, y), folder / name)
        with Image.open(folder / f"{name}.png") as image:
            image.thumbnail((_WIDTH, _WIDTH), Image.Resampling.LANCZOS)
            small = image.convert("RGB").quantize(_COLOURS)
        with atomic_path(images / f"{name}.png") as file:
            small.save(file, "PNG", optimize=True)


def _scores(summary: Summary, name: str) -> dict[str, Any]:
    return {
        "name": name,
        "setting": dict(summary.setting),
        "concepts": len(summary.concepts),
        "images": summary.images,
        "scores": as_json(summary.scores),
    }


def _numbers(value: Interval) -> dict[str, float | None]:
    return {key: None if v is None or v != v else round(v, 6) for key, v in asdict(value).items()}


def _seconds(experiment: Experiment, evidence: Evidence) -> dict[str, float]:
    """Of one core, what other experiments use as well included."""
    drawing = sum(evidence.runner.seconds(one) for one in experiment.wanted(evidence.runner.protocol))
    training = sum(seconds for one in experiment.trained for seconds in evidence.training_seconds(one))
    return {"training": round(training, 1), "drawing": round(drawing, 1)}


def _hash(content: Any) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()[:12]


# --- the page ---------------------------------------------------------------------------------------------------------


def page(results: Sequence[Mapping[str, Any]]) -> str:
    """The page, in Markdown."""
    lines = [_HEAD, "| | claim | verdict | number |", "|---|---|---|---|"]
    for one in results:
        lines.append(f"| [{one['id']}](#{one['id']}) | {one['claim']} | **{one['verdict']}** | {_cell(one['key'])} |")
    lines += [_CAVEATS, *_several_weights(results), *_several_settings(results), *_protocol(results)]
    for one in results:
        lines += _section(one)
    return "\n".join(lines).rstrip() + "\n"


def _several_weights(results: Sequence[Mapping[str, Any]]) -> list[str]:
    if len({one["weights"] for one in results}) == 1:
        return []
    made = "; ".join(f"{one['id']} with {one['weights']}" for one in results)
    return [f"- **Not all of this was made with the same weights of Toyland**: {made}.", ""]


def _several_settings(results: Sequence[Mapping[str, Any]]) -> list[str]:
    """Where one method was trained in two ways, as when a preset was changed between two calls."""
    runs: dict[str, set[tuple[str, ...]]] = {}
    for one in results:
        for label, folders in one["runs"].items():
            runs.setdefault(label, set()).add(tuple(folders))
    if not (several := [label for label, found in runs.items() if len({*map(len, found)}) < len(found)]):
        return []
    return [f"- **Not all of this was made with the same settings** of {', '.join(several)}.", ""]


def _protocol(results: Sequence[Mapping[str, Any]]) -> list[str]:
    shown = max(
        (one for one in results if one["series"]), key=lambda one: len(one["protocol"]["prompts"]), default=None
    )
    if shown is None:
        return []
    protocol = shown["protocol"]
    others = [one for one in results if one["series"] and one["protocol"]["prompts"] != protocol["prompts"]]
    toys = ", ".join(
        f"{toy['name']} ({toy['body']}, {toy['pattern']} {toy['second']}, {toy['detail']})"
        for toy in protocol["concepts"]
    )
    prompts = "; ".join(f"*{alternatives[0]}*" for alternatives in protocol["prompts"])
    return [
        "## What was drawn",
        "",
        f"{len(protocol['concepts'])} concepts, {len(protocol['prompts'])} prompts and {len(protocol['seeds'])} seeds "
        f"for every setting; {protocol['steps']} {protocol.get('scheduler', 'DDIM')} steps, guidance "
        f"{protocol['guidance']:g}.",
        "",
        f"Concepts, with the seeds of their looks: {toys}.",
        "",
        f"Prompts: {prompts}. Where a concept and a prompt make a pair that Toyland's training left out, another "
        "prompt of the same kind stands in its place.",
        "",
        *(line for one in others for line in (_other_prompts(one), "")),
    ]


def _other_prompts(one: Mapping[str, Any]) -> str:
    prompts = "; ".join(f"*{alternatives[0]}*" for alternatives in one["protocol"]["prompts"])
    return f"{one['id']}: {one['protocol']['groups']} pairs of neighbours in this list, and other prompts: {prompts}."


def _section(one: Mapping[str, Any]) -> list[str]:
    made = one["provenance"]
    lines = [
        f"## {one['id']}",
        "",
        f"**{one['claim']}** ({one['source']})",
        "",
        f"Verdict: **{one['verdict']}**. {one['test']}",
        "",
        "| number | mean | 95 % interval | claimed | |",
        "|---|---:|---|---|---|",
    ]
    for check in one["checks"]:
        verdict = f"**{check['verdict']}**" if check["decides"] else f"{check['verdict']} (beside)"
        interval = "–" if check["low"] is None else f"{check['low']:.3f} to {check['high']:.3f}"
        mean = "–" if check["mean"] is None else f"{check['mean']:.3f}"
        lines.append(f"| {_cell(check['what'])} | {mean} | {interval} | {check['expected']} | {verdict} |")
    lines.append("")
    if one["series"]:
        right, up = (BY_NAME[name].title for name in one["axes"])
        lines += [f"![{up[:1].upper()}{up[1:]} over {right}]({IMAGES}/{one['id']}.png)", ""]
        lines += [f"![CLIP-I and CLIP-T]({IMAGES}/{one['id']}-clip.png)", "", *_table(one["series"]), ""]
    for table in one["tables"]:
        lines += [f"{table['title']}:", "", _row(table["head"]), _row(["---"] * len(table["head"]))]
        lines += [*map(_row, table["rows"]), ""]
    if one["caveats"]:
        lines += [f"Caveats: {one['caveats']}", ""]
    if one["notes"]:
        lines += [f"Notes: {one['notes']}", ""]
    seconds = one["seconds"]
    lines += [
        f"Toyland's weights {one['weights']}, config {one['config_hash']}, "
        f"commit {(made['git_commit'] or 'unknown')[:12]}"
        f"{', changed since' if made['git_dirty'] else ''}; {seconds['training'] / 60:.0f} minutes of one core in "
        f"training and {seconds['drawing'] / 60:.0f} in drawing, shared with other experiments. "
        f"All numbers: [results/{one['id']}.json](../results/{one['id']}.json).",
        "",
    ]
    return lines


def _table(series: Sequence[Mapping[str, Any]]) -> list[str]:
    settings = [setting for line in series for setting in line["settings"]]
    names = {name for setting in settings for name in setting["scores"]} & {*_SHOWN}
    kinds = ordered(names)
    lines = [_row(["", "setting", *(m.title for m in kinds)])]
    lines.append(_row(["---", "---", *["---:"] * len(kinds)]))
    for line in series:
        for setting in line["settings"]:
            cells = [_interval(setting["scores"].get(m.name)) for m in kinds]
            lines.append(_row([title(line["label"]), setting["name"], *cells]))
    return lines


def _interval(score: Mapping[str, Any] | None) -> str:
    if score is None or score["mean"] != score["mean"]:
        return "–"
    if score["low"] is None:
        return f"{score['mean']:.3f}"
    return f"{score['mean']:.3f} [{score['low']:.3f}, {score['high']:.3f}]"


def _row(cells: Sequence[str]) -> str:
    return "| " + " | ".join(map(_cell, cells)) + " |"


def _cell(text: str) -> str:
    return text.replace("|", "\\|")
