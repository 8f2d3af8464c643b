"""The shaping margin that a method adds, compared with the DPO margin that the student has learned."""

from typing import Any

import numpy as np

from prefdistill.data.columns import SIDES
from prefdistill.evaluation.measure import Measured
from prefdistill.methods import Method
from prefdistill.methods.base import MAX_RATIO
from prefdistill.signals import SignalSet

SHAPING, MARGIN = "shaping/margins_abs", "rewards/margins_abs"  # as TVKD logs them


def shaping_of(
    methods: dict[str, Method], signals: SignalSet, measured: dict[str, list[Measured]]
) -> tuple[dict[str, Any], list[str]]:
    """Return the shaping margins on the test pairs and the DPO margins of the first student, of each shaping method.

    Args:
        methods: by name.
        signals: signals of the test pairs, the reference's among them.
        measured: measurements by method, with the metric "reward_margin".

    Returns:
        `{method: {"mean", "std", "dpo_margin_std", "points": [[margin, offset], ...]}}`, and a warning for each
        method whose shaping margin outweighs the DPO margin.
    """
    margins: dict[str, Any] = {}
    warnings = []
    for name, method in methods.items():
        offset = None if signals.missing(method.needs) else method.margin_offset(method.row_signals(signals))
        if offset is None:
            continue
        # of all test pairs that the student reads; a teacher with other tokens may lack some
        read = signals.store("reference", "logps", SIDES[0]).rows
        margin = method.margin_scale * np.array(measured[name][0].items["reward_margin"])[np.isin(read, signals.rows)]
        margins[name] = {
            "mean": float(offset.mean()),
            "std": float(offset.std()),
            "dpo_margin_std": float(margin.std()),
            "points": [[float(m), float(o)] for m, o in zip(margin[:500], offset[:500], strict=True)],
        }
        if offset.std() > MAX_RATIO * margin.std():
            warnings.append(_outweighs(name, "spread", offset.std(), margin.std()))
    return margins, warnings


def outweighing(name: str, log: list[dict[str, float]]) -> str | None:
    """Return a warning if the shaping margin outweighs the DPO margin in the last log line, by mean size."""
    last = next((line for line in reversed(log) if SHAPING in line), None)
    if last is None or last[MARGIN] == 0 or last[SHAPING] <= MAX_RATIO * last[MARGIN]:  # 0: nothing is learned yet
        return None
    return _outweighs(name, "mean size", last[SHAPING], last[MARGIN])


def _outweighs(name: str, measure: str, offset: float, margin: float) -> str:
    return (
        f"{name}: the shaping margin ({measure} {offset:.2f}) outweighs the DPO margin ({measure} {margin:.2f}); "
        "use a lower alpha or a higher beta"
    )
