"""Control for length: what a preference says of two responses of equal length."""

import math
from collections.abc import Sequence
from typing import Any

import numpy as np

RIDGE = 0.1  # in nats: keeps the fit finite if one side wins everything; negligible over hundreds of comparisons
RESAMPLES = 1_000
FEWEST = 10  # comparisons, for a fit


def length_controlled(
    scores: Sequence[float], extra_length: Sequence[float], *, seed: int = 0
) -> dict[str, Any] | None:
    r"""Return the win rate that a logistic regression predicts for outputs of equal length.

    .. math:: P(\text{win}) = \sigma(\theta + \varphi \tanh(\Delta / s_\Delta)), \qquad \text{result} = \sigma(\theta)

    The idea and the features are those of AlpacaEval's length-controlled win rate. Its third feature, the difficulty of
    an instruction, is known only for its own 805 instructions, and its baselines are not in this fit: the number is
    not comparable with its leaderboard.

    Args:
        scores: preference for the output in each comparison, 0 to 1.
        extra_length: length of the output minus that of the other.

    Returns:
        An estimate with an interval from a bootstrap over comparisons; None for fewer than ten, or if all length
        differences are equal.

    Example:
        >>> round(length_controlled([1, 1, 0, 0] * 5, [9, 9, -9, -9] * 5)["mean"], 3)
        0.5
    """
    y, x = np.asarray(scores, dtype=np.float64), _features(extra_length)
    if x is None:
        return None
    mean = _rate(x, y)
    rng = np.random.default_rng(seed)
    drawn = rng.integers(len(y), size=(RESAMPLES, len(y)))
    rates = np.array([_rate(x[rows], y[rows]) for rows in drawn])
    low, high = np.percentile(rates, [2.5, 97.5])
    return {"mean": mean, "se": float(rates.std(ddof=1)), "n": len(y), "low": float(low), "high": float(high)}


def length_controlled_wins(
    scores: Sequence[float] | np.ndarray, extra_length: Sequence[float] | np.ndarray
) -> np.ndarray:
    r"""Return numbers per comparison, [n], whose mean is the length-controlled win rate and whose spread its error.

    They are centred jackknife pseudo-values, with :math:`r` the rate of `length_controlled` and :math:`r_{-i}` that
    without comparison i:

    .. math:: r + (n - 1) (\bar r_{-} - r_{-i})

    Empty for fewer than ten comparisons; the scores if all length differences are equal.

    Example:
        >>> wins = length_controlled_wins([1, 1, 0, 0] * 5, [9, 9, -9, -9] * 5)
        >>> round(float(wins.mean()), 3), len(wins)
        (0.5, 20)
    """
    y, x = np.asarray(scores, dtype=np.float64), _features(extra_length)
    if x is None:
        return y if len(y) >= FEWEST else np.empty(0)
    all_but_one = ~np.eye(len(y), dtype=bool)
    without = np.array([_rate(x[rows], y[rows]) for rows in all_but_one])
    return _rate(x, y) + (len(y) - 1) * (without.mean() - without)


def length_balanced(wins: Sequence[float] | np.ndarray, extra_length: Sequence[float] | np.ndarray) -> np.ndarray:
    r"""Return numbers per pair, whose mean is the accuracy where length says nothing and whose spread its error.

    .. math:: r = \tfrac12 \text{accuracy}(\text{chosen longer}) + \tfrac12 \text{accuracy}(\text{rejected longer})

    Whoever goes by length alone, longer or shorter, gets one half. Pairs of equal length are left out. The number of a
    pair i of part g, with :math:`n_g` of the n pairs and accuracy :math:`a_g`, is :math:`r + (w_i - a_g) n / 2 n_g`.

    Args:
        wins: 1 for each pair that is ordered as labelled, 0 for others, one half at a tie, [n].
        extra_length: length of the chosen response minus that of the rejected one, [n].

    Returns:
        The numbers of the pairs of unequal length; empty if they are all of one part.

    Example:
        >>> float(length_balanced([1, 1, 1, 0], [9, 5, 2, -3]).mean())             # longer is better
        0.5
    """
    wins, extra = np.asarray(wins, dtype=np.float64), np.asarray(extra_length, dtype=np.float64)
    wins, extra = wins[extra != 0], extra[extra != 0]
    parts = [extra > 0, extra < 0]
    if not all(part.any() for part in parts):
        return np.empty(0)
    accuracies = [wins[part].mean() for part in parts]
    numbers = np.full(len(wins), np.mean(accuracies))
    for part, accuracy in zip(parts, accuracies, strict=True):
        numbers[part] += (wins[part] - accuracy) * len(wins) / (2 * part.sum())
    return numbers


def _features(extra_length: Sequence[float] | np.ndarray) -> np.ndarray | None:
    """Return the columns of the regression; None for fewer than ten comparisons, or if all lengths are equal."""
    delta = np.asarray(extra_length, dtype=np.float64)
    if len(delta) < FEWEST or delta.std() == 0:
        return None
    return np.stack([np.ones_like(delta), np.tanh(delta / delta.std(ddof=1))], axis=1)


def _rate(x: np.ndarray, y: np.ndarray) -> float:
    """Return the win rate at equal length: Newton's method on the ridge-penalised likelihood, strictly concave."""
    weights = np.zeros(2)
    for _ in range(50):
        p = 1 / (1 + np.exp(-x @ weights))
        slope = x.T @ (y - p) - RIDGE * weights
        step = np.linalg.solve((x * (p * (1 - p))[:, None]).T @ x + RIDGE * np.eye(2), slope)
        weights += step
        if np.abs(step).max() < 1e-9:
            break
    return float(1 / (1 + math.exp(-weights[0])))
