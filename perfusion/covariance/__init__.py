"""The second moment C = E[e eᵀ] of text encodings: streamed, cached, factorised (docs/covariance.md).

C is uncentred, and by default covers every position that the cross-attention sees: beginning, words, end and padding.
Without the padding the similarity at padding positions is far from zero, and the edit damages every prompt.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from perfusion.covariance.cache import cached_second_moment
    from perfusion.covariance.moment import CovarianceError, Factorised, SecondMoment, factorise
    from perfusion.covariance.stream import accumulate

__all__ = ["CovarianceError", "Factorised", "SecondMoment", "accumulate", "cached_second_moment", "factorise"]

# Imported on first use: torch takes seconds, and the command's `--help` has no need of it.
_HOMES = {
    "CovarianceError": "moment",
    "Factorised": "moment",
    "SecondMoment": "moment",
    "accumulate": "stream",
    "cached_second_moment": "cache",
    "factorise": "moment",
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_HOMES[name]}"), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
