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


def crossed(values: Sequence[Sequence[float]] | np.ndarray, groups: Sequence[Hashable] | None = None) -> dict[str, Any]:
    r"""Return the mean over repeats on the same items, with standard error and 95 % interval over repeats and items.

    A two-way analysis of variance: with :math:`t_{rg}` the deviations from the mean, summed over the items of group g
    and scaled so that their mean is that of the items, R repeats and G groups,

    .. math:: se^2 = \max(MS_R + MS_G - MS_E, MS_R, MS_G) / RG

    What repeats and items do not explain, :math:`MS_E`, is in both other mean squares and counts once. The interval is
    Student's t with the degrees of freedom of Welch and Satterthwaite. Repeats that vary little leave the error over
    the items, as in `estimate`; items that vary little leave that over the repeats, as in `mean_and_error`.

    Args:
        values: a number per repeat (such as a seed) and item, array-like of shape [R, B].
        groups: the group of each item, such as the text of its prompt; default: every item is its own.

    Returns:
        `{"mean", "se", "n": R, "prompts": G, "low", "high"}`; without "prompts" and items in the error where there is
        only one group, and without an error where there is only one repeat or a value is not finite.

    Source:
        Cornfield and Tukey, Average values of mean squares in factorials, 1956; Satterthwaite, An approximate
        distribution of estimates of variance components, 1946.

    Example:
        >>> result = crossed([[1.0, 2.0, 3.0], [1.0, 2.0, 3.0]])                    # the repeats do not differ
        >>> result["mean"], round(result["se"], 3), result["n"], result["prompts"]
        (2.0, 0.577, 2, 3)
    """
    from scipy.stats import t

    x = np.asarray(values, dtype=np.float64)
    group_of = np.arange(x.shape[1]) if groups is None else np.array(numbered(groups))
    repeats, count = len(x), int(group_of.max()) + 1
    if not np.isfinite(x).all():
        return {"mean": float(x.mean()), "se": None, "n": repeats}
    result = mean_and_error(x.mean(axis=1))
    if repeats < 2 or count < 2:
        return result
    mean = result["mean"]
    totals = np.array([np.bincount(group_of, weights=row) for row in x - mean]) * (count / x.shape[1])
    of_repeats, of_groups = totals.mean(axis=1), totals.mean(axis=0)
    rest = totals - of_repeats[:, None] - of_groups
    between_repeats = (of_repeats**2).sum() / (repeats - 1) / repeats
    between_groups = (of_groups**2).sum() / (count - 1) / count
    unexplained = (rest**2).sum() / ((repeats - 1) * (count - 1)) / (repeats * count)
    freedom_of_repeats, freedom_of_groups = repeats - 1, count - 1
    both = between_repeats + between_groups - unexplained
    if both >= max(between_repeats, between_groups):
        variance = both
        parts = (
            between_repeats**2 / freedom_of_repeats
            + between_groups**2 / freedom_of_groups
            + unexplained**2 / (freedom_of_repeats * freedom_of_groups)
        )
        freedom = variance**2 / parts if parts else 1.0
    else:
        variance, freedom = max((between_repeats, freedom_of_repeats), (between_groups, freedom_of_groups))
    half = float(t.ppf(0.975, freedom) * math.sqrt(variance))
    return result | {"se": math.sqrt(variance), "prompts": count, "low": mean - half, "high": mean + half}


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
