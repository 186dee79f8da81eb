"""Tables for pages and papers."""

import numpy as np

from eval.aggregate import Interval, Summary
from eval.looks import looks
from eval.tables import Reported, escape, latex, markdown


def summary(method: str, beta: float | None = None, **scores: Interval) -> Summary:
    setting = {} if beta is None else {"beta": beta}
    return Summary(method, setting, ("cat", "dog"), 8, scores, {name: np.zeros(1) for name in scores})


SUMMARIES = [
    summary("perfusion", 0.4, clip_i=Interval(0.7, 0.65, 0.75), drift=Interval(0.01)),
    summary("perfusion", 0.6, clip_i=Interval(0.5, 0.45, 0.55), drift=Interval(0.02)),
    summary("my_lora|x", None, clip_i=Interval(0.7000001), clip_t=Interval(float("nan"))),
]


def test_markdown():
    assert markdown(SUMMARIES).splitlines() == [
        "| method | setting | concepts | images | CLIP-I | CLIP-T | drift ↓ |",
        "| --- | --- | ---: | ---: | ---: | ---: | ---: |",
        "| Perfusion | β 0.4 | 2 | 8 | **0.700 ± 0.050** | – | **0.010** |",
        "| Perfusion | β 0.6 | 2 | 8 | 0.500 ± 0.050 | – | 0.020 |",
        r"| my\_lora\|x | – | 2 | 8 | **0.700** | – | – |",
    ]


def test_latex():
    text = latex(SUMMARIES, "Scores & more, 50 %", "tab:x")
    assert r"\caption{Scores \& more, 50 \%}" in text and r"\label{tab:x}" in text
    assert r"\begin{tabular}{llrrrrr}" in text
    assert r"Perfusion & $\beta$ 0.4 & 2 & 8 & \textbf{0.700 $\pm$ 0.050} & -- & \textbf{0.010} \\" in text
    assert r"my\_lora|x & -- & 2 & 8 & \textbf{0.700} & -- & -- \\" in text
    assert r"drift $\downarrow$ \\" in text
    rows = [line for line in text.splitlines() if line.endswith(r"\\")]
    assert len(rows) == 4 and {line.count(" & ") for line in rows} == {6}
    order = [text.index(word) for word in (r"\toprule", "Method", r"\midrule", "my", r"\bottomrule")]
    assert order == sorted(order)


def test_what_latex_would_take_for_its_own_is_escaped():
    assert escape(r"a <cat*> {1} \x 5% #1 ~^") == (
        r"a \textless{}cat*\textgreater{} \{1\} \textbackslash{}x 5\% \#1 \textasciitilde{}\textasciicircum{}"
    )


def test_methods_keep_their_looks_in_every_company():
    alone, together = looks(["lora"]), looks(["zeta", "lora", "alpha", "perfusion"])
    assert together["lora"] == alone["lora"] and together["perfusion"].title == "Perfusion"
    many = looks([f"method {k}" for k in range(40)])
    assert len({(look.colour, look.symbol) for look in many.values()}) == 40


def test_what_others_report_stands_below_a_line_and_is_never_the_best():
    others = [Reported("dreambooth", "47 concepts", "a study", 47, {"clip_i": 0.9, "dino": 0.6})]
    lines = latex(SUMMARIES[:2], "x", reported=others).splitlines()
    rows = lines[lines.index(r"    \midrule") + 1 : lines.index(r"    \bottomrule")]
    assert rows[2:] == [
        r"    \midrule",
        r"    DreamBooth (published) & 47 concepts & 47 & -- & 0.900 & 0.600 & -- \\",
    ]
    assert r"\textbf{0.700 $\pm$ 0.050}" in rows[0] and "DINO" in "".join(lines)
