"""Evaluation of a student on held-out data: metrics, error bars and the verdict on a comparison."""

from typing import TYPE_CHECKING

from prefdistill.core.lazy import lazy_names

if TYPE_CHECKING:
    from prefdistill.evaluation.pairs import gauge_flips, pair_terms
    from prefdistill.evaluation.stats import estimate, margin_accuracy, mean_and_error, pair_wins, paired_difference

__all__ = [
    "estimate",
    "gauge_flips",
    "margin_accuracy",
    "mean_and_error",
    "pair_terms",
    "pair_wins",
    "paired_difference",
]

_STATS = ("estimate", "margin_accuracy", "mean_and_error", "pair_wins", "paired_difference")
__getattr__ = lazy_names(
    __name__, dict.fromkeys(("gauge_flips", "pair_terms"), "pairs") | dict.fromkeys(_STATS, "stats")
)
