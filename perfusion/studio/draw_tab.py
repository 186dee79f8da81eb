"""The tab that draws: concepts, a prompt, sliders, and the pictures of what these say."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import gradio as gr

from perfusion.addons import SCHEDULERS
from perfusion.concept_file import ConceptFileError
from perfusion.config import ConfigError
from perfusion.manifest import symbol
from perfusion.methods.base import available, method_class
from perfusion.studio import show
from perfusion.studio.drawing import MOST, Drawing, Request, spread, typed, values_of

NONE = "—"
PIPE: dict[str, Any] = {"concurrency_limit": 1, "concurrency_id": "pipe"}  # one drawing at a time, others queue
AGAIN: dict[str, Any] = {**PIPE, "trigger_mode": "always_last"}
_EXAMPLES = 5  # prompts


def command_box(visible: bool = True) -> gr.Code:
    """Where a command stands that does the same in a terminal."""
    label = "The same in a terminal"
    shown: dict[str, Any] = {"show_line_numbers": False, "wrap_lines": True, "buttons": ["copy"], "lines": 1}
    return gr.Code(label=label, language="shell", interactive=False, visible=visible, **shown)


class DrawTab:
    """One to three concepts, a prompt, and what their dials are set to."""

    def __init__(self, drawing: Drawing) -> None:
        self.drawing = drawing
        dials = [[dial.number for dial in method_class(name).dials] for name in available()]
        numbers, words = (MOST * max(kinds.count(number) for kinds in dials) for number in (True, False))
        self.slots = gr.State([])  # of each slider and each choice: file, dial, and its own value; or None
        with gr.Row():
            with gr.Column(scale=4, min_width=320):
                self.concepts = gr.Dropdown([], multiselect=True, max_choices=MOST, label="Concepts, one to three")
                self.prompt = gr.Textbox(label="Prompt", lines=2, elem_id="prompt")
                with gr.Row(elem_classes="chips"):
                    hidden: dict[str, Any] = {"visible": False, "size": "sm"}
                    self.words = [gr.Button(elem_classes="word", **hidden) for _ in range(MOST)]
                    self.examples = [gr.Button(**hidden) for _ in range(_EXAMPLES)]
                with gr.Row():
                    self.sliders = [gr.Slider(0, 1, step=0.01, visible=False, min_width=300) for _ in range(numbers)]
                    self.radios = [gr.Radio([], visible=False, min_width=160) for _ in range(words)]
                with gr.Row():
                    self.num = gr.Slider(1, 8, 4, step=1, label="Pictures", min_width=160)
                    self.seed = gr.Number(0, label="Seed", precision=0, min_width=100)
                with gr.Row():
                    self.base = gr.Checkbox(label="Base model beside it", min_width=160)
                    self.row = gr.Dropdown([NONE], value=NONE, label="A row over", min_width=100)
                self.values = gr.Textbox(label="Values of the row", visible=False)
                with gr.Accordion("Steps", open=False), gr.Row():
                    self.steps = gr.Slider(1, 100, drawing.steps, step=1, label="Steps", min_width=160)
                    self.scheduler = gr.Dropdown([*SCHEDULERS], value="dpm++", label="Scheduler", min_width=100)
                self.button = gr.Button("Draw", variant="primary", size="lg", elem_id="draw")
                self.add = gr.UploadButton("Add a concept file", file_types=[".safetensors"], size="sm")
            with gr.Column(scale=7, min_width=320, elem_classes="result"):
                self.pictures = gr.HTML(elem_id="pictures", elem_classes=drawing.classes, min_height=240)
                self.command = command_box(visible=False)
        self._dials = [*self.sliders, *self.radios]
        self.choice = [self.concepts, self.prompt, self.row, self.values, self.slots, *self._dials]
        self.choice += [*self.words, *self.examples]
        self.form = [self.concepts, self.prompt, self.seed, self.num, self.steps, self.scheduler]
        self.form += [self.row, self.values, self.base, self.slots, *self._dials]
        self.result = [self.pictures, self.command]
        self._listen()

    def _listen(self) -> None:
        quiet: dict[str, Any] = {"show_progress": "hidden"}
        set_ = [part.input for part in (*self._dials, self.num, self.steps, self.base)]
        set_.append(self.scheduler.select)  # a dropdown's input comes twice
        typed_in = [part.submit for part in (self.prompt, self.seed, self.values)]
        gr.on(
            [*set_, *typed_in, self.button.click],
            self.draw,
            self.form,
            self.result,
            show_progress_on=self.pictures,
            **AGAIN,
        )
        for button in self.words:
            button.click(lambda word, prompt: f"{prompt.rstrip()} {word}", [button, self.prompt], self.prompt, **quiet)
        now = [self.concepts, self.prompt, self.slots, *self._dials]
        for event in (
            *(button.click(str, button, self.prompt, **quiet) for button in self.examples),
            self.concepts.input(self.chosen, now, self.choice, **quiet, **PIPE),
            self.row.select(self._row, [self.concepts, self.row], self.values, **quiet),
            self.add.upload(self._add, [self.add, *now], self.choice, **PIPE),
        ):
            event.success(self.draw, self.form, self.result, show_progress_on=self.pictures, **AGAIN)

    def chosen(self, files: Sequence[str], prompt: str = "", slots: Sequence[Any] = (), *values: Any) -> list[Any]:
        """What the form becomes when these concepts are chosen; dials of those that were chosen before stay."""
        known = self.drawing.concepts()
        found = [known[file] for file in files if file in known]
        before = {slot[:2]: value for slot, value in zip(slots, values, strict=False) if slot}
        placeholders = [one.placeholder for one in found]
        examples = self.drawing.prompts(placeholders)[:_EXAMPLES]
        rows = dict.fromkeys(name for one in found for name in one.dials)
        return [
            gr.Dropdown([(one.label, file) for file, one in known.items()], value=[str(one.file) for one in found]),
            self.drawing.prompt_for(prompt, placeholders),
            gr.Dropdown([NONE, *rows], value=NONE),
            gr.Textbox(visible=False),
            *self._slots([str(one.file) for one in found], before),
            *(gr.Button(word, visible=True) for word in placeholders),
            *(gr.Button(visible=False) for _ in range(MOST - len(found))),
            *(gr.Button(text, visible=True) for text in examples),
        ]

    def _slots(self, files: Sequence[str], before: dict[Any, Any]) -> list[Any]:
        """Which dial each slider and choice is for, and how these look."""
        parts: list[Any] = [gr.Slider(visible=False)] * len(self.sliders) + [gr.Radio(visible=False)] * len(self.radios)
        slots: list[Any] = [None] * len(parts)
        free = {True: iter(range(len(self.sliders))), False: iter(range(len(self.sliders), len(parts)))}
        try:
            attached = self.drawing.choose(files)
        except Exception as error:
            show.wrong(error)  # drawing them will say it
            return [slots, *parts]
        for file, one in zip(files, attached, strict=True):
            for name, dial in one.concept.dials.items():
                own = one.dials[name]
                if not dial.number and own not in dial.words:
                    continue
                k, value = next(free[dial.number]), before.get((file, name), own)
                shown: dict[str, Any] = {"label": f"{symbol(name)} of {one.concept.placeholder}", "info": dial.about}
                slots[k] = (file, name, own)
                if dial.number:
                    low, high = min(dial.between[0], own), max(dial.between[1], own)
                    parts[k] = gr.Slider(low, high, value, visible=True, **shown)
                else:
                    parts[k] = gr.Radio([*dial.words], value=value, visible=True, **shown)
        return [slots, *parts]

    def _row(self, files: Sequence[str], row: str) -> Any:
        known = self.drawing.concepts()
        dials = [known[file].dials[row] for file in files if file in known and row in known[file].dials]
        return gr.Textbox(typed(spread(dials[0])), visible=True) if dials else gr.Textbox(visible=False)

    def _add(self, uploaded: str, files: Sequence[str], *now: Any) -> list[Any]:
        try:
            file = self.drawing.add(Path(uploaded))
        except ConceptFileError as error:
            raise gr.Error(str(error), print_exception=False) from error
        return self.chosen([*files, file][-MOST:], *now)

    def request(self, files: Sequence[str], prompt: str, seed: Any, num: int, steps: int, *rest: Any) -> Request:
        """What the form asks for. Raises ConfigError."""
        scheduler, row, values, base, slots, *set_to = rest
        known = self.drawing.concepts()
        if missing := [file for file in files if file not in known]:
            raise ConfigError(f"{missing[0]}: no concept of this backbone is there any more")
        dial = next((known[file].dials[row] for file in files if row in known[file].dials), None)
        over = (row, tuple(values_of(dial, values))) if dial else ("", ())
        dials: dict[str, dict[str, Any]] = {file: {} for file in files}
        for slot, value in zip(slots, set_to, strict=False):
            if slot and slot[0] in dials and value != slot[2]:
                dials[slot[0]][slot[1]] = value
        own = tuple(dials.values())
        return Request(tuple(files), prompt, own, int(seed or 0), int(num), int(steps), scheduler, *over, base)

    def draw(self, *form: Any) -> Iterator[tuple[Any, Any]]:
        """The pictures so far, and the command."""
        try:
            request = self.request(*form)
            command = self.drawing.command(request)
            for rows in self.drawing.draw(request):
                yield show.sheet(rows, self.drawing.root), gr.Code(command, visible=bool(command))
        except Exception as error:
            yield show.wrong(error), gr.Code(visible=False)
