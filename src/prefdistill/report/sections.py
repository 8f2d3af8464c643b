"""Sections of the page: from a run to words, numbers as text and figures. A section without data is left out.

Figures are drawn when the template calls them: the markdown has none.
"""

import math
from functools import partial
from typing import Any

from prefdistill.evaluation.reliability import reward_model_sentence
from prefdistill.evaluation.results import Column, Results, clean, number
from prefdistill.evaluation.verdict import compare, noise_floor, verdict
from prefdistill.report import figures, responses
from prefdistill.report.format import cell_of, cut, flat, interval_of, plural
from prefdistill.report.load import Run
from prefdistill.report.stages import read_of, stages_of
from prefdistill.report.svg import Style, styles_of
from prefdistill.report.table import method_table
from prefdistill.report.teacher import gauge_sentence, margin_accuracy_of, shaping_of
from prefdistill.report.training import curves_of
from prefdistill.report.warnings import warnings_of

View = dict[str, Any]

# Limits of one page, shared by its runs: it stays under 1 MB for all but very many runs.
_TEXT_BUDGET = 240_000  # characters of samples
_LINE_BUDGET = 10_000  # points of all mean curves
_CLOUD_BUDGET = 6_000  # points of all scatter plots
ROLE_WORDS = {"baseline": "baseline", "noise_floor": "noise floor"}  # in place of the outcome in the table


def view_of(run: Run, key: str, of: int) -> View:
    """Return all that the template needs for one run of `of`; an empty value leaves its section out."""
    results: Results = run["results"]
    styles = styles_of(results)
    return {
        "key": key,
        "name": run["name"],
        "path": run["path"],
        "task": results.text("task"),
        "facts": _facts(results),
        "verdict": verdict(results),
        "warnings": warnings_of(run),
        "notes": run["notes"],
        "method_table": method_table(results, markdown=True),
        "table": table_of(results, styles),
        "all_differences": _all_differences(results),
        "forest": _forest(results, styles, key),
        "curves": curves_of(run, styles, key, _LINE_BUDGET // of),
        "margin_accuracy": margin_accuracy_of(results, key),
        "gauge": gauge_sentence(results),
        "shaping": shaping_of(results, styles, key, _CLOUD_BUDGET // of // 2),
        "reward_model": reward_model_sentence(results),
        "lengths": responses.lengths_of(results, styles, key, _CLOUD_BUDGET // of // 2),
        "by_length": responses.by_length_of(results, styles, key),
        "samples": responses.samples_of(results, _TEXT_BUDGET // of),
        "read": read_of(results),
        "stages": stages_of(results),
        "recipe": cut(run["recipe"], 40_000) if run["recipe"] else None,
        "environment": flat(run["environment"]),
    }


def _facts(results: Results) -> list[str]:
    """Return the line under the title: how much was repeated."""
    facts = []
    seeds = [clean(seed) for seed in results.items("seeds") or [results.raw.get("seed")] if seed is not None]
    if seeds:
        facts.append(f"{plural(len(seeds), 'seed', 'seeds')} {', '.join(seeds)}")
    orders = number(results.raw.get("orders"))
    if orders is not None and math.isfinite(orders):
        facts.append(f"{orders:g} data {plural(int(orders), 'order', 'orders')} each")
    if results.baseline is not None:
        facts.append(f"compared with {results.display_name(results.baseline)}")
    return facts


def table_of(results: Results, styles: dict[str, Style]) -> View:
    """Return the table of methods by metrics, with role and comparison of each."""
    headline, baseline = results.headline, results.baseline
    rows = []
    for name, role in results.roles.items():
        comparison = compare(results, name)
        word = ROLE_WORDS.get(role.kind, comparison.word)
        rows.append(
            {
                "name": clean(name),
                "label": clean(results.mapping("labels").get(name, "")),
                "role": role.kind,
                "style": styles[name],
                "cells": [cell_of(results.score(name, column), column) for column in results.columns],
                "difference": cell_of(comparison.estimate, headline, sign=True) if headline else None,
                "interval": interval_of(comparison.estimate, headline) if headline else "",
                "word": "" if word == "-" else word,
            }
        )
    return {
        "metrics": [{"label": column.label, "better": column.higher_is_better} for column in results.columns],
        "baseline": results.display_name(baseline) if baseline else "",
        "compared": baseline is not None and any(map(results.difference, results.methods)),
        "over": _repeated(results),
        "rows": rows,
    }


def _repeated(results: Results) -> str:
    """Return what the paired differences were repeated over: "3 seeds"."""
    estimates = [d for d in map(results.difference, results.differences) if d and d.n and d.repeated]
    return " or ".join(dict.fromkeys(map(results.repeated, estimates)))


def _all_differences(results: Results) -> View | None:
    """Return every paired difference, where there are more than those of the headline metric."""
    names = [name for name in results.roles if name in results.differences]
    columns = [column for column in results.columns if any(results.difference(n, column) for n in names)]
    if len(columns) < 2 or results.baseline is None:
        return None
    rows = [
        {"name": clean(name), "cells": [cell_of(results.difference(name, c), c, sign=True) for c in columns]}
        for name in names
    ]
    return {"metrics": [column.label for column in columns], "rows": rows}


def _forest(results: Results, styles: dict[str, Style], key: str) -> View | None:
    column, baseline = results.headline, results.baseline
    if column is None or baseline is None:
        return None
    rows, words = [], []
    for name, role in results.roles.items():
        estimate = results.difference(name)
        if estimate is None or name == baseline:
            continue
        low, high = estimate.interval() or (None, None)
        text = estimate.text(column, sign=True)
        hollow = role.kind != "method"
        rows.append(figures.ForestRow(clean(name), estimate.mean, low, high, text, styles[name], control=hollow))
        span = f", 95 % interval {column.format(low)} to {column.format(high)}" if low is not None and high else ""
        words.append(f"{clean(name)} {text}{span}")
    if not rows:
        return None
    floor = noise_floor(results)
    base = results.display_name(baseline)
    left, right = {True: ("worse", "better"), False: ("better", "worse"), None: ("lower", "higher")}[
        column.higher_is_better
    ]
    alt = f"Paired difference to {base} on {column.label}. " + "; ".join(words) + "."
    if floor is not None:
        alt += f" Noise floor: {column.format(floor)} to either side of zero."
    sides: View = {"left": f"{left} than {base}", "right": f"{right} than {base}"}
    return {
        "svg": partial(figures.forest, rows, floor=floor, **sides, alt=alt, key=f"{key}-forest"),
        "metric": column.label,
        "baseline": base,
        "over": _repeated(results),
        "floor": column.format(floor) if floor is not None else None,
    }


def comparison_of(runs: list[Run]) -> list[View]:
    """Return a table for each metric that all runs share: methods by runs."""
    results: list[Results] = [run["results"] for run in runs]
    names = dict.fromkeys(name for one in results for name in one.methods)

    def cell(one: Results, name: str, column: Column) -> View:
        score = one.score(name, column)
        difference = one.difference(name, column) if score is not None and one.baseline != name else None
        return {
            "value": cell_of(score, column),
            "difference": cell_of(difference, column, sign=True) if difference else None,
        }

    return [
        {
            "metric": column.label,
            "runs": [run["name"] for run in runs],
            "rows": [{"name": clean(n), "cells": [cell(one, n, column) for one in results]} for n in names],
        }
        for column in results[0].columns
        if all(column.key in {other.key for other in one.all_columns} for one in results)
    ]
