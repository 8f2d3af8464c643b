"""Means with standard errors and 95 % intervals, over repeats or over groups of items; wins of paired scores."""

import math
from collections.abc import Hashable, Sequence
from typing import Any

import numpy as np

PROMPTS = "test prompts"  # what the error of a single run is over
RESAMPLES = 2_000  # with these, the ends of the interval depend on the seed by some 0.06 standard errors
BATCH_NUMBERS = 4_000_000  # numbers drawn together: bounds the memory, whatever the number of groups


def t_interval(mean: float, se: float, n: int | None) -> tuple[float, float]:
    """Return the 95 % interval of a mean of `n` values by Student's t; None: of many.

    Example:
        >>> low, high = t_interval(1.0, 0.5, 3)
        >>> round(low, 4), round(high, 4)
        (-1.1513, 3.1513)
    """
    from scipy.stats import t

    half = float(t.ppf(0.975, math.inf if n is None else max(n - 1, 1))) * se
    return mean - half, mean + half


def mean_and_error(values: Sequence[float] | np.ndarray) -> dict[str, Any]:
    r"""Return the mean, its standard error, the number of values, and the 95 % interval by Student's t.

    .. math:: se = s / \sqrt{n}, \qquad s^2 = \sum_i (x_i - \bar x)^2 / (n - 1)

    Returns:
        `{"mean", "se", "n", "low", "high"}`; "se" is None and there is no interval for a single value, nor an interval
        where a value is not finite.

    Example:
        >>> mean_and_error([1.0, 2.0, 3.0])["se"]
        0.5773502691896258
    """
    x = np.asarray(values, dtype=np.float64)
    mean, se = float(x.mean()), float(x.std(ddof=1) / math.sqrt(len(x))) if len(x) > 1 else None
    result: dict[str, Any] = {"mean": mean, "se": se, "n": len(x)}
    if se is None or not math.isfinite(se):
        return result
    low, high = t_interval(mean, se, len(x))
    return result | {"low": low, "high": high}


def estimate(
    values: Sequence[float] | np.ndarray,
    groups: Sequence[Hashable] | None = None,
    *,
    seed: int = 0,
    resamples: int = RESAMPLES,
) -> dict[str, Any]:
    r"""Return the mean over items, with standard error and 95 % interval from a bootstrap over groups of items.

    .. math:: \bar x = \frac{\sum_g \sum_{i \in g} x_i}{\sum_g |g|}

    Whole groups are drawn, with replacement, because the items of a group (the pairs of one prompt) are not
    independent; every item has the same weight. The interval is the percentile interval: BCa corrects a bias and a skew
    that the mean of tens of groups hardly has, and it is undefined where all groups are equal.

    Args:
        values: a number per item, array-like of shape [B].
        groups: the group of each item, such as the text of its prompt; default: every item is its own.
        seed: of the random draws.
        resamples: bootstrap samples.

    Returns:
        `{"mean", "se", "n": number of groups, "low", "high"}`; "se" is None and there is no interval for one group,
        nor where a value is not finite.

    Raises:
        ValueError: without values, or if there are not as many groups as values.

    Example:
        >>> result = estimate([1.0, 0.0, 1.0, 1.0], ["a", "a", "b", "c"])
        >>> result["mean"], result["n"], result["low"] <= 0.75 <= result["high"]
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
        group_of = np.array(numbered(groups))
        totals, counts = np.bincount(group_of, weights=x), np.bincount(group_of).astype(float)
    result: dict[str, Any] = {"mean": float(x.mean()), "se": None, "n": len(totals)}
    if len(totals) < 2 or not np.isfinite(totals).all():
        return result
    resampled = bootstrap(
        (totals, counts),
        lambda total, count, axis: total.sum(axis=axis) / count.sum(axis=axis),
        n_resamples=resamples,
        batch=max(1, BATCH_NUMBERS // len(totals)),
        paired=True,
        method="percentile",
        rng=np.random.default_rng(seed),
    )
    low, high = resampled.confidence_interval
    return result | {"se": float(resampled.standard_error), "low": float(low), "high": float(high)}


def paired_difference(
    values: Sequence[float] | np.ndarray,
    baseline: Sequence[float] | np.ndarray,
    groups: Sequence[Hashable] | None = None,
) -> dict[str, Any]:
    """Return the `estimate` of `values - baseline`, item by item. Variation that both share cancels.

    Example:
        >>> paired_difference([2.0, 12.0], [1.0, 10.0])["mean"]
        1.5
    """
    values, baseline = np.asarray(values, dtype=np.float64), np.asarray(baseline, dtype=np.float64)
    if values.shape != baseline.shape:
        raise ValueError(f"paired values must be as many on both sides, got {values.shape} and {baseline.shape}")
    return estimate(values - baseline, groups)


def pair_wins(chosen: Any, rejected: Any) -> np.ndarray:
    """Return 1 where the chosen response scores higher, 0 where it scores lower, one half at a tie; [B]."""
    chosen, rejected = np.asarray(chosen, dtype=np.float64), np.asarray(rejected, dtype=np.float64)
    return (chosen > rejected) + 0.5 * (chosen == rejected)


def margin_accuracy(chosen: Any, rejected: Any) -> float:
    r"""Return the fraction of pairs that a score orders correctly, a tie counting one half.

    .. math:: \frac1B \sum_i [S(y_w^i) > S(y_l^i)] + \tfrac12 [S(y_w^i) = S(y_l^i)]

    Args:
        chosen, rejected: scores of the two responses, array-likes of shape [B].

    Example:
        >>> margin_accuracy([1.0, 2.0], [0.0, 2.0])
        0.75
    """
    return float(pair_wins(chosen, rejected).mean())


def numbered(items: Sequence[Hashable]) -> list[int]:
    """Return the number of each item, such as the text of a prompt, in order of first appearance.

    Example:
        >>> numbered(["b", "a", "b"])
        [0, 1, 0]
    """
    numbers: dict[Hashable, int] = {}
    return [numbers.setdefault(item, len(numbers)) for item in items]
