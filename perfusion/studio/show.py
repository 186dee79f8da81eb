"""What the page shows, as HTML: pictures with captions, a training's progress and its loss."""

from __future__ import annotations

import base64
import io
from collections.abc import Sequence
from html import escape
from pathlib import Path
from urllib.parse import quote

from PIL import Image

from perfusion.cli import is_user_error
from perfusion.studio.drawing import Row
from perfusion.studio.teaching import Progress

FILES = "files"  # where the page serves what lies below the root
_CURVE = (600, 120)
_CROP = 192  # pixels
_SMOOTH = 0.9  # of the loss: how much of the mean so far stays at each step


def wrong(error: Exception) -> str:
    """The sentence of a command; an error that is no mistake of the user's is raised."""
    if not is_user_error(error):
        raise error
    return f'<div class="wrong">{escape(str(error))}</div>'


def hint(text: str) -> str:
    return f'<div class="hint">{escape(text)}</div>'


def welcome(toyland: bool) -> str:
    """What to do here, for who sees the page for the first time."""
    lasts = "about a minute" if toyland else "as long as on the command line: minutes on a GPU"
    example = " Or take the toy on the left." if toyland else ""
    steps = (
        ("Teach", f"Drop one photo or a few of one thing, say what it is, and press Teach.{example} It takes {lasts}."),
        ("Draw", "Write prompts with its word in them, and set its strength with a slider."),
        ("Compare", "See all strengths at once, and what the scores say of them."),
    )
    items = "".join(f"<li><b>{name}</b><span>{text}</span></li>" for name, text in steps)
    return f'<ol class="welcome">{items}</ol>'


def crops(squares: Sequence[Image.Image]) -> str:
    """The pictures that are learned from, small, inside of the page."""
    shown = []
    for square in squares:
        file = io.BytesIO()
        square.convert("RGB").resize((_CROP, _CROP)).save(file, "JPEG", quality=90)
        shown.append(f'<img src="data:image/jpeg;base64,{base64.b64encode(file.getvalue()).decode()}" alt="crop">')
    return f'<div class="crops">{"".join(shown)}</div>'


def link(root: Path, path: Path) -> str:
    """Where the page serves a file; another one for another content."""
    return f"{FILES}/{quote(path.relative_to(root).as_posix())}?{path.stat().st_mtime_ns}"


def sheet(rows: Sequence[Row], root: Path) -> str:
    """Rows of pictures with their captions."""
    return "".join(
        f'<section class="shots"><h4>{escape(row.title)}</h4>'
        f'<div class="pictures" style="--n:{len(row.files)}">{"".join(_figures(row, root))}</div></section>'
        for row in rows
    )


def best(rows: Sequence[Row]) -> float:
    """The highest harmonic mean of all."""
    return max((score["harmonic"] for row in rows for score in row.scores), default=0.0)


def _figures(row: Row, root: Path, top: float | None = None) -> list[str]:
    figures = []
    for k, (file, caption) in enumerate(zip(row.files, row.captions, strict=True)):
        said, marked = escape(caption), ""
        if row.scores:
            score = row.scores[k]
            both = f"{score['clip_i']:.2f} · {score['clip_t']:.2f}"
            said += f'<span title="likeness (CLIP-I) and prompt (CLIP-T)">{both}</span>'
            marked = ' class="best"' if score["harmonic"] == top else ""
        address = link(root, file)
        figures.append(
            f'<figure{marked}><a href="{address}" target="_blank"><img src="{address}" alt="{escape(file.stem)}"></a>'
            f"<figcaption>{said}</figcaption></figure>"
        )
    return figures


def grids(titled: Sequence[tuple[str, Sequence[Row]]], root: Path) -> str:
    """Grids side by side, the best score of each marked."""
    parts = []
    for title, rows in titled:
        lines = "".join(
            f'<div class="line">{escape(row.title)}</div><div class="pictures" style="--n:{len(row.files)}">'
            f"{''.join(_figures(row, root, best(rows)))}</div>"
            for row in rows
        )
        parts.append(f'<section class="shots"><h4>{escape(title)}</h4>{lines}</section>')
    scored = any(row.scores for _, rows in titled for row in rows)
    told = "Below: likeness to the photos · agreement with the prompt, from 0 to 1. The best of both is framed."
    return (hint(told) if scored else "") + f'<div class="grids">{"".join(parts)}</div>'


def progress(now: Progress) -> str:
    """A bar, what is going on, and the loss as a curve."""
    done = now.step / now.steps
    words = {
        "starting": f"Loading the model … {_spoken(now.seconds)}",
        "learning": f"Step {now.step} of {now.steps}" + ("" if now.left is None else f" · {_spoken(now.left)} left"),
        "drawing": "Drawing samples …",
        "stopped": f"Stopped at step {now.step} of {now.steps}",
        "finished": f"Done: {now.step} steps",
        "failed": "It did not work",
    }[now.state]
    told = f'<div class="{"wrong" if now.state == "failed" else "hint"}">{escape(now.said)}</div>' if now.said else ""
    bar = f'<div class="bar {now.state}"><div style="width:{100 * done:.1f}%"></div></div>'
    return f'<div class="progress"><b>{words}</b>{bar}{told}{curve(now.losses, now.steps)}</div>'


def curve(losses: Sequence[float], steps: int) -> str:
    """The loss of each step, and its moving average; nothing before the second."""
    if len(losses) < 2:
        return ""
    mean, smooth = losses[0], []
    for loss in losses:
        mean = _SMOOTH * mean + (1 - _SMOOTH) * loss
        smooth.append(mean)
    width, height = _CURVE
    top = max(*smooth, sorted(losses)[int(0.98 * (len(losses) - 1))])  # a rare peak would flatten all others

    def line(values: Sequence[float], kind: str) -> str:
        points = " ".join(
            f"{width * k / steps:.1f},{height * (1 - min(value / top, 1)):.1f}" for k, value in enumerate(values, 1)
        )
        return f'<polyline class="{kind}" points="{points}"/>'

    return (
        f'<figure class="curve"><svg viewBox="0 0 {width} {height}" preserveAspectRatio="none">'
        f"{line(losses, 'each')}{line(smooth, 'mean')}</svg>"
        f"<figcaption><span>loss {smooth[-1]:.3f}</span><span>{steps} steps</span></figcaption></figure>"
    )


def previews(now: Progress, samples: Path, root: Path) -> str:
    """What validation prompts looked like so far, the newest first; when it is done, the samples above them."""
    sheet = ""
    if now.state == "finished" and samples.is_file():
        address = link(root, samples)
        sheet = f'<a href="{address}" target="_blank"><img class="samples" src="{address}" alt="samples"></a>'
    strips = "".join(
        f'<div class="strip"><span>step {step}</span><img src="{link(root, path)}" alt="step {step}"></div>'
        for step, path in sorted(now.strips.items(), reverse=True)
    )
    return sheet + (f'<h4>While it learned</h4><div class="strips">{strips}</div>' if strips else "")


def _spoken(seconds: float) -> str:
    return f"{seconds:.0f} s" if seconds < 100 else f"{seconds / 60:.0f} min"


def reports(root: Path) -> str:
    """Links to the pages of eval.report that lie below the root."""
    pages = [page for page in root.glob("**/index.html") if page.with_name("table.md").is_file()]
    links = "".join(
        f'<li><a href="{link(root, page)}" target="_blank">{escape(str(page.parent))}</a></li>' for page in pages
    )
    return f"<h4>Reports</h4><ul>{links}</ul>" if links else ""
