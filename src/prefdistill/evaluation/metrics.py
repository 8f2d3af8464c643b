"""The metrics: one registry entry each says how a metric is computed, aggregated and shown.

To add one, register it (or declare an entry point in the group `prefdistill.metrics`); it then appears in every
evaluation, in results.json, in the tables and in the report:

    METRICS.register("exclamations", Metric("exclamation marks", lambda r: [text.count("!") for text in r.texts]))

The order of the registry is that of the tables, and decides which metric is the headline where a recipe names none.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from prefdistill.core.registry import Registry

Source = Literal["responses", "greedy", "pairs"]
Values = Sequence[float] | Any  # a number per item, array-like [items]


@dataclass(frozen=True)
class Metric:
    """One metric: a number per test item, and the mean over items.

    Args:
        label: its name in tables.
        compute: from the `source` to a number per item, or None where the source lacks what the metric needs.
        source: "responses" (a `Responses` sampled at temperature 1, or read from a file), "greedy" (the same from
            greedy decoding) or "pairs" (`PairRewards` of the held-out pairs).
        at_equal_length: of a comparison with the start: correct for length, see `length_controlled_wins`.
        against_start: instead of `compute`: the metric whose values are compared with those of the student's start,
            item by item. A higher value counts 1, an equal one 1/2.
        higher_is_better: None where neither direction is better.
        format: of its numbers, as in `format(x, ".3f")`.
        by_length: also report it by length of the reference response.
        in_table: give it a column in the tables.
    """

    label: str
    compute: Callable[[Any], Values | None] | None = None
    source: Source = "responses"
    against_start: str | None = None
    at_equal_length: bool = False
    higher_is_better: bool | None = True
    format: str = ".3f"
    by_length: bool = False
    in_table: bool = True

    def describe(self) -> dict[str, Any]:
        """Return the entry of this metric in `metrics` of results.json."""
        shown = {"label": self.label, "higher_is_better": self.higher_is_better, "format": self.format}
        return shown if self.in_table else shown | {"in_table": False}


METRICS = Registry(
    "metric",
    "metrics",
    {
        "reward": Metric("true reward, T=1", lambda responses: responses.rewards),
        "reward_greedy": Metric("true reward, greedy", lambda responses: responses.rewards, source="greedy"),
        "win_rate_start": Metric("win rate against the start, T=1", against_start="reward"),
        "reward_model_win_rate_start": Metric(
            "reward model: win rate against the start", against_start="reward_model_score", by_length=True
        ),
        "reward_model_lc_win_rate_start": Metric(
            "reward model: length-controlled win rate against the start",
            against_start="reward_model_score",
            at_equal_length=True,
        ),
        "reward_model_win_rate_chosen": Metric(
            "reward model: win rate against the chosen responses", lambda r: r.win_rates("chosen"), by_length=True
        ),
        "reward_model_win_rate_against": Metric(
            "reward model: win rate against the given responses", lambda r: r.win_rates("against"), by_length=True
        ),
        "reward_model_score": Metric("reward model: score", lambda responses: responses.scores, by_length=True),
        "rouge_l": Metric("ROUGE-L", lambda responses: responses.rouge_l(), by_length=True),
        "exact_match": Metric("exact match", lambda responses: responses.exact_matches(), by_length=True),
        "response_tokens": Metric(
            "tokens", lambda responses: responses.tokens, higher_is_better=None, format=".1f", by_length=True
        ),
        "response_words": Metric(
            "words", lambda r: r.word_counts(), higher_is_better=None, format=".1f", by_length=True, in_table=False
        ),
        "kl_start": Metric(
            "KL from the start, nats per response",
            lambda responses: responses.log_ratios,
            higher_is_better=None,
            format=".2f",
        ),
        "reward_accuracy": Metric("implicit-reward accuracy", lambda pairs: pairs.wins(), source="pairs"),
        "chosen_logp": Metric(
            "log-prob of chosen, per token", lambda pairs: pairs.chosen_logp, source="pairs", higher_is_better=None
        ),
        "reward_margin": Metric(
            "implicit-reward margin, in units of beta",
            lambda pairs: pairs.chosen - pairs.rejected,
            source="pairs",
            higher_is_better=None,
            in_table=False,
        ),
    },
)


def headline_metric(measured: Sequence[str]) -> str | None:
    """Return the first metric of the registry that was measured, preferring one with a better direction.

    Example:
        >>> headline_metric(["reward_accuracy", "response_tokens"])
        'reward_accuracy'
    """
    candidates = [(name, metric) for name, metric in METRICS.items() if name in measured and metric.in_table]
    directed = [name for name, metric in candidates if metric.higher_is_better is not None]
    return next(iter(directed or [name for name, _ in candidates]), None)
