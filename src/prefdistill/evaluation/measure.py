"""Measurements of one model on held-out data: the value of every metric for every test item, and their means."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from prefdistill.evaluation.length import length_controlled_wins
from prefdistill.evaluation.metrics import METRICS
from prefdistill.evaluation.stats import PROMPTS, crossed, estimate, mean_and_error, pair_wins

POINT_SCORES = ("reward", "reward_model_score")  # what the report plots against length: the first that was measured


@dataclass
class Measured:
    """Measurements of one model: means by metric, and the values per test item behind them."""

    metrics: dict[str, float] = field(default_factory=dict)
    items: dict[str, list[float]] = field(default_factory=dict)
    samples: list[dict[str, Any]] = field(default_factory=list)
    # by metric, the number of each item's prompt; absent where every item is a prompt of its own
    groups: dict[str, list[int]] = field(default_factory=dict)

    def add(self, metric: str, values: Any, groups: list[int] | None = None) -> None:
        """Add the values of a metric per item."""
        self.items[metric] = np.asarray(values, dtype=np.float64).tolist()
        self.metrics[metric] = float(np.mean(self.items[metric]))
        if groups is not None:
            self.groups[metric] = groups

    def add_metrics(self, source: str, measurements: Any) -> None:
        """Add every registered metric that is computed from this source, such as `Responses` for "responses"."""
        for name, metric in METRICS.items():
            if metric.source == source and metric.compute is not None:
                values = metric.compute(measurements)
                if values is not None:
                    self.add(name, values, measurements.groups)

    def among(self, metrics: Sequence[str], low: int, high: int | None) -> "Measured":
        """Return these metrics on the items whose reference has `low` to `high` words."""
        words = self.items["reference_words"]
        rows = [row for row, n in enumerate(words) if n >= low and (high is None or n <= high)]
        subset = Measured()
        for metric in metrics:
            if rows and metric in self.items:
                groups = self.groups.get(metric)
                subset.add(metric, [self.items[metric][row] for row in rows], groups and [groups[row] for row in rows])
        return subset


def mean_over(runs: list[Measured]) -> Measured:
    """Return the mean of runs on the same test items: of every metric that all have, item by item."""
    first, mean = runs[0], Measured()
    for metric in first.items:
        if complete([runs], metric):
            mean.add(metric, np.mean([run.items[metric] for run in runs], axis=0), first.groups.get(metric))
    return mean


def complete(by_seed: list[list[Measured]], metric: str) -> bool:
    """Return whether every run of every seed has a metric; a mean over some of them would not be comparable."""
    return all(metric in run.items for runs in by_seed for run in runs)


def add_win_rates(models: dict[str, list[Measured]], start: str) -> None:
    """Add the metrics that compare every model with the student's start on the same prompts.

    Args:
        models: measurements by name, one entry per data order.
        start: the name of the student's start; nothing is added where it was not measured.
    """
    for name, metric in METRICS.items():
        score = metric.against_start
        if score is None or start not in models or score not in models[start][0].items:
            continue
        first = models[start][0].items
        for run in (run for runs in models.values() for run in runs if score in run.items):
            wins = pair_wins(run.items[score], first[score])
            if metric.at_equal_length:
                extra_words = np.array(run.items["response_words"]) - np.array(first["response_words"])
                wins = length_controlled_wins(wins, extra_words)
            if len(wins):
                run.add(name, wins, run.groups.get(score))


def mean_of(by_seed: list[list[Measured]], metric: str, *, same_items: bool = False) -> dict[str, Any]:
    """Return a metric's mean, with its error over all variation there is, see `over_repeats`.

    Args:
        by_seed: for each seed, one entry per data order.
        same_items: whether the seeds share their test items; data orders always do.
    """
    values = [[run.items[metric] for run in runs] for runs in by_seed]
    return over_repeats(values, by_seed[0][0].groups.get(metric), same_items=same_items)


def difference_of(
    runs: list[list[Measured]], baseline: list[list[Measured]], metric: str, *, same_items: bool = False
) -> dict[str, Any]:
    """Return a metric's mean paired difference to the baseline, with its error over the same variation as `mean_of`.

    Order k is paired with order k of the baseline: same start, same pairs, same test prompts.
    """
    differences = [
        [
            [value - other for value, other in zip(run.items[metric], base.items[metric], strict=True)]
            for run, base in zip(orders, base_orders, strict=True)
        ]
        for orders, base_orders in zip(runs, baseline, strict=True)
    ]
    return over_repeats(differences, runs[0][0].groups.get(metric), same_items=same_items)


def over_repeats(values: Sequence[Sequence[Any]], groups: list[int] | None, *, same_items: bool) -> dict[str, Any]:
    """Return the mean of numbers by seed, data order and test item, with its error.

    The error is over the seeds (each the mean of its data orders) where there are several, else over data orders, and
    over the test prompts as well where the repeats share them; for a single training over the test prompts alone.
    """
    counts = {len(items) for orders in (values if same_items else values[:1]) for items in orders}
    if len(counts) > 1:
        raise ValueError(f"the repeats have different numbers of test items, {sorted(counts)}; they cannot be compared")
    if len(values) > 1:
        over, repeats = "seeds", [np.asarray(orders, dtype=np.float64).mean(axis=0) for orders in values]
    else:
        over, repeats = "data orders", [np.asarray(items, dtype=np.float64) for items in values[0]]
    if len(repeats) == 1:
        return estimate(repeats[0], groups) | {"over": PROMPTS}
    if len(values) == 1 or same_items:
        return crossed(np.stack(repeats), groups) | {"over": over}
    return mean_and_error([float(items.mean()) for items in repeats]) | {"over": over}


def by_length(
    models: dict[str, list[list[Measured]]], edges: Sequence[int] | None = None, *, same_items: bool = False
) -> dict[str, Any]:
    """Return the metrics of each model's responses by range of the reference's length in words.

    Args:
        models: measurements by name, by seed and data order.
        edges: of the ranges, see `length_ranges`; default: quartiles of the references.

    Returns:
        `{metric: [{"low", "high", "n": prompts, "methods": {name: estimate}}, ...]}`, without empty ranges; empty where
        there are no references.
    """
    models = {name: by_seed for name, by_seed in models.items() if "reference_words" in by_seed[0][0].items}
    if not models:
        return {}
    metrics = [name for name, metric in METRICS.items() if metric.by_length]
    first = next(iter(models.values()))[0][0]
    table: dict[str, Any] = {}
    for low, high in length_ranges(first.items["reference_words"], edges):
        subsets = {n: [[run.among(metrics, low, high) for run in runs] for runs in s] for n, s in models.items()}
        for metric in metrics:
            means = {
                name: mean_of(s, metric, same_items=same_items) for name, s in subsets.items() if complete(s, metric)
            }
            if means:
                sample = next(s[0][0] for s in subsets.values() if metric in s[0][0].items)
                n = len(set(sample.groups.get(metric) or range(len(sample.items[metric]))))
                table.setdefault(metric, []).append({"low": low, "high": high, "n": n, "methods": means})
    return table


def length_ranges(reference_words: Sequence[float], edges: Sequence[int] | None = None) -> list[tuple[int, int | None]]:
    """Return ranges of the reference's length in words, both ends included; the last has no end.

    Args:
        reference_words: lengths to take quartiles of where there are no edges.
        edges: the last word of every range but the last.

    Example:
        >>> length_ranges([], [5, 10])
        [(0, 5), (6, 10), (11, None)]
    """
    if edges is None:
        edges = [int(edge) for edge in np.quantile(reference_words, [0.25, 0.5, 0.75])]
    lows = [0, *(edge + 1 for edge in sorted(set(edges)))]
    return list(zip(lows, [*(low - 1 for low in lows[1:]), None], strict=True))


def points(measured: Measured, limit: int = 500) -> list[list[float]]:
    """Return `[response_tokens, score]` of the first items; the score is the true reward, else a reward model's."""
    scores = next((measured.items[name] for name in POINT_SCORES if measured.items.get(name)), None)
    tokens = measured.items.get("response_tokens")
    if not scores or not tokens:
        return []
    return [[n, score] for n, score in zip(tokens[:limit], scores[:limit], strict=True)]
