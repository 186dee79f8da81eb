"""Scores as tables for pages and papers: Markdown and LaTeX (booktabs)."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

from eval.aggregate import Interval, Summary
from eval.looks import title
from eval.record import setting_labels
from eval.score_kinds import ScoreKind, ordered

_LATEX = {
    "\\": r"\textbackslash{}", "&": r"\&", "%": r"\%", "$": r"\$", "#": r"\#", "_": r"\_", "{": r"\{", "}": r"\}",
    "~": r"\textasciitilde{}", "^": r"\textasciicircum{}", "<": r"\textless{}", ">": r"\textgreater{}",
    "β": r"$\beta$", "τ": r"$\tau$", "−": "$-$", "±": r"$\pm$", "·": r"$\cdot$", "×": r"$\times$",
}  # fmt: skip


@dataclass(frozen=True)
class Row:
    """One line of a table."""

    method: str  # for people
    setting: str  # "" where the method has one setting only
    concepts: int
    images: int
    scores: tuple[Interval | None, ...]


@dataclass(frozen=True)
class Table:
    """Kinds of scores, one a column, and rows; the best mean of a column is set in bold."""

    kinds: tuple[ScoreKind, ...]
    rows: tuple[Row, ...]

    def is_best(self, row: Row, column: int) -> bool:
        """Whether the row's score is the best of its column, as far as the table's three decimals show."""
        means = [round(s.mean, 3) for r in self.rows if (s := r.scores[column]) is not None and s.mean == s.mean]
        score = row.scores[column]
        if score is None or len(means) < 2:
            return False
        return round(score.mean, 3) == (max if self.kinds[column].higher else min)(means)


def table_of(summaries: Sequence[Summary]) -> Table:
    """One row for each summary, in its order, and a column for every kind of score that one of them has."""
    kinds = ordered({name for summary in summaries for name in summary.scores})
    labels = labels_of(summaries)
    rows = [
        Row(title(s.method), label, len(s.concepts), s.images, tuple(s.scores.get(m.name) for m in kinds))
        for s, label in zip(summaries, labels, strict=True)
    ]
    return Table(tuple(kinds), tuple(rows))


def labels_of(summaries: Sequence[Summary]) -> list[str]:
    """What to call each summary's setting among those of its method."""
    labels: dict[int, str] = {}
    for method in dict.fromkeys(s.method for s in summaries):
        mine = [i for i, s in enumerate(summaries) if s.method == method]
        labels |= zip(mine, setting_labels([summaries[i].setting for i in mine]), strict=True)
    return [labels[i] for i in range(len(summaries))]


def markdown(table: Table) -> str:
    """A table in GitHub's Markdown: mean and half the width of its interval."""
    heads = ["method", "setting", "concepts", "images", *(_titled(m) for m in table.kinds)]
    lines = [_line(heads), _line(["---", "---", *["---:"] * (len(heads) - 2)])]
    for row in table.rows:
        cells = []
        for k, score in enumerate(row.scores):
            text = _mean_and_half(score)
            cells.append(f"**{text}**" if table.is_best(row, k) else text)
        lines.append(_line([_bare(row.method), _bare(row.setting) or "–", str(row.concepts), str(row.images), *cells]))
    return "\n".join(lines) + "\n"


def latex(table: Table, caption: str, label: str = "tab:scores") -> str:
    """A table in LaTeX, which needs the package booktabs there."""
    heads = ["Method", "Setting", "Concepts", "Images", *(_titled(m) for m in table.kinds)]
    lines = [
        r"\begin{table}",
        r"  \centering",
        f"  \\caption{{{escape(caption)}}}",
        f"  \\label{{{label}}}",
        f"  \\begin{{tabular}}{{ll{'r' * (len(heads) - 2)}}}",
        r"    \toprule",
        "    " + " & ".join(map(_arrows, map(escape, heads))) + r" \\",
        r"    \midrule",
    ]
    for row in table.rows:
        cells = []
        for k, score in enumerate(row.scores):
            text = _arrows(escape(_mean_and_half(score)))
            cells.append(f"\\textbf{{{text}}}" if table.is_best(row, k) else text)
        words = [escape(row.method), escape(row.setting) or "--", str(row.concepts), str(row.images)]
        lines.append("    " + " & ".join([*words, *cells]) + r" \\")
    lines += [r"    \bottomrule", r"  \end{tabular}", r"\end{table}"]
    return "\n".join(lines) + "\n"


def escape(text: str) -> str:
    """Text that means itself in LaTeX."""
    return "".join(_LATEX.get(letter, letter) for letter in text)


def _arrows(text: str) -> str:
    return text.replace("↓", r"$\downarrow$").replace("–", "--")


def _titled(kind: ScoreKind) -> str:
    return kind.title if kind.higher else f"{kind.title} ↓"


def _mean_and_half(score: Interval | None) -> str:
    if score is None or score.mean != score.mean:
        return "–"
    if score.low is None or score.high is None:
        return f"{score.mean:.3f}"
    return f"{score.mean:.3f} ± {(score.high - score.low) / 2:.3f}"


def _bare(text: str) -> str:
    """Text that means itself in a Markdown cell."""
    return re.sub(r"([\\|*_<>`\[\]])", r"\\\1", text)


def _line(cells: Sequence[str]) -> str:
    return "| " + " | ".join(cells) + " |"
