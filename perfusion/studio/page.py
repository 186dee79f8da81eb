"""The page as a whole: its tabs, how it looks, and how it is served."""

from __future__ import annotations

import signal
import threading
from html import escape
from pathlib import Path
from typing import TYPE_CHECKING, Any

import gradio as gr
from starlette.routing import Mount
from starlette.staticfiles import StaticFiles

from perfusion.config import ConfigError
from perfusion.studio import show
from perfusion.studio.compare_tab import CompareTab
from perfusion.studio.draw_tab import PIPE, DrawTab
from perfusion.studio.drawing import Drawing
from perfusion.studio.teach_tab import TeachTab
from perfusion.studio.teaching import Teaching

if TYPE_CHECKING:
    from perfusion.studio.__main__ import StudioConfig


def serve(config: StudioConfig, drawing: Drawing, teaching: Teaching) -> None:
    """Serve the page until Ctrl-C or SIGTERM. Raises ConfigError where the port is taken."""
    page = build(drawing, teaching)
    files = Mount(f"/{show.FILES}", StaticFiles(directory=drawing.root))  # and nothing else of the disk
    try:
        _, address, _ = page.launch(
            server_name=config.host,
            server_port=config.port,
            inbrowser=config.open,
            share=False,
            quiet=True,
            prevent_thread_lock=True,
            ssr_mode=False,
            footer_links=[],
            app_kwargs={"routes": [files]},
            theme=_theme(),
            css_paths=Path(__file__).with_name("style.css"),
        )
    except OSError as error:
        raise ConfigError(f"host={config.host} port={config.port}: {error}") from error
    print(f"studio: {address} (Ctrl-C ends it)", flush=True)
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        threading.Event().wait()
    finally:
        page.close(verbose=False)


def build(drawing: Drawing, teaching: Teaching) -> gr.Blocks:
    """The page, not served yet."""
    config = drawing.config
    with gr.Blocks(title="Perfusion studio", analytics_enabled=False, delete_cache=(86400, 86400)) as page:
        where = escape(f"{config.backbone or drawing.backbone.family} · {config.root}")
        gr.HTML(f'<div id="head"><h1>Perfusion studio</h1><span>{where}</span></div>')
        with gr.Tabs() as tabs:
            with gr.Tab("Teach", id="teach"):
                teach = TeachTab(teaching)
            with gr.Tab("Draw", id="draw"):
                draw = DrawTab(drawing)
            with gr.Tab("Compare", id="compare"):
                compare = CompareTab(drawing)

        def opened() -> list[Any]:
            known = [*drawing.concepts()]
            return [gr.Tabs(selected="draw" if known else "teach"), *draw.chosen(known[:1]), *compare.chosen()]

        def taught() -> list[Any]:
            assert teaching.training is not None
            return [gr.Tabs(selected="draw"), *draw.chosen([str(teaching.training.folder.concept)]), *compare.chosen()]

        outputs = [tabs, *draw.choice, *compare.choice]
        page.load(opened, None, outputs, show_progress="hidden", **PIPE).then(
            draw.draw, draw.form, draw.result, show_progress_on=draw.pictures, **PIPE
        )
        teach.use.click(taught, None, outputs, **PIPE).then(
            draw.draw, draw.form, draw.result, show_progress_on=draw.pictures, **PIPE
        )
        page.load(teach.opened, teach.form, teach.shown, show_progress="hidden")
    return page


def _theme() -> gr.themes.Base:
    """Calm labels, and the system's fonts: gradio's own would be asked of the network."""
    theme = gr.themes.Soft(
        primary_hue="violet",
        neutral_hue="slate",
        font=("system-ui", "sans-serif"),
        font_mono=("ui-monospace", "monospace"),
    )
    labels = {"background_fill": "transparent", "text_color": "*neutral_500", "text_weight": "500"}
    calm = {f"block_{kind}_{what}": value for kind in ("title", "label") for what, value in labels.items()}
    dark = {f"{key}_dark": value.replace("500", "400") for key, value in calm.items() if "weight" not in key}
    return theme.set(**calm, **dark, block_title_padding="0", body_background_fill="*neutral_50")
