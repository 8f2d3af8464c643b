"""What the teacher's signals on the held-out pairs say: accuracy of its terms, sensitivity of its values, offsets."""

import functools
from typing import TYPE_CHECKING, Any

from prefdistill.evaluation.measure import Measured
from prefdistill.evaluation.pairs import gauge_flips, pair_terms, prompts_of
from prefdistill.evaluation.shaping import shaping_of
from prefdistill.evaluation.stats import numbered
from prefdistill.experiment.plan import Plan
from prefdistill.signals import SignalSet

if TYPE_CHECKING:
    import numpy as np


class HeldOut:
    """The signals on the test pairs of a plan that has run."""

    def __init__(self, plan: Plan) -> None:
        self.plan = plan

    @functools.cached_property
    def signals(self) -> SignalSet | None:
        if self.plan.test is None or not any(step.role == "teacher" for step in self.plan.test_signals):
            return None
        return SignalSet.of([step.store for step in self.plan.test_signals], self.plan.test.rows)

    def margin_terms(self) -> "dict[str, np.ndarray]":
        """Return, for each term of the teacher, whether it orders each test pair as labelled."""
        return pair_terms(self.signals) if self.signals else {}

    def margin_groups(self) -> list[int]:
        """Return the number of the prompt of each pair of `margin_terms`."""
        return numbered(prompts_of(self.signals.data, self.signals.rows)) if self.signals else []

    def gauge_flips(self) -> dict[str, Any]:
        """Return how many pair orderings by the teacher's value flip under logit offsets that leave its policy
        unchanged."""
        stores = (step.store for step in self.plan.test_signals)
        return next((gauge_flips(store) for store in stores if "values" in store.kinds), {})

    def shaping(self, measured: dict[str, list[Measured]]) -> tuple[dict[str, Any], list[str]]:
        """Return the offset of each method that has one on the test pairs, and warnings, see `shaping_of`."""
        return shaping_of(self.plan.methods, self.signals, measured) if self.signals else ({}, [])
