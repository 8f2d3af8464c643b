"""What the report shows of the models' own responses: their judge, reward against length, scores by length."""

import math
import statistics
from typing import Any

from prefdistill.report.table import Estimate, Metric, Results, clean, mapping, metrics_of, number
from prefdistill.report.text import cell_of, points_of

View = dict[str, Any]

_MAX_CLOUDS = 9
_MAX_RANGES = 12
_SCORE = Metric("score", "score", None)
_SHARE = Metric("accuracy", "share of pairs", True)


def judge_of(results: Results) -> str | None:
    """What the reward model that scored the responses is worth, in words; None where there is none."""
    judge = mapping(results.get("judge"))
    accuracy = Estimate.parse(judge.get("accuracy"))
    if accuracy is None:
        return None
    name = clean(judge.get("name") or "a reward model")
    longer = Estimate.parse(judge.get("longer_is_better"))
    pairs = number(judge.get("pairs"))
    of = f"{pairs:,.0f} held-out pairs" if pairs is not None and math.isfinite(pairs) else "the held-out pairs"
    beside = f"; the better one is the longer one in {longer.text(_SHARE)}" if longer else ""
    return (
        f"The judge, {name}, scores the better response higher in {accuracy.text(_SHARE)}{_span(accuracy, _SHARE)} of "
        f"{of}{beside}. Its scores and win rates are worth no more than that."
    )


def judge_warning(results: Results) -> str | None:
    """Where the judge is not known to see more than chance, or than length does."""
    judge = mapping(results.get("judge"))
    accuracy, longer = Estimate.parse(judge.get("accuracy")), Estimate.parse(judge.get("longer_is_better"))
    if accuracy is None or not accuracy.finite:
        return None
    low = (accuracy.interval() or (accuracy.mean, accuracy.mean))[0]
    told = f"the judge orders {accuracy.text(_SHARE)} of the held-out pairs right"
    if low <= 0.5:
        return f"{told}, which is not clearly more than chance: its win rates say nothing"
    if longer is not None and longer.finite and low <= longer.mean:
        return f"{told}, not clearly more than length alone does ({longer.mean:.3f}): its win rates may be length"
    return None


def lengths_of(results: Results, styles: dict[str, Any], key: str, budget: int) -> View | None:
    """Score against length of each model's responses: a row of numbers and a scatter of each."""
    from prefdistill.report import figures

    found = {
        clean(name): (points, styles.get(name, figures.Style(figures.BLUE)))
        for name, value in mapping(results.get("generations")).items()
        if (points := points_of(mapping(value).get("points")))
    }
    if not found:
        return None
    rows: list[View] = []
    clouds = []
    for name, (points, style) in found.items():
        tokens, scores = [x for x, _ in points], [y for _, y in points]
        measured = [statistics.fmean(tokens), statistics.fmean(scores), _correlation(tokens, scores)]
        cells = [cell_of(Estimate.parse(value), _SCORE) for value in measured]
        rows.append({"name": name, "cells": cells})
        alt = (
            f"{len(points)} responses of {name}: score against length in tokens. On average {cells[0]['mean']} tokens "
            f"and a score of {cells[1]['mean']}; correlation {cells[2]['mean']}."
        )
        clouds.append((name, points, style, alt))
    plots = figures.clouds(
        clouds[:_MAX_CLOUDS],
        labels=("tokens of the response", "score"),
        key=f"{key}-length",
        budget=budget,
        zero=False,
    )
    return {"rows": rows, "plots": plots, "left_out": len(clouds) - len(plots)}


def tables_by_length(results: Results) -> list[View]:
    """Each metric by range of the reference response's length: methods by ranges."""
    known = {metric.key: metric for metric in metrics_of(results)}
    tables = []
    for name, value in mapping(results.get("by_length")).items():
        metric = known.get(name, Metric(name, clean(name)))
        parts = [part for part in value if isinstance(part, dict)][:_MAX_RANGES] if isinstance(value, list) else []
        methods = list(dict.fromkeys(m for part in parts for m in mapping(part.get("methods"))))
        if not methods:
            continue
        rows = []
        for method in methods:
            estimates = [Estimate.parse(mapping(part.get("methods")).get(method)) for part in parts]
            cells = [cell_of(estimate, metric) for estimate in estimates]
            rows.append({"key": method, "name": clean(method), "estimates": estimates, "cells": cells})
        tables.append(
            {
                "metric": metric.label,
                "ranges": [_range(part) for part in parts],
                "counts": [f"{n:.0f}" if (n := number(part.get("n"))) is not None else "" for part in parts],
                "rows": rows,
            }
        )
    return tables


def by_length_of(results: Results, styles: dict[str, Any], key: str) -> list[View]:
    """`tables_by_length`, each with its figure."""
    from prefdistill.report import figures

    tables = tables_by_length(results)
    for i, table in enumerate(tables):
        drawn = {row["name"]: styles.get(row["key"], figures.Style()) for row in table["rows"]}
        words = [f"{row['name']}: {', '.join(cell['mean'] for cell in row['cells'])}" for row in table["rows"]]
        table["legend"] = [{"name": name, "style": style} for name, style in drawn.items()]
        table["svg"] = figures.ranges(
            table["ranges"],
            {row["name"]: ([_ends(e) for e in row["estimates"]], drawn[row["name"]]) for row in table["rows"]},
            label=table["metric"],
            key=f"{key}-range{i}",
            alt=f"{table['metric']} by words of the reference response ({'; '.join(table['ranges'])}). "
            f"{'; '.join(words)}.",
        )
    return tables


def _ends(estimate: Estimate | None) -> tuple[float, float, float] | None:
    if estimate is None or not estimate.finite:
        return None
    low, high = estimate.interval() or (estimate.mean, estimate.mean)
    return estimate.mean, low, high


def _range(part: dict[str, Any]) -> str:
    low, high = number(part.get("low")), number(part.get("high"))
    if low is None and high is None:
        return "all"
    if high is None:
        return f"{low:g} and more"
    return f"up to {high:g}" if not low else f"{low:g} to {high:g}"


def _span(estimate: Estimate, metric: Metric) -> str:
    interval = estimate.interval()
    return f" (95 % interval {metric.format(interval[0])} to {metric.format(interval[1])})" if interval else ""


def _correlation(xs: list[float], ys: list[float]) -> float | None:
    try:
        return statistics.correlation(xs, ys)
    except statistics.StatisticsError:  # one point, or nothing varies
        return None
