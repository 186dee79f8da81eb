"""How methods are called and marked, the same in every table, figure and page."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

# Okabe and Ito's colours, which colour-blind people can tell apart, without the yellow that fades on white.
COLOURS = ("#D55E00", "#0072B2", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#444444", "#8C6BB1")
_SYMBOLS = ("circle", "square", "diamond", "triangle-up", "triangle-down", "cross", "x", "hexagon")
MARKS = tuple(zip("osD^vPXh", _SYMBOLS, strict=True))  # of matplotlib, and of plotly
_KNOWN = {
    "perfusion": "Perfusion",
    "textual_inversion": "Textual Inversion",
    "dreambooth": "DreamBooth",
    "custom_diffusion": "Custom Diffusion",
    "lora": "LoRA",
    "base": "base model",
}


@dataclass(frozen=True)
class Look:
    """How one method is called and drawn."""

    title: str
    colour: str
    mark: str  # of matplotlib
    symbol: str  # of plotly


def looks(methods: Iterable[str]) -> dict[str, Look]:
    """The look of each method: a known one has its own, the others take what is left, in their order."""
    methods = list(dict.fromkeys(methods))
    taken = {method: k for k, method in enumerate(_KNOWN) if method in methods}
    free = [k for k in range(max(len(COLOURS), len(methods))) if k not in taken.values()]
    number = {m: taken[m] if m in taken else free.pop(0) for m in methods}
    # Where colours begin again, the marks are one further on, so that 64 methods differ.
    return {
        m: Look(title(m), COLOURS[k % len(COLOURS)], *MARKS[(k + k // len(COLOURS)) % len(MARKS)])
        for m, k in number.items()
    }


def title(method: str) -> str:
    """A method's name for people."""
    return _KNOWN.get(method, method)
