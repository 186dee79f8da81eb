"""What an experiment found: `results/<id>.json`, with everything that it was found with, and `docs/results.md`, a page
with figures that is made from these files and nothing else.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from PIL import Image

from eval.aggregate import Summary, as_json
from eval.front import fronts
from eval.looks import title
from eval.score_kinds import BY_NAME, ordered, score_kind
from eval.tables import Reported, grid, latex
from experiments.evidence import Evidence, Experiment, Finding
from experiments.world import PHOTOS, TOYLAND, World
from perfusion.config import ConfigError
from perfusion.files import atomic_path, atomic_write_text

VERSION = 1
PAGES = Path(__file__).with_name("pages")  # what pages say before and between their tables, for each kind of world
PAPER = "Tewel et al. 2023 (arXiv 2305.01644)"
IMAGES = "images/results"  # beside the page
_WIDTH = 900  # pixels of a figure on the page
_MANY = 1000  # concepts, above which it is not said how many would decide something
_COLOURS = 256
Results = Sequence[Mapping[str, Any]]  # contents of files
_SHOWN = ("identity", "prompt", "superclass", "clip_i", "clip_t", "dino", "diversity")
_OWNER = {TOYLAND: "Toyland's", PHOTOS: "The model's"}


class Unfinished(Exception):
    """An experiment of which something is missing."""


def settle(experiment: Experiment, evidence: Evidence, out: Path) -> str:
    """Judge an experiment and write its files below `out`, its figures and the page anew; gives its verdict in a line.
    Raises Unfinished: not all of it is there."""
    runner, world = evidence.runner, evidence.world
    wanted = experiment.wanted(world)
    missing = sum(one not in runner.points for one in wanted)
    if missing or not runner.trained(experiment.trainings):
        raise Unfinished(f"{missing} of {len(wanted)} sets of pictures are missing")
    finding = experiment.judge(evidence)
    content = document(experiment, finding, evidence)
    for folder in (out / "results", out / "docs" / IMAGES, runner.root / "figures"):
        folder.mkdir(parents=True, exist_ok=True)
    if experiment.series:
        _draw(experiment, evidence, runner.root / "figures", out / "docs" / IMAGES)
    text = json.dumps(content, indent=1, ensure_ascii=False) + "\n"
    atomic_write_text(out / "results" / f"{experiment.id}.json", text)
    atomic_write_text(out / "docs" / "results.md", page(read_all(out / "results")))
    if experiment.series and world.tables:
        atomic_write_text(out / "results" / f"{experiment.id}.tex", _latex(experiment, evidence))
    return f"{experiment.id}: {finding.verdict.value} ({finding.key})"


def document(experiment: Experiment, finding: Finding, evidence: Evidence) -> dict[str, Any]:
    """The file's content, in JSON values. `notes` were written by people, `verdict` follows from `checks` alone."""
    world = evidence.world
    drawn = {
        "groups": len(evidence.groups),
        "concepts": [one.about() for one in evidence.subjects],
        "prompts": world.listed_prompts(experiment.pairs),
        "seeds": list(world.seeds_of(experiment.times(world))),
        "scheduler": world.scheduler,
        "steps": world.steps,
        "guidance": world.guidance,
    }
    runs = {t.label: [run.path.name for run in evidence.runs(t)] for t in experiment.trained(world)}
    test = world.said(experiment.test)
    digest = hashlib.sha256(json.dumps([runs, drawn, test], sort_keys=True).encode())
    caveats = " ".join(filter(None, [experiment.caveats, experiment.of_toys if world.kind == TOYLAND else ""]))
    return {
        "version": VERSION,
        "world": world.kind,
        "id": experiment.id,
        "place": experiment.place,
        "claim": world.said(experiment.claim),
        "source": f"{PAPER}: {experiment.source}" if experiment.of_paper else experiment.source,
        "verdict": finding.verdict.value,
        "key": finding.key,
        "test": test,
        "checks": [
            {
                "what": check.what,
                **{k: None if v is None or v != v else round(v, 6) for k, v in asdict(check.value).items()},
                "expected": f"{'above' if check.above else 'below'} {check.threshold:g}",
                "decides": check.decides,
                "verdict": check.verdict.value,
            }
            for check in finding.checks
        ],
        "series": [
            {"label": world.said(one.label), "settings": [_scores(evidence.summary(s), s.name) for s in one.settings]}
            for one in experiment.series
        ],
        "published": [asdict(one) for one in _published(experiment, world)],
        "tables": [asdict(table) for table in finding.tables],
        "axes": list(experiment.axes(world)),
        "caveats": world.said(caveats),
        "notes": experiment.notes,
        "protocol": drawn,
        "bootstrap": asdict(evidence.bootstrap),
        "runs": runs,
        "weights": evidence.runner.weights,
        "config_hash": digest.hexdigest()[:12],
        "seconds": _seconds(experiment, evidence),
        "provenance": evidence.runner.made_with,
    }


def _published(experiment: Experiment, world: World) -> tuple[Reported, ...]:
    """What others report, beside an experiment that compares methods."""
    presets = {s.training.preset for s in experiment.settings if s.training is not None}
    return world.published if len(presets) > 1 and not experiment.pairs else ()


def _latex(experiment: Experiment, evidence: Evidence) -> str:
    """The scores as a table, with what others report below a line."""
    published = _published(experiment, evidence.world)
    kept = [
        replace(s, scores={name: value for name, value in s.scores.items() if name in _SHOWN})
        for s in _summaries(experiment, evidence)
    ]
    sources = (f"Published: {source}." for source in dict.fromkeys(one.source for one in published))
    caption = " ".join([evidence.world.said(experiment.claim), *sources])
    return latex(kept, caption, f"tab:{experiment.id}", published)


def read_all(folder: Path) -> list[dict[str, Any]]:
    """All files of a folder, in the order of the experiments. Raises ConfigError: one that cannot be read."""
    found = []
    for path in folder.glob("*.json"):
        try:
            content = json.loads(path.read_text(encoding="utf-8"))
            assert content["version"] == VERSION and content["weights"]
        except (OSError, ValueError, KeyError, TypeError, AssertionError) as error:
            raise ConfigError(f"{path}: no result of this version ({error}); remove it to have it made anew") from error
        found.append(content)
    return sorted(found, key=lambda content: content["place"])


def check_world(found: Results, world: World) -> None:
    """Hold that results are of this world: one page shows one. Raises ConfigError."""
    if found and (kind := world_of(found)) != world.kind:
        raise ConfigError(f"out: found results of world={kind} there, expected none, or those of {world.kind}")


def _draw(experiment: Experiment, evidence: Evidence, folder: Path, images: Path) -> None:
    """Write the figures as PNG and SVG into `folder`, and small PNG files into `images`."""
    from eval.figures import draw_fronts, save_figure  # matplotlib, which takes long to import

    summaries = _summaries(experiment, evidence)
    scores = {name for summary in summaries for name in summary.scores}
    for end, (right, up) in _figures(experiment.axes(evidence.world), scores).items():
        name = f"{experiment.id}{end}"
        x, y = score_kind(right, "x"), score_kind(up, "y")
        save_figure(draw_fronts(fronts(summaries, x, y, (0.0, 0.0), evidence.bootstrap.level), x, y), folder / name)
        shrink(folder / f"{name}.png", images / f"{name}.png")


def shrink(figure: Path, to: Path) -> None:
    """Write a figure as a small PNG file, in which the colours of methods stay apart."""
    with Image.open(figure) as image:
        image.thumbnail((_WIDTH, _WIDTH), Image.Resampling.LANCZOS)
        small = image.convert("RGB").quantize(_COLOURS, Image.Quantize.MAXCOVERAGE)  # others mix rare colours
    with atomic_path(to) as file:
        small.save(file, "PNG", optimize=True)


def _figures(axes: Sequence[str], scores: Iterable[str]) -> dict[str, tuple[str, str]]:
    """What figures are called behind the experiment's id, and their scores: to the right and up."""
    right, up = axes
    clip = ("clip_t", "clip_i")
    found = {"": (right, up)} | ({"-clip": clip} if (right, up) != clip else {})
    return found | ({"-dino": ("clip_t", "dino")} if "dino" in scores else {})


def _summaries(experiment: Experiment, evidence: Evidence) -> list[Summary]:
    said = evidence.world.said
    return [evidence.summary(s, said(one.label)) for one in experiment.series for s in one.settings]


def _scores(summary: Summary, name: str) -> dict[str, Any]:
    said = {"name": name, "setting": dict(summary.setting), "concepts": len(summary.concepts), "images": summary.images}
    return {**said, "scores": as_json(summary.scores)}


def _seconds(experiment: Experiment, evidence: Evidence) -> dict[str, float]:
    """Of one core, what other experiments use as well included."""
    drawing = sum(evidence.runner.seconds(one) for one in experiment.wanted(evidence.world))
    training = sum(seconds for one in experiment.trained(evidence.world) for seconds in evidence.training_seconds(one))
    return {"training": round(training, 1), "drawing": round(drawing, 1)}


# --- the page ---------------------------------------------------------------------------------------------------------


def page(results: Results) -> str:
    """The page, in Markdown."""
    claims = ["| | claim | verdict | number |", "|---|---|---|---|"]
    for one in results:
        claims.append(f"| [{one['id']}](#{one['id']}) | {one['claim']} | **{one['verdict']}** | {_cell(one['key'])} |")
    lines = [*_several_weights(results), *_several_settings(results), *_protocol(results)]
    for one in results:
        lines += _section(one)
    text = (PAGES / f"{world_of(results)}.md").read_text(encoding="utf-8")
    return text.replace("{claims}", "\n".join(claims)).replace("{results}", "\n".join(lines).rstrip())


def world_of(results: Results) -> str:
    """The kind of world that results are of; those of former versions are of Toyland."""
    return next((one["world"] for one in results if "world" in one), TOYLAND)


def _several_weights(results: Results) -> list[str]:
    if len({one["weights"] for one in results}) == 1:
        return []
    made = "; ".join(f"{one['id']} with {one['weights']}" for one in results)
    of = " of Toyland" if world_of(results) == TOYLAND else ""
    return [f"- **Not all of this was made with the same weights{of}**: {made}.", ""]


def _several_settings(results: Results) -> list[str]:
    """Where one method was trained in two ways, as when a preset was changed between two calls."""
    runs: dict[str, set[tuple[str, ...]]] = {}
    for one in results:
        for label, folders in one["runs"].items():
            runs.setdefault(label, set()).add(tuple(folders))
    several = ", ".join(label for label, found in runs.items() if len({*map(len, found)}) < len(found))
    return [f"- **Not all of this was made with the same settings** of {several}.", ""] if several else []


def _protocol(results: Results) -> list[str]:
    drawn = [one for one in results if one["series"]]
    if not drawn:
        return []
    protocol = max((one["protocol"] for one in drawn), key=lambda protocol: len(protocol["prompts"]))
    if world_of(results) == TOYLAND:
        looks = "{name} ({body}, {pattern} {second}, {detail})"
        concepts, in_all = "Concepts, with the seeds of their looks", ""
        suited = (
            ". Where a concept and a prompt make a pair that Toyland's training left out, another prompt of the same "
            "kind stands in its place."
        )
    else:
        looks, concepts, suited = "{name} ({superclass})", "Concepts", "."
        in_all = " in all, of which each concept has those of its class,"
    counts = {one["id"]: len(one["protocol"]["seeds"]) for one in drawn}
    seeds = min(counts.values())
    more = ", ".join(f"{name} {count}" for name, count in counts.items() if count > seeds)
    lines = [
        "## What was drawn",
        f"{len(protocol['concepts'])} concepts, {len(protocol['prompts'])} prompts{in_all} and "
        f"{seeds} seed{'s' if seeds > 1 else ''} for every setting{f' (of {more})' if more else ''}; "
        f"{protocol['steps']} {protocol.get('scheduler', 'DDIM')} steps, guidance {protocol['guidance']:g}.",
        f"{concepts}: {', '.join(looks.format(**one) for one in protocol['concepts'])}.",
        f"Prompts: {_prompts(protocol)}{suited}",
    ]
    for one in drawn:
        if one["protocol"]["prompts"] != protocol["prompts"]:
            groups = f"{one['protocol']['groups']} pairs, and other prompts"
            lines.append(f"{one['id']}: {groups}: {_prompts(one['protocol'])}.")
    return [text for line in lines for text in (line, "")]


def _prompts(protocol: Mapping[str, Any]) -> str:
    return "; ".join(f"*{alternatives[0]}*" for alternatives in protocol["prompts"])


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
    lines += ["", *_undecided(one)]
    if one["series"]:
        scores = {name for line in one["series"] for setting in line["settings"] for name in setting["scores"]}
        for end, axes in _figures(one["axes"], scores).items():
            right, up = (BY_NAME[name].title for name in axes)
            said = "CLIP-I and CLIP-T" if end == "-clip" else f"{up[:1].upper()}{up[1:]} over {right}"
            lines += [f"![{said}]({IMAGES}/{one['id']}{end}.png)", ""]
        lines += [*_table(one), ""]
    for table in one["tables"]:
        lines += [f"{table['title']}:", "", *_grid(table["head"], table["rows"], len(table["head"])), ""]
    for key in ("caveats", "notes"):
        lines += [f"{key.capitalize()}: {one[key]}", ""] if one[key] else []
    seconds, core = one["seconds"], " of one core" if world_of([one]) == TOYLAND else ""
    lines += [
        f"{_OWNER[world_of([one])]} weights {one['weights']}, config {one['config_hash']}, "
        f"commit {(made['git_commit'] or 'unknown')[:12]}"
        f"{', changed since' if made['git_dirty'] else ''}; {seconds['training'] / 60:.0f} minutes{core} in "
        f"training and {seconds['drawing'] / 60:.0f} in drawing, shared with other experiments. "
        f"All numbers: [results/{one['id']}.json](../results/{one['id']}.json).",
        "",
    ]
    return lines


def _undecided(one: Mapping[str, Any]) -> list[str]:
    """How many concepts would decide what is not: an interval's width falls with the root of their number."""
    groups = one["protocol"]["groups"]
    things = "concepts" if groups == len(one["protocol"]["concepts"]) else "pairs"
    lines = []
    for check in one["checks"]:
        if check["decides"] and check["verdict"] == "undecided" and check["low"] is not None:
            half = (check["high"] - check["low"]) / 2
            gap = abs(check["mean"] - float(check["expected"].split()[-1]))
            times = (half / gap) ** 2 if gap else math.inf
            count = f"about {math.ceil(groups * times):,}" if groups * times <= _MANY else f"more than {_MANY:,}"
            lines.append(
                f"Not decided by {groups} {things}: {check['what']}. If it is what was measured, {count} would decide "
                f"it; these decide what is {half:.3f} or more away."
            )
    return [text for line in lines for text in (line, "")]


def _table(one: Mapping[str, Any]) -> list[str]:
    settings = [setting for line in one["series"] for setting in line["settings"]]
    published = one.get("published", [])
    names = {name for setting in settings for name in setting["scores"]} & {*_SHOWN}
    kinds = ordered(names | {name for row in published for name in row["scores"]})
    rows = [
        [title(line["label"]), setting["name"], *(_interval(setting["scores"].get(kind.name)) for kind in kinds)]
        for line in one["series"]
        for setting in line["settings"]
    ]
    for row in published:
        cells = [f"{row['scores'][kind.name]:.3f}" if kind.name in row["scores"] else "–" for kind in kinds]
        rows.append([f"{title(row['method'])}, published", f"{row['setting']} ({row['source']})", *cells])
    return _grid(["", "setting", *(kind.title for kind in kinds)], rows, 2)


def _interval(score: Mapping[str, Any] | None) -> str:
    if score is None or score["mean"] != score["mean"]:
        return "–"
    if score["low"] is None:
        return f"{score['mean']:.3f}"
    return f"{score['mean']:.3f} [{score['low']:.3f}, {score['high']:.3f}]"


def _grid(head: Sequence[str], rows: Sequence[Sequence[str]], words: int) -> list[str]:
    return grid([_cell(text) for text in head], [[_cell(text) for text in row] for row in rows], words)


def _cell(text: str) -> str:
    return text.replace("|", "\\|")
