"""Means with standard errors."""

import math
from collections.abc import Sequence
from typing import Any

import numpy as np


def mean_and_error(values: Sequence[float] | np.ndarray) -> dict[str, Any]:
    r"""Mean, its standard error and the number of values.

    .. math:: se = s / \sqrt{n}, \qquad s^2 = \sum_i (x_i - \bar x)^2 / (n - 1)

    Returns:
        `{"mean": x, "se": x or None for a single value, "n": k}`.

    Example:
        >>> mean_and_error([1.0, 2.0, 3.0])
        {'mean': 2.0, 'se': 0.5773502691896258, 'n': 3}
    """
    x = np.asarray(values, dtype=np.float64)
    se = float(x.std(ddof=1) / math.sqrt(len(x))) if len(x) > 1 else None
    return {"mean": float(x.mean()), "se": se, "n": len(x)}


def paired_difference(ours: Sequence[float] | np.ndarray, theirs: Sequence[float] | np.ndarray) -> dict[str, Any]:
    """Mean of `ours - theirs`, pair by pair, with its standard error. What the pairs share cancels.

    Example:
        >>> paired_difference([2.0, 12.0], [1.0, 10.0])
        {'mean': 1.5, 'se': 0.5, 'n': 2}
    """
    ours, theirs = np.asarray(ours, dtype=np.float64), np.asarray(theirs, dtype=np.float64)
    if ours.shape != theirs.shape:
        raise ValueError(f"paired values must be as many on both sides, got {ours.shape} and {theirs.shape}")
    return mean_and_error(ours - theirs)
