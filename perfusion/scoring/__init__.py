"""The frozen models that score pictures, and the scores that they give: no part of any pipeline."""

from __future__ import annotations

import numpy as np


def harmonic_mean(a: np.ndarray | float, b: np.ndarray | float) -> np.ndarray:
    """2ab / (a + b) of two scores; 0 where either is not above 0, for then one of the two goals is missed altogether;
    NaN of NaN. Arrays broadcast."""
    product, total = np.maximum(a, 0) * np.maximum(b, 0), np.add(a, b)
    return 2 * product / np.where(product == 0, 1, total)
