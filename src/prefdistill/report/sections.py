"""Sections of the page: from a run to words, numbers as text and figures. A section without data is left out."""

import math
from typing import Any

from prefdistill.evaluation.results import (
    Column,
    Results,
    baseline_of,
    clean,
    columns_of,
    difference,
    display_name,
    headline_column,
    headline_method,
    mapping,
    number,
    repeats,
    roles_in,
    score,
)
from prefdistill.evaluation.verdict import compare, noise_floor, verdict
from prefdistill.report import responses
from prefdistill.report.format import bytes_of, cell_of, cut, duration, flat, interval_of, plural
from prefdistill.report.run import Run
from prefdistill.report.table import compare_runs
from prefdistill.report.teacher import gauge_sentence, margin_accuracy_of, shaping_of
from prefdistill.report.training import curves_of
from prefdistill.report.warnings import warnings_of

View = dict[str, Any]

# Limits of one page, shared by its runs: it stays under 1 MB for all but very many runs.
TEXT_BUDGET = 240_000  # characters of samples
_LINE_BUDGET = 10_000  # points of all mean curves
_CLOUD_BUDGET = 6_000  # points of all scatter plots
ROLE_WORDS = {"baseline": "baseline", "noise_floor": "noise floor"}  # in place of the outcome in the table


def title_of(runs: list[Run]) -> str:
    """Return the title of the page."""
    return f"{len(runs)} runs compared" if len(runs) > 1 else str(runs[0]["name"])


def view_of(run: Run, key: str, of: int) -> View:
    """Return all that the template needs for one run of `of`; an empty value leaves its section out."""
    from prefdistill.report import svg

    results: Results = run["results"]
    styles = svg.styles(roles_in(results), headline_method(results))
    return {
        "key": key,
        "name": run["name"],
        "path": run["path"],
        "task": clean(results.get("task", "")),
        "facts": facts_of(results),
        "verdict": verdict(results),
        "warnings": warnings_of(run),
        "notes": notes_of(run),
        "table": table_of(results, styles),
        "all_differences": _all_differences(results),
        "forest": _forest(results, styles, key),
        "curves": curves_of(run, styles, key, _LINE_BUDGET // of),
        "margin_accuracy": margin_accuracy_of(results, key),
        "gauge": gauge_sentence(results),
        "shaping": shaping_of(results, styles, key, _CLOUD_BUDGET // of // 2),
        "reward_model": responses.reward_model_of(results),
        "lengths": responses.lengths_of(results, styles, key, _CLOUD_BUDGET // of // 2),
        "by_length": responses.by_length_of(results, styles, key),
        "samples": responses.samples_of(results, TEXT_BUDGET // of),
        "stages": stages_of(results),
        "recipe": cut(run["recipe"], 40_000) if run["recipe"] else None,
        "environment": flat(run["environment"] or {}),
    }


def notes_of(run: Run) -> list[str]:
    """Return the notes of the results and on them."""
    return [str(note) for note in [*run["notes"], *run["results"].get("notes", [])]]


def facts_of(results: Results) -> list[str]:
    """Return the line under the title: how much was repeated."""
    facts = []
    seeds = _seeds(results)
    if seeds:
        facts.append(f"{plural(len(seeds), 'seed', 'seeds')} {', '.join(seeds)}")
    orders = number(results.get("orders"))
    if orders is not None and math.isfinite(orders):
        facts.append(f"{orders:g} data {plural(int(orders), 'order', 'orders')} each")
    baseline = baseline_of(results)
    if baseline is not None:
        facts.append(f"compared with {display_name(results, baseline)}")
    return facts


def _seeds(results: Results) -> list[str]:
    seeds = results.get("seeds")
    if isinstance(seeds, list):
        return [clean(seed) for seed in seeds]
    return [clean(results["seed"])] if results.get("seed") is not None else []


def table_of(results: Results, styles: dict[str, Any]) -> View:
    """Return the table of methods by metrics, with role and comparison of each."""
    columns, baseline, headline = columns_of(results), baseline_of(results), headline_column(results)
    compared = baseline is not None and any(difference(results, n, headline) for n in results["methods"])
    rows = []
    for name, role in roles_in(results).items():
        comparison = compare(results, name, headline)
        word = ROLE_WORDS.get(role.kind, comparison.word)
        rows.append(
            {
                "name": clean(name),
                "label": clean(mapping(results.get("labels")).get(name, "")),
                "role": role.kind,
                "style": styles[name],
                "cells": [cell_of(score(results, name, column), column) for column in columns],
                "difference": cell_of(comparison.estimate, headline, sign=True) if headline else None,
                "interval": interval_of(comparison.estimate, headline) if headline else "",
                "word": "" if word == "-" else word,
            }
        )
    return {
        "metrics": [{"label": column.label, "better": column.higher_is_better} for column in columns],
        "baseline": display_name(results, baseline) if baseline else "",
        "compared": compared,
        "over": _repeated(results, headline),
        "rows": rows,
    }


def _repeated(results: Results, column: Column | None) -> str:
    """Return what the paired differences were repeated over: "3 seeds"."""
    estimates = [d for n in mapping(results.get("differences")) if (d := difference(results, n, column))]
    return " or ".join(dict.fromkeys(f"{d.n} {repeats(results, d)}" for d in estimates if d.n and d.repeated))


def _all_differences(results: Results) -> View | None:
    """Return every paired difference, where there are more than those of the headline metric."""
    names = [name for name in roles_in(results) if name in mapping(results.get("differences"))]
    columns = [column for column in columns_of(results) if any(difference(results, n, column) for n in names)]
    if len(columns) < 2 or baseline_of(results) is None:
        return None
    rows = [
        {"name": clean(name), "cells": [cell_of(difference(results, name, c), c, sign=True) for c in columns]}
        for name in names
    ]
    return {"metrics": [column.label for column in columns], "rows": rows}


def _forest(results: Results, styles: dict[str, Any], key: str) -> View | None:
    from prefdistill.report import figures

    column, baseline = headline_column(results), baseline_of(results)
    if column is None or baseline is None:
        return None
    rows, words = [], []
    for name, role in roles_in(results).items():
        estimate = difference(results, name, column)
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
    floor = noise_floor(results, column)
    base = display_name(results, baseline)
    left, right = {
        True: (f"worse than {base}", f"better than {base}"),
        False: (f"better than {base}", f"worse than {base}"),
        None: (f"lower than {base}", f"higher than {base}"),
    }[column.higher_is_better]
    alt = f"Paired difference to {base} on {column.label}. " + "; ".join(words) + "."
    if floor is not None:
        alt += f" Noise floor: {column.format(floor)} to either side of zero."
    return {
        "svg": figures.forest(rows, floor=floor, left=left, right=right, alt=alt, key=f"{key}-forest"),
        "metric": column.label,
        "baseline": base,
        "over": _repeated(results, column),
        "floor": column.format(floor) if floor is not None else None,
    }


def stages_of(results: Results) -> View | None:
    """Return time, memory and disk by stage; all stages of one method and kind are one row."""
    groups: dict[str, dict[str, float]] = {}
    for stage in results.get("stages", []):
        about = mapping(stage)
        seconds = number(about.get("seconds"))
        if "name" not in about or seconds is None:
            continue
        kind, method = about.get("kind"), about.get("method")
        group = groups.setdefault(
            clean(f"{kind} {method}" if kind and method else about["name"]),
            {"seconds": 0.0, "runs": 0, "reused": 0, "peak_memory": 0.0, "bytes": 0.0},
        )
        group["seconds"] += seconds
        group["bytes"] += number(about.get("bytes")) or 0.0
        group["peak_memory"] = max(group["peak_memory"], number(about.get("peak_memory")) or 0.0)
        group["runs"] += 1
        group["reused"] += bool(about.get("reused"))
    if not groups:
        return None
    longest = max((g["seconds"] for g in groups.values() if math.isfinite(g["seconds"])), default=0.0)
    rows = []
    for name, g in groups.items():
        runs, reused = int(g["runs"]), int(g["reused"])
        share = g["seconds"] / longest if longest > 0 and math.isfinite(g["seconds"]) else 0.0
        rows.append(
            {
                "name": name,
                "runs": runs,
                "time": duration(g["seconds"]),
                "memory": bytes_of(g["peak_memory"]) if g["peak_memory"] else "",
                "disk": bytes_of(g["bytes"]) if g["bytes"] else "",
                "width": f"{100 * max(0.0, share):.1f}",
                "reused": "" if not reused else "reused" if reused == runs else f"{reused} of {runs} reused",
                "all_reused": reused == runs,
            }
        )
    return {
        "rows": rows,
        "total": duration(math.fsum(g["seconds"] for g in groups.values())),
        "disk": bytes_of(math.fsum(g["bytes"] for g in groups.values())),
        "any_reused": any(g["reused"] for g in groups.values()),
        "any_memory": any(g["peak_memory"] for g in groups.values()),
        "any_disk": any(g["bytes"] for g in groups.values()),
    }


def comparison_of(runs: list[Run]) -> list[View]:
    """Return a table for each metric that all runs share: methods by runs."""
    results = [run["results"] for run in runs]
    tables = []
    for column, names, rows in compare_runs(results):
        body = []
        for name, estimates in zip(names, rows, strict=True):
            cells = []
            for result, estimate in zip(results, estimates, strict=True):
                d = difference(result, name, column) if estimate is not None and baseline_of(result) != name else None
                cells.append(
                    {"value": cell_of(estimate, column), "difference": cell_of(d, column, sign=True) if d else None}
                )
            body.append({"name": clean(name), "cells": cells})
        tables.append({"metric": column.label, "runs": [run["name"] for run in runs], "rows": body})
    return tables
