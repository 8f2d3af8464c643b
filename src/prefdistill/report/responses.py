"""Sections on the models' responses: the reward model, score against length, metrics by length, samples."""

import math
import statistics
from functools import partial
from typing import Any

from prefdistill.evaluation.results import NOT_FINITE, Column, Estimate, Results, clean, mapping, number
from prefdistill.report import figures
from prefdistill.report.format import cell_of, correlation, cut, points_of, string
from prefdistill.report.svg import BLUE, Style

View = dict[str, Any]

_MAX_CLOUDS = 9
_MAX_RANGES = 12
_MAX_SAMPLES = 12
_SCORE = Column("score", "score", None)


def lengths_of(results: Results, styles: dict[str, Style], key: str, budget: int) -> View | None:
    """Return score against length of each model's responses: a row of numbers and a scatter plot each."""
    models = {
        clean(name): (points, styles.get(name, Style(BLUE)))
        for name, value in results.mapping("responses").items()
        if (points := points_of(mapping(value).get("points")))
    }
    if not models:
        return None
    rows: list[View] = []
    clouds = []
    for name, (points, style) in models.items():
        means = [statistics.fmean(numbers) for numbers in zip(*points, strict=True)]
        values = [*means, correlation(points)]
        cells = [cell_of(Estimate.parse(value), _SCORE) for value in values]
        rows.append({"name": name, "cells": cells})
        alt = (
            f"{len(points)} responses of {name}: score against length in tokens. On average {cells[0]['mean']} tokens "
            f"and a score of {cells[1]['mean']}; correlation {cells[2]['mean']}."
        )
        clouds.append((name, points, style, alt))
    shown, labels = clouds[:_MAX_CLOUDS], ("tokens of the response", "score")
    plots = partial(figures.clouds, shown, labels=labels, key=f"{key}-length", budget=budget, zero=False)
    return {"rows": rows, "plots": plots, "left_out": len(clouds) - len(shown)}


def by_length_of(results: Results, styles: dict[str, Style], key: str) -> list[View]:
    """Return a table and a figure for each metric: methods by range of the reference response's length."""
    known = {column.key: column for column in results.all_columns}
    tables: list[View] = []
    for name, value in results.mapping("by_length").items():
        column = known.get(name, Column(name, clean(name)))
        parts = [part for part in value if isinstance(part, dict)][:_MAX_RANGES] if isinstance(value, list) else []
        methods = list(dict.fromkeys(m for part in parts for m in mapping(part.get("methods"))))
        if not methods:
            continue
        ranges = [_range(part) for part in parts]
        rows, series, words = [], {}, []
        for method in methods:
            by_range = [Estimate.parse(mapping(part.get("methods")).get(method)) for part in parts]
            cells = [cell_of(estimate, column) for estimate in by_range]
            rows.append({"name": clean(method), "cells": cells})
            series[clean(method)] = [_ends(estimate) for estimate in by_range], styles.get(method, Style())
            words.append(f"{clean(method)}: {', '.join(cell['mean'] for cell in cells)}")
        alt = f"{column.label} by words of the reference response ({'; '.join(ranges)}). {'; '.join(words)}."
        figure_key = f"{key}-range{len(tables)}"
        tables.append(
            {
                "metric": column.label,
                "ranges": ranges,
                "counts": [f"{n:.0f}" if (n := number(part.get("n"))) is not None else "" for part in parts],
                "rows": rows,
                "legend": [{"name": name, "style": style} for name, (_, style) in series.items()],
                "svg": partial(figures.ranges, ranges, series, label=column.label, key=figure_key, alt=alt),
            }
        )
    return tables


def samples_of(results: Results, budget: int) -> list[View]:
    """Return the responses of every model to the same prompts; `budget` characters are shared by all."""
    rows = [s for s in results.items("samples") if isinstance(s, dict)][:_MAX_SAMPLES]
    size = sum(len(mapping(s.get("responses"))) + 1 for s in rows)
    limit = max(200, min(3_000, budget // max(size, 1)))
    samples = []
    for sample in rows:
        responses, scores = mapping(sample.get("responses")), mapping(sample.get("scores"))
        cards = []
        for name in [n for n in dict.fromkeys([*results.methods, *responses]) if n in responses]:
            value = number(scores.get(name))
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
