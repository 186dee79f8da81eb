"""Scores as tables for pages and papers: Markdown and LaTeX (booktabs)."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from eval.aggregate import Interval, Summary, labels_of
from eval.looks import title
from eval.score_kinds import ScoreKind, ordered

_LATEX = {
    "\\": r"\textbackslash{}", "&": r"\&", "%": r"\%", "$": r"\$", "#": r"\#", "_": r"\_", "{": r"\{", "}": r"\}",
    "~": r"\textasciitilde{}", "^": r"\textasciicircum{}", "<": r"\textless{}", ">": r"\textgreater{}",
    "β": r"$\beta$", "τ": r"$\tau$", "−": "$-$", "±": r"$\pm$", "·": r"$\cdot$", "×": r"$\times$",
    "↓": r"$\downarrow$", "–": "--",
}  # fmt: skip


@dataclass(frozen=True)
class Reported:
    """A row of numbers that others report, which are never marked as the best."""

    method: str
    setting: str
    concepts: int
    scores: Mapping[str, float]


def markdown(summaries: Sequence[Summary]) -> str:
    """A table in GitHub's Markdown: mean and half the width of its interval, the best mean of a column in bold."""
    heads, rows = _table(summaries, "**{}**".format, _bare)
    lines = [_line(["method", "setting", "concepts", "images", *heads])]
    lines.append(_line(["---", "---", *["---:"] * (2 + len(heads))]))
    return "\n".join([*lines, *map(_line, rows)]) + "\n"


def latex(
    summaries: Sequence[Summary], caption: str, label: str = "tab:scores", reported: Sequence[Reported] = ()
) -> str:
    """The same in LaTeX, which needs the package booktabs there; what others report comes below a line."""
    heads, rows = _table(summaries, "\\textbf{{{}}}".format, escape, reported)
    below = [r"    \midrule"] if reported else []
    heads = ["Method", "Setting", "Concepts", "Images", *heads]
    lines = [
        r"\begin{table}",
        r"  \centering",
        f"  \\caption{{{escape(caption)}}}",
        f"  \\label{{{label}}}",
        f"  \\begin{{tabular}}{{ll{'r' * (len(heads) - 2)}}}",
        r"    \toprule",
        "    " + " & ".join(map(escape, heads)) + r" \\",
        r"    \midrule",
        *("    " + " & ".join(row) + r" \\" for row in rows[: len(summaries)]),
        *below,
        *("    " + " & ".join(row) + r" \\" for row in rows[len(summaries) :]),
        r"    \bottomrule",
        r"  \end{tabular}",
        r"\end{table}",
    ]
    return "\n".join(lines) + "\n"


def _table(
    summaries: Sequence[Summary],
    bold: Callable[[str], str],
    escaped: Callable[[str], str],
    reported: Sequence[Reported] = (),
) -> tuple[list[str], list[list[str]]]:
    """The heads of the columns of scores, one for every kind that some row has; and the rows."""
    kinds = ordered({name for one in (*summaries, *reported) for name in one.scores})
    rows = []
    for s, label in zip(summaries, labels_of(summaries), strict=True):
        cells = []
        for kind in kinds:
            text = escaped(_mean_and_half(s.scores.get(kind.name)))
            cells.append(bold(text) if _is_best(s, kind, summaries) else text)
        rows.append([escaped(title(s.method)), escaped(label or "–"), str(len(s.concepts)), str(s.images), *cells])
    for one in reported:
        cells = [f"{one.scores[kind.name]:.3f}" if kind.name in one.scores else escaped("–") for kind in kinds]
        rows.append([escaped(one.method), escaped(one.setting), str(one.concepts), escaped("–"), *cells])
    return [kind.title if kind.higher else f"{kind.title} ↓" for kind in kinds], rows


def _is_best(one: Summary, kind: ScoreKind, summaries: Sequence[Summary]) -> bool:
    """Whether a score is the best of several, as far as the table's three decimals show."""
    found = [s.scores[kind.name].mean for s in summaries if kind.name in s.scores]
    means = [round(mean, 3) for mean in found if mean == mean]
    if kind.name not in one.scores or len(means) < 2:
        return False
    return round(one.scores[kind.name].mean, 3) == (max if kind.higher else min)(means)


def escape(text: str) -> str:
    """Text that means itself in LaTeX."""
    return "".join(_LATEX.get(letter, letter) for letter in text)


def _mean_and_half(score: Interval | None) -> str:
    if score is None or score.mean != score.mean:
        return "–"
    if score.low is None or score.high is None:
        return f"{score.mean:.3f}"
    return f"{score.mean:.3f} ± {(score.high - score.low) / 2:.3f}"


def _bare(text: str) -> str:
    """Text that means itself in a Markdown cell."""
    return re.sub(r"([\\|*_<>`\[\]])", r"\\\1", " ".join(text.split()))


def _line(cells: Sequence[str]) -> str:
    return "| " + " | ".join(cells) + " |"
