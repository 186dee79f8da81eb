"""`docs/results.md`: all results as one page, made from the files in `results/` and nothing else."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from eval.measures import BY_NAME, ordered

IMAGES = "images/results"  # beside the page
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
  the same prompts with the superclass's word. No method can be expected to do better. Nothing here says how large an
  effect is on Stable Diffusion.
- Identity and prompt accuracy are read by a small classifier, which errs as well
  ([model card](../perfusion/toyland/weights/README.md)), for all methods alike.
- Intervals come from few concepts. A bootstrap over few of them is somewhat too narrow.
- Trained were all methods on the same pictures, with the settings of `conf/method/<method>_toyland.yaml`;
  [experiments.md](experiments.md) says where those come from.
"""


def page(results: Sequence[Mapping[str, Any]]) -> str:
    """The page, in Markdown."""
    lines = [_HEAD, "| | claim | verdict | number |", "|---|---|---|---|"]
    for one in results:
        lines.append(f"| [{one['id']}](#{one['id']}) | {one['claim']} | **{one['verdict']}** | {_cell(one['key'])} |")
    lines += [_CAVEATS, *_several_weights(results), *_protocol(results)]
    for one in results:
        lines += _section(one)
    return "\n".join(lines).rstrip() + "\n"


def _several_weights(results: Sequence[Mapping[str, Any]]) -> list[str]:
    if len({one["weights"] for one in results}) == 1:
        return []
    made = "; ".join(f"{one['id']} with {one['weights']}" for one in results)
    return [f"- **Not all of this was made with the same weights of Toyland**: {made}.", ""]


def _protocol(results: Sequence[Mapping[str, Any]]) -> list[str]:
    shown = max(
        (one for one in results if one["series"]), key=lambda one: len(one["protocol"]["prompts"]), default=None
    )
    if shown is None:
        return []
    protocol = shown["protocol"]
    toys = ", ".join(
        f"{toy['name']} ({toy['body']}, {toy['pattern']} {toy['second']}, {toy['detail']})"
        for toy in protocol["concepts"]
    )
    prompts = "; ".join(f"*{alternatives[0]}*" for alternatives in protocol["prompts"])
    return [
        "## What was drawn",
        "",
        f"{len(protocol['concepts'])} concepts, {len(protocol['prompts'])} prompts and {len(protocol['seeds'])} seeds "
        f"for every setting; {protocol['steps']} DDIM steps, guidance {protocol['guidance']:g}.",
        "",
        f"Concepts, with the seeds of their looks: {toys}.",
        "",
        f"Prompts: {prompts}. Where a concept and a prompt make a pair that Toyland's training left out, another "
        "prompt of the same kind stands in its place.",
        "",
    ]


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
        lines += [f"![Identity and prompt accuracy]({IMAGES}/{one['id']}.png)", ""]
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
    measures = ordered(names)
    lines = [_row(["", "setting", *(BY_NAME[m.name].title for m in measures)])]
    lines.append(_row(["---", "---", *["---:"] * len(measures)]))
    for line in series:
        for setting in line["settings"]:
            cells = [_interval(setting["scores"].get(m.name)) for m in measures]
            lines.append(_row([_title(line["label"]), setting["name"], *cells]))
    return lines


def _title(label: str) -> str:
    from eval.looks import title

    return title(label)


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
