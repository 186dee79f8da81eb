"""The model card of Toyland's weights, written from `report.json`, so that no result in it is copied by hand."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from perfusion.toyland.captions import vocabulary

FILE_NAME = "README.md"

_HEAD = """# Toyland, world version {version}

A small latent-diffusion model of Stable Diffusion's architecture, for trying personalization methods on two CPU cores.
Stock diffusers loads it: `StableDiffusionPipeline.from_pretrained("pipeline")`.

| folder | what | class |
|---|---|---|
| `pipeline/` | 64x64 pixels, 8x8x16 latents, the noise schedule of SD 1.5 | `diffusers.StableDiffusionPipeline` |
| `scorer/` | image-text model that only scores; shares no weight with the pipeline | `open_clip`, by `local-dir:` |
| `reader/` | reads attributes off pictures, one head each | `perfusion.toyland.reader.Reader` |

Trained from nothing on scenes that `perfusion/toyland/draw.py` renders, with captions from `captions.py`: no picture of
the real world, and no person, is in it. Licence: Apache-2.0, as the code.

Built with the stages of `make toyland`, measured with `make toyland-report`.{note}
"""

_LEGEND = """
- Noun's token: of captions that name a look, the share in which a linear probe, fitted on others, reads it off the
  encoding of the noun's own token; in captions of one toy and of two, by the pipeline's text encoder and the scorer's.
- Looks are read at the noun: how much more denoising error a wrong look makes in the noun's token alone, over how much
  more it makes in the whole caption; in the object's cells.
- Prompts: shares of the pictures of 1,000 fresh captions that show what was asked for, as the reader reads them.
  `pattern` is striped, spotted or patched, `plain` is counted apart; `detail` is the colour of eyes and of trims.
- Told all looks: prompts name a toy's looks and one thing more. Identity is the share of looks that is right, prompts
  followed the share of the other things.
- Swapped noun: the encoding of the noun's own token is another noun's, the rest of the caption as it was.
- Drop: accuracy on renders minus accuracy on the autoencoder's reconstructions of them.
- `clip_t_correlation`: Spearman's, over these pictures, of the scorer's similarity of picture and caption with the
  share of the caption that is right; then the same after the similarity of the caption's own render is taken off.
  `clip_i_correlation`: of the similarity of picture and render with the share of the toy's looks that is right.
- `sharpness`: mean gradient in the twentieth of a picture where it is largest, in photos that are drawn, over the same
  in renders of their scenes.
- Pictures are drawn in 25 steps of DDIM with guidance 4. `images per second`: 16 at once, 12 steps of DPM-Solver++, two
  threads{where}.
"""

_LIMITS = """
## Limits

- It knows the {words} words of its world and nothing else: ten kinds of toys in nine places; no people, no depth.
- What no caption says hardly varies: toys stand at one of two places and never turn, each place is one picture in three
  crops. A method that needs more variety than that is not tried here.
- Pictures are 64x64. All that makes a toy is about a latent cell large, 8 pixels; smaller things blur.
- Results on it are leads for Stable Diffusion, not results about it.
- The reader and the scorer make mistakes of their own, stated above; a number below theirs may be theirs.
"""


def number(value: float | None) -> str:
    """As tables show it; nothing for None."""
    return "" if value is None else f"{value:g}"


def card(report: Mapping[str, Any]) -> str:
    """Markdown from a report: `training`, `settings`, `built_with`, `bars`, `measured_with`, `details`, and a `note` on
    how the weights came about, written by hand; parts may be missing."""
    note = f"\n\n{report['note']}" if "note" in report else ""
    text = _HEAD.format(version=report["world_version"], note=note)
    if training := report.get("training"):
        rows = [
            (stage, f"{was['step']:,}", f"{was['elapsed'] / 60:.1f}", f"{was['loss']:.4f}")
            for stage, was in training.items()
        ]
        text += "\n## Training\n" + _table("| stage | steps | minutes | loss at the end |", rows)
        built = report.get("built_with", {})
        where = built.get("gpu") or built.get("cpu", "an unknown machine")
        settings = ", ".join(f"{key} {value}" for key, value in report.get("settings", {}).items())
        text += f"\nOn {where}{'; ' if settings else ''}{settings}.\n"
    if bars := report.get("bars"):
        marks = {True: "reached", False: "**not reached**", None: ""}
        rows = [(row["name"], number(row["value"]), number(row["bar"]), marks[row["reached"]]) for row in bars]
        text += "\n## Measured\n" + _table("| what | value | bar | |", rows)
        cpu = report.get("measured_with", {}).get("cpu")
        text += _LEGEND.format(where=f" on {cpu}" if cpu else "")
    if curve := report.get("details", {}).get("fine_tuning"):
        rows = [(f"{at['steps']:.0f}", f"{at['identity']:.3f}", f"{at['prompts']:.3f}") for at in curve]
        text += "\nNaive full fine-tuning of the UNet on one picture, judged by the reader:\n"
        text += _table("| steps | identity | prompts followed |", rows)
    return text + _LIMITS.format(words=len(vocabulary()))


def _table(head: str, rows: Sequence[Sequence[str]]) -> str:
    lines = [head, "---".join("|" * (len(rows[0]) + 1)), *(f"| {' | '.join(row)} |" for row in rows)]
    return "\n" + "\n".join(lines) + "\n"
