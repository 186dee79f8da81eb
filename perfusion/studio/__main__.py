"""`python -m perfusion.studio`: teach and draw concepts in the browser. `--help` says how it is used."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from perfusion.cli import parse_key_values, run_cli
from perfusion.config import ConceptConfig, ConfigError

USAGE = """
Usage: python -m perfusion.studio [key=value ...]

Opens a page in the browser, on this machine alone, that teaches a concept from photos, draws it at any strength and
compares strengths. Without keys it runs on Toyland, which needs no download; with weights of your own:
  python -m perfusion.studio backbone=sd15 backbone.path=/models/sd15
What is taught is a run of perfusion.train below `root`, and the page shows the commands that do the same.
"""


@dataclass
class StudioConfig:
    """The options of `python -m perfusion.studio`."""

    backbone: str | None = "toyland"  # preset of conf/backbone: toyland, sd15, sd21, sdxl
    path: str | None = None  # backbone's diffusers folder, .safetensors file or hub id; null: the weights that it ships
    layout: str | None = None  # configs of a .safetensors file: known layout or diffusers folder; null: as it looks
    dtype: str = "float32"  # float32, float16 or bfloat16
    device: str = "auto"  # auto: cuda, then mps, then cpu
    root: str = "runs"  # folder of the runs; the page reads and writes below it, and nowhere else
    host: str = "127.0.0.1"  # address to listen at; 0.0.0.0 lets everybody in who reaches this machine
    port: int = 7860  # of the page
    open: bool = True  # open the page in a browser
    scorer: str | None = None  # open_clip name or folder of the model that scores; null: Toyland's own on Toyland
    pretrained: str | None = None  # the scorer's weights, a file or a tag
    clipseg: str = ConceptConfig.clipseg  # CLIPSeg model that draws masks, where its weights are: folder or hub id


def main(argv: Sequence[str]) -> None:
    """Load the model, then serve the page until Ctrl-C."""
    config = parse_key_values([word.removeprefix("backbone.") for word in argv], StudioConfig, USAGE)
    if not 0 < config.port < 2**16:
        raise ConfigError(f"port: found {config.port}, expected a number from 1 to {2**16 - 1}")
    os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"  # read when gradio is imported
    try:
        import gradio  # noqa: F401
    except ImportError as error:
        raise ConfigError(
            "the studio needs gradio, the extra studio of this package; `make setup` installs it "
            "(elsewhere: pip install 'perfusion[studio]')"
        ) from error
    from perfusion.backbones import load_backbone
    from perfusion.studio.drawing import Drawing
    from perfusion.studio.page import serve
    from perfusion.studio.teaching import Teaching

    root = Path(config.root).expanduser()
    root.mkdir(parents=True, exist_ok=True)
    backbone = load_backbone(config, default="toyland")
    teaching = Teaching(config, backbone.config)
    try:
        serve(config, Drawing(config, backbone), teaching)
    finally:
        teaching.stop()


if __name__ == "__main__":
    sys.exit(run_cli(main))
