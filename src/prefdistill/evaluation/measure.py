"""What one model gives on held-out data: the numbers per item behind every metric, and the prompts they belong to."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np

from prefdistill.evaluation.pairs import implicit_rewards, pair_wins, prompts_of
from prefdistill.evaluation.stats import PROMPTS, estimate, mean_and_error

if TYPE_CHECKING:
    from datasets import Dataset
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from prefdistill.signals import Signals

# What is shown by the length of the reference response.
BY_LENGTH = ("judge_score", "judge_win_rate", "rouge_l", "exact_match", "response_tokens", "response_words")


@dataclass
class Measured:
    """What one evaluated model gave: means by metric, and the values per test item behind them."""

    metrics: dict[str, float] = field(default_factory=dict)
    items: dict[str, list[float]] = field(default_factory=dict)
    samples: list[dict[str, Any]] = field(default_factory=list)
    # by metric, the number of each item's prompt; absent where every item is a prompt of its own
    groups: dict[str, list[int]] = field(default_factory=dict)

    def add(self, metric: str, values: Any, groups: list[int] | None = None) -> None:
        self.items[metric] = np.asarray(values, dtype=np.float64).tolist()
        self.metrics[metric] = float(np.mean(self.items[metric]))
        if groups is not None:
            self.groups[metric] = groups

    def among(self, metrics: Sequence[str], low: int, high: int | None) -> "Measured":
        """These metrics on the items whose reference has `low` to `high` words."""
        words = self.items["reference_words"]
        places = [place for place, n in enumerate(words) if n >= low and (high is None or n <= high)]
        kept = Measured()
        for metric in metrics:
            if places and metric in self.items:
                groups = self.groups.get(metric)
                kept.add(
                    metric,
                    [self.items[metric][place] for place in places],
                    groups and [groups[place] for place in places],
                )
        return kept


def mean_of(by_seed: list[list[Measured]], metric: str) -> dict[str, Any]:
    """A metric's mean, its error over the widest variation there is: seeds, else data orders, else test prompts.

    Args:
        by_seed: for each seed, one entry per data order.
    """
    per_seed = [float(np.mean([run.metrics[metric] for run in runs])) for runs in by_seed]
    if len(per_seed) > 1:
        return mean_and_error(per_seed) | {"over": "seeds"}
    runs = by_seed[0]
    if len(runs) > 1:
        return mean_and_error([run.metrics[metric] for run in runs]) | {"over": "data orders"}
    return estimate(runs[0].items[metric], runs[0].groups.get(metric)) | {"over": PROMPTS}


def by_length(
    models: dict[str, list[list[Measured]]], edges: Sequence[int] | None = None, metrics: Sequence[str] = BY_LENGTH
) -> dict[str, Any]:
    """What the responses of each model are worth by range of the reference's length in words.

    Args:
        models: by name, what was measured of each, by seed and data order.
        edges: of the ranges, see `length_ranges`; default: quartiles of the references.
        metrics: of these, those that were measured.

    Returns:
        `{metric: [{"low", "high", "n": prompts, "methods": {name: estimate}}, ...]}`, without empty ranges; empty where
        there are no references.
    """
    models = {name: by_seed for name, by_seed in models.items() if "reference_words" in by_seed[0][0].items}
    if not models:
        return {}
    first = next(iter(models.values()))[0][0]
    found: dict[str, Any] = {}
    for low, high in length_ranges(first.items["reference_words"], edges):
        cut = {n: [[run.among(metrics, low, high) for run in runs] for runs in s] for n, s in models.items()}
        for metric in metrics:
            shown = {name: mean_of(s, metric) for name, s in cut.items() if metric in s[0][0].items}
            if shown:
                sizes = next(s[0][0] for s in cut.values() if metric in s[0][0].items)
                n = len(set(sizes.groups.get(metric) or range(len(sizes.items[metric]))))
                found.setdefault(metric, []).append({"low": low, "high": high, "n": n, "methods": shown})
    return found


def length_ranges(reference_words: Sequence[float], edges: Sequence[int] | None = None) -> list[tuple[int, int | None]]:
    """Ranges of the reference's length in words, both ends included; the last has no end.

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
    """`[response_tokens, score]` of the first items, the score the true reward or else a reward model's."""
    scores = measured.items.get("reward") or measured.items.get("judge_score")
    tokens = measured.items.get("response_tokens")
    if not scores or not tokens:
        return []
    return [[n, score] for n, score in zip(tokens[:limit], scores[:limit], strict=True)]


def measure_pairs(
    measured: Measured,
    student: "PreTrainedModel",
    pairs: "Dataset",
    tokenizer: "PreTrainedTokenizerBase",
    reference: "Signals",
) -> None:
    """Add how a student orders the held-out pairs by its implicit reward."""
    reward = implicit_rewards(student, pairs, tokenizer, reference)
    groups = numbered(prompts_of(pairs, reward["row"]))
    measured.add("reward_accuracy", pair_wins(reward["chosen"], reward["rejected"]), groups)
    measured.add("reward_margin", reward["chosen"] - reward["rejected"], groups)
    measured.add("chosen_logp", reward["chosen_logp"], groups)


def numbered(prompts: list[str]) -> list[int]:
    """The number of each prompt, in the order in which they first come.

    Example:
        >>> numbered(["b", "a", "b"])
        [0, 1, 0]
    """
    seen: dict[str, int] = {}
    return [seen.setdefault(prompt, len(seen)) for prompt in prompts]
