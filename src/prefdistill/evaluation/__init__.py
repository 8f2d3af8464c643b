"""What is measured on held-out data, with error bars."""

from typing import TYPE_CHECKING

from prefdistill.core.lazy import lazy_names

if TYPE_CHECKING:
    from prefdistill.evaluation.pairs import gauge_flips, margin_accuracy, pair_terms, pair_wins
    from prefdistill.evaluation.stats import estimate, mean_and_error, paired_difference

__all__ = [
    "estimate",
    "gauge_flips",
    "margin_accuracy",
    "mean_and_error",
    "pair_terms",
    "pair_wins",
    "paired_difference",
]

_PAIRS = ("gauge_flips", "margin_accuracy", "pair_terms", "pair_wins")
__getattr__ = lazy_names(
    __name__,
    dict.fromkeys(_PAIRS, "pairs") | dict.fromkeys(("estimate", "mean_and_error", "paired_difference"), "stats"),
)
