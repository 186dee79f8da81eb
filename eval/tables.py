"""Scores as tables for pages and papers: Markdown and LaTeX (booktabs)."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from eval.aggregate import Summary, labels_of
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
    """What somebody else reports of a method, measured as `setting` says: shown beside own numbers, and never marked as
    the best."""

    method: str
    setting: str
    source: str
    concepts: int
    scores: Mapping[str, float]


def markdown(summaries: Sequence[Summary]) -> str:
    """A table in GitHub's Markdown: mean and half the width of its interval, the best mean of a column in bold."""
    heads, rows = _table(summaries, "**{}**".format, _bare)
    return "\n".join(grid(["method", "setting", "concepts", "images", *heads], rows, 2)) + "\n"


def grid(head: Sequence[str], rows: Sequence[Sequence[str]], words: int) -> list[str]:
    """The lines of a table in Markdown, of cells that mean themselves there; all columns but the first `words` hold
    numbers."""
    rule = ["---"] * words + ["---:"] * (len(head) - words)
    return ["| " + " | ".join(cells) + " |" for cells in (head, rule, *rows)]


def latex(
    summaries: Sequence[Summary], caption: str, label: str = "tab:scores", reported: Sequence[Reported] = ()
) -> str:
    """The same in LaTeX, which needs the package booktabs there; what others report comes below a line."""
    heads, rows = _table(summaries, "\\textbf{{{}}}".format, escape, reported)
    head = map(escape, ["Method", "Setting", "Concepts", "Images", *heads])
    lines = ["    " + " & ".join(cells) + r" \\" for cells in (head, *rows)]
    own = 1 + len(summaries)
    lines = [
        r"\begin{table}",
        r"  \centering",
        f"  \\caption{{{escape(caption)}}}",
        f"  \\label{{{label}}}",
        f"  \\begin{{tabular}}{{ll{'r' * (2 + len(heads))}}}",
        r"    \toprule",
        lines[0],
        r"    \midrule",
        *lines[1:own],
        *([r"    \midrule", *lines[own:]] if reported else []),
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
            text = escaped(s.scores[kind.name].spelled() if kind.name in s.scores else "–")
            cells.append(bold(text) if _is_best(s, kind, summaries) else text)
        rows.append([escaped(title(s.method)), escaped(label or "–"), str(len(s.concepts)), str(s.images), *cells])
    for one in reported:
        cells = [f"{one.scores[kind.name]:.3f}" if kind.name in one.scores else escaped("–") for kind in kinds]
        said = f"{title(one.method)} (published)", one.setting, str(one.concepts), "–"
        rows.append([*map(escaped, said), *cells])
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


def _bare(text: str) -> str:
    """Text that means itself in a Markdown cell."""
    return re.sub(r"([\\|*_<>`\[\]])", r"\\\1", " ".join(text.split()))
