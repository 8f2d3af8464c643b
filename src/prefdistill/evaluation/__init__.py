"""What is measured on held-out data, with error bars."""

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
