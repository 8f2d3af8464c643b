"""Section on training: one panel per logged metric, with a line per method."""

import math
from functools import partial
from typing import Any

from prefdistill.evaluation.results import NOT_FINITE, clean
from prefdistill.report import figures, svg
from prefdistill.report.format import natural
from prefdistill.report.load import PANELS, Points, Run, average

View = dict[str, Any]


def curves_of(run: Run, styles: dict[str, svg.Style], key: str, budget: int) -> View | None:
    """Return a panel per logged metric with a line per method, and the losses of the steps before the students."""
    methods: dict[str, dict[str, list[Points]]] = {
        panel: {name: lines[panel] for name, lines in run["curves"].items() if panel in lines} for panel in PANELS
    }
    before = {name: lines["loss"] for name, lines in run["early"].items() if "loss" in lines}
    logps = [v for m in ("logps/chosen", "logps/rejected") for ls in methods[m].values() for ln in ls for _, v in ln]
    shared = svg.limits(logps, zero=False)
    points = max(20, min(80, budget // max(1, sum(map(len, methods.values())))))
    panels = []
    for i, (metric, title) in enumerate(PANELS.items()):
        lines = methods[metric]
        if not lines:
            continue
        ends = [f"{clean(n)} {_last(average(ls))}" for n, ls in lines.items()]
        alt = f"{title} by optimizer step. At the last step: {', '.join(ends)}."
        y_limits = shared if metric.startswith("logps/") else None
        about: View = {"title": title, "alt": alt, "key": f"{key}-curve{i}", "y_limits": y_limits, "points": points}
        panels.append(partial(figures.curves, lines, styles, **about))
    early = []
    for i, name in enumerate(sorted(before, key=natural)[:8]):
        alt = f"Training loss of {clean(name)} by optimizer step; at the last one {_last(average(before[name]))}."
        about = {"title": f"{clean(name)}: loss", "alt": alt, "key": f"{key}-early{i}"}
        early.append(partial(figures.curves, {name: before[name]}, {name: svg.Style(svg.BLUE)}, **about))
    if not panels and not early:
        return None
    shown = {n for m in methods.values() for n in m}
    legend = [{"name": clean(n), "style": s} for n, s in styles.items() if n in shown]
    most = max((len(lines) for m in methods.values() for lines in m.values()), default=0)
    return {"panels": panels, "early": early, "legend": legend, "runs": most}


def _last(line: Points) -> str:
    if not line:
        return "unknown"
    return f"{line[-1][1]:.3g}" if math.isfinite(line[-1][1]) else NOT_FINITE
