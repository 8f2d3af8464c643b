"""The teacher's term in a method's margin, beside the margin that its DPO part has learnt."""

from typing import Any

import numpy as np

from prefdistill.evaluation.measure import Measured
from prefdistill.methods import Method
from prefdistill.signals import SignalSet

# Spread of the shaping margin in units of the DPO margin's, above which the pairs hardly count.
DROWNING = 3.0
SHAPING, MARGIN = "shaping/margins_abs", "rewards/margins_abs"  # as TVKD logs them


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
        offset = None if signals.missing(method.needs) else method.margin_offset(signals)
        if offset is None:
            continue
        margin = method.margin_scale * np.array(measured[name][0].items["reward_margin"])
        found[name] = {
            "mean": float(offset.mean()),
            "std": float(offset.std()),
            "dpo_margin_std": float(margin.std()),
            "points": [[float(m), float(o)] for m, o in zip(margin[:500], offset[:500], strict=True)],
        }
        if offset.std() > DROWNING * margin.std():
            warnings.append(_drowns(name, "spread", offset.std(), margin.std()))
    return found, warnings


def drowning(name: str, log: list[dict[str, float]]) -> str | None:
    """A warning if the shaping margin drowned the DPO margin when a training last logged them, by their mean sizes."""
    last = next((line for line in reversed(log) if SHAPING in line), None)
    if last is None or last[MARGIN] == 0 or last[SHAPING] <= DROWNING * last[MARGIN]:  # 0: nothing is learnt yet
        return None
    return _drowns(name, "mean size", last[SHAPING], last[MARGIN])


def _drowns(name: str, measure: str, offset: float, margin: float) -> str:
    return (
        f"{name}: the shaping margin ({measure} {offset:.2f}) drowns the DPO margin ({measure} {margin:.2f}); a lower "
        "alpha or a higher beta gives the pairs more say"
    )
