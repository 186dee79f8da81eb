"""The tab that compares: a grid over two dials of a concept, or of two concepts side by side, with scores."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import gradio as gr

from perfusion.config import ConfigError
from perfusion.data.prompts import replace_placeholder
from perfusion.studio import show
from perfusion.studio.draw_tab import AGAIN, NONE
from perfusion.studio.drawing import Drawing, Request, Row, spread, typed, values_of

_COLUMNS, _ROWS = 5, 3  # values to begin with


class CompareTab:
    """One concept over two of its dials, or two of them side by side."""

    def __init__(self, drawing: Drawing) -> None:
        self.drawing = drawing
        with gr.Row():
            with gr.Column(scale=4, min_width=320):
                self.one = gr.Dropdown([], label="Concept")
                self.other = gr.Dropdown([NONE], value=NONE, label="Beside it")
                self.prompt = gr.Textbox(label="Prompt", lines=2)
                with gr.Row():
                    self.columns = gr.Dropdown([NONE], label="Columns", min_width=90)
                    self.across = gr.Textbox(label="Values", min_width=180)
                with gr.Row():
                    self.rows = gr.Dropdown([NONE], label="Rows", min_width=90)
                    self.down = gr.Textbox(label="Values", min_width=180)
                with gr.Row():
                    self.seed = gr.Number(0, label="Seed", precision=0, min_width=90)
                    scored = drawing.backbone.family == "toyland" or drawing.config.scorer is not None
                    self.scored = gr.Checkbox(scored, label="Scores", min_width=180)
                self.button = gr.Button("Compare", variant="primary", size="lg", elem_id="compare")
                self.reports = gr.HTML()
            with gr.Column(scale=7, min_width=320, elem_classes="result"):
                text = "Every picture is drawn from the same noise, so they differ by the dials alone."
                self.result = gr.HTML(show.hint(text), elem_id="grids", elem_classes=drawing.classes, min_height=240)
        self.choice = [self.one, self.other, self.prompt, self.columns, self.across, self.rows, self.down, self.reports]
        self.one.input(self.chosen, [self.one, self.prompt], self.choice, show_progress="hidden")
        for dial, values in ((self.columns, self.across), (self.rows, self.down)):
            dial.input(self._values, [self.one, dial], values, show_progress="hidden")
        form = [self.one, self.other, self.prompt, self.columns, self.across, self.rows, self.down]
        form += [self.seed, self.scored]
        gr.on([self.button.click, self.prompt.submit], self.compare, form, self.result, **AGAIN)

    def chosen(self, file: str | None = None, prompt: str = "") -> list[Any]:
        """What the form becomes when this concept is chosen; None: the newest."""
        known = self.drawing.concepts()
        file = file if file in known else next(iter(known), None)
        one = known[file] if file else None
        dials = [*one.dials] if one else []
        columns, rows = [*dials, NONE, NONE][:2]
        choices = [(found.label, path) for path, found in known.items()]
        return [
            gr.Dropdown(choices, value=file),
            gr.Dropdown([NONE, *choices]),
            self.drawing.prompt_for(prompt, [one.placeholder] if one else []),
            gr.Dropdown([*dials, NONE], value=columns),
            self._values(file, columns),
            gr.Dropdown([*dials, NONE], value=rows),
            self._values(file, rows, _ROWS),
            show.reports(self.drawing.root),
        ]

    def _values(self, file: str | None, name: str, count: int = _COLUMNS) -> str:
        known = self.drawing.concepts()
        dial = known[file].dials.get(name) if file in known else None
        return typed(spread(dial, count)) if dial else ""

    def compare(self, one: str | None, other: str, prompt: str, *rest: Any) -> Iterator[str]:
        """The grids so far."""
        columns, across, rows, down, seed, scored = rest
        known = self.drawing.concepts()
        grids: list[tuple[str, list[Row]]] = []
        try:
            if one not in known:
                raise ConfigError("concept: none is there yet, teach one first")
            dials = known[one].dials
            along = [
                values_of(dials[name], text) if name in dials else []
                for name, text in ((columns, across), (rows, down))
            ]
            for file in [one, *([other] if other in known else [])]:
                grids.append((known[file].label, []))
                asked = replace_placeholder(prompt, known[one].placeholder, known[file].placeholder)
                request = Request((file,), asked, seed=int(seed or 0), num=1, steps=self.drawing.steps)
                for found in self.drawing.compare(request, columns, along[0], rows, along[1], scored):
                    grids[-1] = (known[file].label, found)
                    yield show.grids(grids, self.drawing.root)
        except Exception as error:
            yield show.grids([grid for grid in grids if grid[1]], self.drawing.root) + show.wrong(error)
