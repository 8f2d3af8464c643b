"""The teacher's term in a method's margin, beside the margin that its DPO part has learnt."""

from typing import Any

import numpy as np

from prefdistill.evaluation.measure import Measured
from prefdistill.methods import TVKD, Method
from prefdistill.signals import SignalSet

# Spread of the shaping margin in units of the DPO margin's, above which the pairs hardly count.
DROWNING = 3.0


def shaping_of(
    methods: dict[str, Method], signals: SignalSet, measured: dict[str, list[Measured]]
) -> tuple[dict[str, Any], list[str]]:
    """Of each method that has one, its offset on the test pairs and the DPO margins of its first student.

    Args:
        methods: by name.
        signals: of the test pairs.
        measured: by method, with the item "reward_margin".

    Returns:
        `{method: {"mean", "std", "dpo_margin_std", "points": [[margin, offset], ...]}}`, and warnings where the offset
        drowns the margin.
    """
    found: dict[str, Any] = {}
    warnings = []
    for name, method in methods.items():
        if not isinstance(method, TVKD) or signals.missing(method.needs):
            continue
        features = method.features(signals)
        offset = method.alpha * (features["shaping_chosen"] - features["shaping_rejected"])
        margin = method.beta * np.array(measured[name][0].items["reward_margin"])
        found[name] = {
            "mean": float(offset.mean()),
            "std": float(offset.std()),
            "dpo_margin_std": float(margin.std()),
            "points": [[float(m), float(o)] for m, o in zip(margin[:500], offset[:500], strict=True)],
        }
        if offset.std() > DROWNING * margin.std():
            warnings.append(
                f"{name}: the shaping margin (spread {offset.std():.2f}) drowns the DPO margin "
                f"(spread {margin.std():.2f}); a lower alpha or a higher beta gives the pairs more say"
            )
    return found, warnings
