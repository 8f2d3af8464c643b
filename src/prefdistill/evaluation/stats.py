"""Means with standard errors, and with intervals where the values come in groups."""

import math
from collections.abc import Hashable, Sequence
from typing import Any

import numpy as np

PROMPTS = "test prompts"  # the unit of the error bars of what is measured once
RESAMPLES = 2_000  # the interval's ends then move by some 0.06 standard errors with the seed
_AT_ONCE = 4_000_000  # numbers drawn together: bounds the memory, whatever the number of groups


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


def estimate(
    values: Sequence[float] | np.ndarray,
    groups: Sequence[Hashable] | None = None,
    *,
    seed: int = 0,
    resamples: int = RESAMPLES,
) -> dict[str, Any]:
    r"""Mean over items, with standard error and 95 % interval from a bootstrap over the groups the items come in.

    .. math:: \bar x = \frac{\sum_g \sum_{i \in g} x_i}{\sum_g |g|}

    Whole groups are drawn, with replacement, because the items of a group (the pairs of one prompt) are not
    independent; every item weighs the same. The interval is that of the percentiles: BCa corrects a bias and a skew
    that the mean of tens of groups hardly has, and it is undefined where all groups agree.

    Args:
        values: a number per item, array-like of shape [B].
        groups: the group of each item, such as the text of its prompt; default: every item is its own.
        seed: of the draws.
        resamples: bootstrap samples.

    Returns:
        `{"mean", "se", "n": number of groups, "low", "high"}`; "se" is None and there is no interval for one group,
        nor where a value is not finite.

    Raises:
        ValueError: without values, or if there are not as many groups as values.

    Example:
        >>> found = estimate([1.0, 0.0, 1.0, 1.0], ["a", "a", "b", "c"])
        >>> found["mean"], found["n"], found["low"] <= 0.75 <= found["high"]
        (0.75, 3, True)
    """
    from scipy.stats import bootstrap

    x = np.asarray(values, dtype=np.float64)
    if x.ndim != 1 or len(x) == 0:
        raise ValueError(f"values must be a list of at least one number, got shape {x.shape}")
    totals: np.ndarray = x
    counts: np.ndarray = np.ones(len(x))
    if groups is not None:
        if len(groups) != len(x):
            raise ValueError(f"there must be a group for each value, got {len(groups)} groups and {len(x)} values")
        seen: dict[Hashable, int] = {}
        places = np.array([seen.setdefault(group, len(seen)) for group in groups])
        totals, counts = np.bincount(places, weights=x), np.bincount(places).astype(float)
    found: dict[str, Any] = {"mean": float(x.mean()), "se": None, "n": len(totals)}
    if len(totals) < 2 or not np.isfinite(totals).all():
        return found
    drawn = bootstrap(
        (totals, counts),
        lambda total, count, axis: total.sum(axis=axis) / count.sum(axis=axis),
        n_resamples=resamples,
        batch=max(1, _AT_ONCE // len(totals)),
        paired=True,
        method="percentile",
        rng=np.random.default_rng(seed),
    )
    low, high = drawn.confidence_interval
    return found | {"se": float(drawn.standard_error), "low": float(low), "high": float(high)}


def paired_difference(
    ours: Sequence[float] | np.ndarray,
    theirs: Sequence[float] | np.ndarray,
    groups: Sequence[Hashable] | None = None,
    *,
    seed: int = 0,
    resamples: int = RESAMPLES,
) -> dict[str, Any]:
    """`estimate` of `ours - theirs`, item by item. What the items share cancels.

    Example:
        >>> paired_difference([2.0, 12.0], [1.0, 10.0])["mean"]
        1.5
    """
    ours, theirs = np.asarray(ours, dtype=np.float64), np.asarray(theirs, dtype=np.float64)
    if ours.shape != theirs.shape:
        raise ValueError(f"paired values must be as many on both sides, got {ours.shape} and {theirs.shape}")
    return estimate(ours - theirs, groups, seed=seed, resamples=resamples)
