"""The tab that teaches: a form, one button, and what is to be seen of the training."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import gradio as gr
import numpy as np

from perfusion.studio import show
from perfusion.studio.draw_tab import command_box
from perfusion.studio.teaching import PAINTED, WHOLE, Lesson, Teaching

_PHOTOS = ["image", ".heic", ".heif", ".avif"]
_TOY = 16  # the first example: the cat of the demo
_PINK = (225, 29, 143)
_QUIET: dict[str, Any] = {"show_progress": "hidden", "trigger_mode": "always_last"}


class TeachTab:
    """From photos to a training, and what becomes of it."""

    def __init__(self, teaching: Teaching) -> None:
        self.teaching, self.toyland = teaching, bool(teaching.kinds)
        methods = teaching.methods
        self.toy, self.painted, self.canvas_of = gr.State(_TOY), gr.State({}), gr.State(0)
        self.changed = gr.State(False)  # whether the form is another one than that of the training
        with gr.Row():
            with gr.Column(scale=4, min_width=320):
                gr.HTML(show.hint("Photos of one thing" + (", or the example below" if self.toyland else "")))
                self.photos = gr.File(show_label=False, file_count="multiple", file_types=_PHOTOS, height=120)
                self.crops = gr.HTML(elem_id="crops")
                self.another = gr.Button("Another example toy", size="sm", visible=self.toyland)
                with gr.Row():
                    if self.toyland:
                        self.kind = gr.Dropdown([*teaching.kinds], value="cat", label="It is a", min_width=120)
                    else:
                        self.kind = gr.Textbox(label="It is a", placeholder="teddy bear", min_width=120)
                    self.word = gr.Textbox("<cat*>" if self.toyland else "", label="Its word in prompts", min_width=120)
                with gr.Accordion("Which part of the photos counts", open=False):
                    self.masks = gr.Radio(teaching.mask_kinds, value=WHOLE, show_label=False, container=False)
                    self.number = gr.Dropdown([], label="Photo", visible=False)
                    self.canvas = gr.ImageEditor(
                        label="Paint over the thing",
                        sources=(),
                        transforms=(),
                        layers=False,
                        buttons=[],
                        visible=False,
                        brush=gr.Brush(colors=[f"rgb{_PINK}"], color_mode="fixed"),
                        elem_id="canvas",
                    )
                with gr.Accordion("Method, steps and more", open=False):
                    with gr.Row():
                        self.method = gr.Dropdown([*methods], value=Lesson.method, label="Method", min_width=120)
                        self.steps = gr.Number(
                            methods[Lesson.method], label="Steps", precision=0, minimum=1, min_width=120
                        )
                    self.more = gr.Textbox(label="More words of the command line", placeholder="seed=1")
                self.button = gr.Button("Teach", variant="primary", size="lg", elem_id="teach")
                self.wrong = gr.HTML()
                self.command = command_box()
            with gr.Column(scale=6, min_width=320):
                self.status = gr.HTML(show.welcome(self.toyland), elem_id="status")
                self.use = gr.Button("Draw it", variant="primary", visible=False, elem_id="use")
                self.previews = gr.HTML(elem_classes="previews")
        self.timer = gr.Timer(1, active=False)
        self._pictures = [self.photos, self.toy, self.masks, self.painted, self.kind]
        self.form = [*self._pictures, self.word, self.method, self.steps, self.more]
        self._seen = [self.status, self.previews, self.button, self.use, self.timer]
        self.shown = [self.crops, self.command, *self._seen, self.changed]
        self._listen()

    def _listen(self) -> None:
        self.another.click(lambda toy: (None, toy + 1), self.toy, [self.photos, self.toy], **_QUIET)
        self.kind.input(lambda kind: f"<{'-'.join(kind.lower().split())}*>", self.kind, self.word, **_QUIET)
        self.method.input(lambda method: self.teaching.methods[method], self.method, self.steps, **_QUIET)
        self.photos.change(self._uploaded, self.photos, [self.painted, self.number], **_QUIET)
        gr.on([part.change for part in self._pictures], self._crops, self.form, self.crops, **_QUIET)
        changed = [part.change for part in self.form]
        gr.on(changed, lambda *form: (self._command(*form), True), self.form, [self.command, self.changed], **_QUIET)
        gr.on(
            [self.masks.input, self.number.change],
            self._canvas,
            [self.photos, self.masks, self.painted, self.number],
            [self.number, self.canvas],
            **_QUIET,
        )
        self.canvas.input(self._paint, [self.canvas, self.painted, self.number], self.painted, **_QUIET)
        self.button.click(self._press, [self.changed, *self.form], [*self._seen, self.wrong, self.changed])
        self.timer.tick(self._look, None, self._seen, show_progress="hidden")

    def opened(self, *form: Any) -> list[Any]:
        """What a page that is opened shows: also of a training that another one has begun."""
        return [self._crops(*form), self._command(*form), *self._look(), False]

    def _lesson(self, photos: Any, toy: int, masks: str, painted: Any, kind: str, word: str, *rest: Any) -> Lesson:
        files = tuple(map(Path, photos or ()))
        return Lesson(files, toy, masks, painted, kind or "", word or "", rest[0], rest[1], rest[2] or "")

    def _crops(self, *form: Any) -> str:
        lesson = self._lesson(*form)
        if not lesson.photos and not self.toyland:
            return ""
        try:
            return show.crops(self.teaching.crops(lesson))
        except Exception as error:
            return show.wrong(error)

    def _command(self, *form: Any) -> str:
        try:
            return self.teaching.command(self._lesson(*form))
        except ValueError as error:  # what is missing is said when the button is pressed, too
            return f"# {error}"

    def _uploaded(self, photos: list[str] | None) -> tuple[dict[str, Any], Any]:
        names = [(Path(photo).name, photo) for photo in photos or ()]
        return {}, gr.Dropdown(names, value=names[0][1] if names else None)

    def _canvas(self, photos: Any, masks: str, painted: dict[str, np.ndarray], photo: str | None) -> tuple[Any, Any]:
        """The photo that is painted on, with what was painted on it before."""
        if masks != PAINTED or photo is None or photo not in (photos or ()):
            return gr.Dropdown(visible=False), gr.ImageEditor(value=None, visible=False)
        before = painted.get(photo)
        layers = [] if before is None else [np.dstack([*(np.full_like(before, c) for c in _PINK), before])]
        canvas: Any = {"background": np.asarray(self.teaching.canvas(Path(photo))), "layers": layers, "composite": None}
        return gr.Dropdown(visible=len(photos) > 1), gr.ImageEditor(value=canvas, visible=True)

    def _paint(self, drawn: Any, painted: dict[str, np.ndarray], photo: str | None) -> dict[str, np.ndarray]:
        if photo is None or not drawn or not drawn["layers"]:
            return painted
        return {**painted, photo: np.max([layer[..., 3] for layer in drawn["layers"]], axis=0)}

    def _press(self, changed: bool, *form: Any) -> list[Any]:
        """The one button: teach, stop, go on."""
        training = self.teaching.training
        state = training.progress() if training else None
        try:
            if state and state.running:
                self.teaching.stop()
            elif state and state.state == "stopped" and not changed:
                self.teaching.start(self.teaching.lesson)
            else:
                self.teaching.start(self._lesson(*form))
        except Exception as error:
            return [*self._look(), show.wrong(error), changed]
        return [*self._look(), "", False]

    def _look(self) -> list[Any]:
        """What is to be seen of the training."""
        if self.teaching.training is None:
            return [gr.skip()] * len(self._seen)
        now = self.teaching.training.progress()
        label = "Stop" if now.running else "Go on" if now.state == "stopped" else "Teach"
        return [
            show.progress(now),
            show.previews(now, self.teaching.training.folder.samples, self.teaching.root),
            gr.Button(label, variant="stop" if now.running else "primary"),
            gr.Button(visible=now.state == "finished"),
            gr.Timer(active=now.running),
        ]
