"""Sections on the models' responses: the reward model, score against length, metrics by length, samples."""

import math
import statistics
from typing import Any

from prefdistill.evaluation.results import NOT_FINITE, Column, Estimate, Results, all_columns, clean, mapping, number
from prefdistill.report.format import cell_of, cut, points_of, string

View = dict[str, Any]

_MAX_CLOUDS = 9
_MAX_RANGES = 12
_MAX_SAMPLES = 12
_SCORE = Column("score", "score", None)
_SHARE = Column("accuracy", "share of pairs", True)


def reward_model_of(results: Results) -> str | None:
    """Return the reward model's accuracy in words; None without a reward model."""
    model = mapping(results.get("reward_model"))
    accuracy = Estimate.parse(model.get("accuracy"))
    if accuracy is None:
        return None
    name = clean(model.get("name") or "of unknown origin")
    longer = Estimate.parse(model.get("longer_is_better"))
    pairs = number(model.get("pairs"))
    of = f"{pairs:,.0f} held-out pairs" if pairs is not None and math.isfinite(pairs) else "the held-out pairs"
    length = f"; the better one is the longer one in {longer.text(_SHARE)}" if longer else ""
    return (
        f"The reward model, {name}, scores the better response higher in {accuracy.text(_SHARE)}"
        f"{_span(accuracy, _SHARE)} of {of}{length}. Its scores and win rates are no more reliable than that."
    )


def reward_model_warning(results: Results) -> str | None:
    """Return a warning if the reward model is not clearly better than chance, or than length alone."""
    model = mapping(results.get("reward_model"))
    accuracy, longer = Estimate.parse(model.get("accuracy")), Estimate.parse(model.get("longer_is_better"))
    if accuracy is None or not accuracy.finite:
        return None
    low = (accuracy.interval() or (accuracy.mean, accuracy.mean))[0]
    text = f"the reward model orders {accuracy.text(_SHARE)} of the held-out pairs correctly"
    if low <= 0.5:
        return f"{text}, not clearly more than chance: its win rates mean nothing"
    if longer is not None and longer.finite and low <= longer.mean:
        return f"{text}, not clearly more than length alone ({longer.mean:.3f}): its win rates may only measure length"
    return None


def lengths_of(results: Results, styles: dict[str, Any], key: str, budget: int) -> View | None:
    """Return score against length of each model's responses: a row of numbers and a scatter plot each."""
    from prefdistill.report import figures, svg

    models = {
        clean(name): (points, styles.get(name, svg.Style(svg.BLUE)))
        for name, value in mapping(results.get("responses")).items()
        if (points := points_of(mapping(value).get("points")))
    }
    if not models:
        return None
    rows: list[View] = []
    clouds = []
    for name, (points, style) in models.items():
        tokens, scores = [x for x, _ in points], [y for _, y in points]
        values = [statistics.fmean(tokens), statistics.fmean(scores), _correlation(tokens, scores)]
        cells = [cell_of(Estimate.parse(value), _SCORE) for value in values]
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
    """Return a table for each metric: methods by range of the reference response's length."""
    known = {column.key: column for column in all_columns(results)}
    tables = []
    for name, value in mapping(results.get("by_length")).items():
        column = known.get(name, Column(name, clean(name)))
        parts = [part for part in value if isinstance(part, dict)][:_MAX_RANGES] if isinstance(value, list) else []
        methods = list(dict.fromkeys(m for part in parts for m in mapping(part.get("methods"))))
        if not methods:
            continue
        rows = []
        for method in methods:
            estimates = [Estimate.parse(mapping(part.get("methods")).get(method)) for part in parts]
            cells = [cell_of(estimate, column) for estimate in estimates]
            rows.append({"key": method, "name": clean(method), "estimates": estimates, "cells": cells})
        tables.append(
            {
                "metric": column.label,
                "ranges": [_range(part) for part in parts],
                "counts": [f"{n:.0f}" if (n := number(part.get("n"))) is not None else "" for part in parts],
                "rows": rows,
            }
        )
    return tables


def by_length_of(results: Results, styles: dict[str, Any], key: str) -> list[View]:
    """Return `tables_by_length`, each with its figure."""
    from prefdistill.report import figures, svg

    tables = tables_by_length(results)
    for i, table in enumerate(tables):
        own_styles = {row["name"]: styles.get(row["key"], svg.Style()) for row in table["rows"]}
        words = [f"{row['name']}: {', '.join(cell['mean'] for cell in row['cells'])}" for row in table["rows"]]
        table["legend"] = [{"name": name, "style": style} for name, style in own_styles.items()]
        table["svg"] = figures.ranges(
            table["ranges"],
            {row["name"]: ([_ends(e) for e in row["estimates"]], own_styles[row["name"]]) for row in table["rows"]},
            label=table["metric"],
            key=f"{key}-range{i}",
            alt=f"{table['metric']} by words of the reference response ({'; '.join(table['ranges'])}). "
            f"{'; '.join(words)}.",
        )
    return tables


def samples_of(results: Results, budget: int) -> list[View]:
    """Return the responses of every model to the same prompts; `budget` characters are shared by all."""
    names = list(results["methods"])
    rows = [s for s in results.get("samples", []) if isinstance(s, dict)][:_MAX_SAMPLES]
    size = sum(len(mapping(s.get("responses"))) + 1 for s in rows)
    limit = max(200, min(3_000, budget // max(size, 1)))
    samples = []
    for sample in rows:
        responses, scores = mapping(sample.get("responses")), mapping(sample.get("scores"))
        known = [n for n in names if n in responses] + [n for n in responses if n not in names]
        values = {n: number(scores.get(n)) for n in known}
        cards = []
        for name in known:
            value = values[name]
            score = "" if value is None else NOT_FINITE if not math.isfinite(value) else f"{value:.4g}"
            cards.append({"name": clean(name), "text": cut(string(responses[name]), limit), "score": score})
        longest = max((len(card["text"]) for card in cards), default=0)
        samples.append({"prompt": cut(string(sample.get("prompt", "")), limit), "cards": cards, "long": longest > 160})
    return samples


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


def _span(estimate: Estimate, column: Column) -> str:
    interval = estimate.interval()
    return f" (95 % interval {column.format(interval[0])} to {column.format(interval[1])})" if interval else ""


def _correlation(xs: list[float], ys: list[float]) -> float | None:
    try:
        return statistics.correlation(xs, ys)
    except statistics.StatisticsError:  # one point, or nothing varies
        return None
