"""What each section of the page shows: from a run to words, numbers as text and figures; no data, no section."""

import math
import re
import statistics
from typing import Any

from prefdistill.report import generations
from prefdistill.report.run import PANELS, Points, Run, average
from prefdistill.report.table import (
    NOT_FINITE,
    Estimate,
    Metric,
    Results,
    baseline_of,
    clean,
    comparison,
    difference,
    judge,
    mapping,
    metrics_of,
    noise_floor,
    number,
    pretty,
    repeats,
    role,
    verdict,
)
from prefdistill.report.text import (
    bytes_of,
    cell_of,
    cut,
    duration,
    flat,
    interval_of,
    natural,
    plural,
    points_of,
    string,
)
from prefdistill.report.warnings import method_of, warnings_of

View = dict[str, Any]

# What one page may hold, shared by its runs: it stays under 1 MB for all but very many runs.
TEXT_BUDGET = 240_000  # characters of samples
_LINE_BUDGET = 10_000  # points of all mean curves
_CLOUD_BUDGET = 6_000  # points of all scatters
_MAX_SAMPLES = 12
_MAX_SCATTERS = 6


def title_of(runs: list[Run]) -> str:
    if len(runs) > 1:
        return f"{len(runs)} runs compared"
    return str(runs[0]["name"])


def view_of(run: Run, key: str, of: int) -> View:
    """All that the template needs for one run; an empty value leaves its section out."""
    from prefdistill.report import figures

    results: Results = run["results"]
    names = list(results["methods"])
    baseline = baseline_of(results)
    trained = [method_of(stage, names) for stage in run["curves"]]
    styles = figures.styles(dict.fromkeys([*names, *(t for t in trained if t)]), baseline)
    return {
        "key": key,
        "name": run["name"],
        "path": run["path"],
        "task": clean(results.get("task", "")),
        "facts": facts_of(results),
        "verdict": verdict(results),
        "warnings": warnings_of(run),
        "notes": [str(note) for note in results.get("notes", [])],
        "table": _table_view(results, styles),
        "all_differences": _all_differences(results),
        "forest": _forest(results, styles, key),
        "curves": _curve_figures(run["curves"], names, styles, key, _LINE_BUDGET // of),
        "margin_accuracy": _margin_accuracy(results, key),
        "gauge": gauge_sentence(results),
        "shaping": _shaping(results, styles, key, _CLOUD_BUDGET // of // 2),
        "judge": generations.judge_of(results),
        "lengths": generations.lengths_of(results, styles, key, _CLOUD_BUDGET // of // 2),
        "by_length": generations.by_length_of(results, styles, key),
        "samples": samples_of(results, TEXT_BUDGET // of),
        "stages": stages_of(results),
        "recipe": cut(run["recipe"], 40_000) if run["recipe"] else None,
        "environment": flat(run["environment"] or {}),
    }


def facts_of(results: Results) -> list[str]:
    """The line under the title: how much was repeated."""
    facts = []
    seeds = _seeds(results)
    if seeds:
        facts.append(f"{plural(len(seeds), 'seed', 'seeds')} {', '.join(seeds)}")
    orders = number(results.get("orders"))
    if orders is not None and math.isfinite(orders):
        facts.append(f"{orders:g} data {plural(int(orders), 'order', 'orders')} each")
    baseline = baseline_of(results)
    if baseline is not None:
        facts.append(f"compared with {pretty(baseline)}")
    return facts


def _seeds(results: Results) -> list[str]:
    seeds = results.get("seeds")
    if isinstance(seeds, list):
        return [clean(seed) for seed in seeds]
    return [clean(results["seed"])] if results.get("seed") is not None else []


def _table_view(results: Results, styles: dict[str, Any]) -> View:
    metrics, baseline = metrics_of(results), baseline_of(results)
    headline = metrics[0] if metrics else None
    compared = baseline is not None and any(difference(results, n, headline) for n in results["methods"])
    rows = []
    for name, scores in results["methods"].items():
        kind = role(results, name)
        judgement = judge(results, name, headline)
        word = judgement.word if kind != "baseline" else "baseline"
        if name.endswith("other-order") and judgement.estimate is not None:
            word = "noise floor"
        rows.append(
            {
                "name": clean(name),
                "label": clean(mapping(results.get("labels")).get(name, "")),
                "role": kind,
                "style": styles[name],
                "cells": [cell_of(Estimate.parse(scores.get(m.key)), m) for m in metrics],
                "difference": cell_of(judgement.estimate, headline, sign=True) if headline else None,
                "interval": interval_of(judgement.estimate, headline) if headline else "",
                "word": "" if word == "-" else word,
            }
        )
    return {
        "metrics": [{"label": m.label, "better": m.higher_is_better} for m in metrics],
        "baseline": pretty(baseline) if baseline else "",
        "compared": compared,
        "over": _repeated(results, headline),
        "rows": rows,
    }


def _repeated(results: Results, metric: Metric | None) -> str:
    """What the paired differences were repeated over: "3 seeds"."""
    found = [d for n in mapping(results.get("differences")) if (d := difference(results, n, metric))]
    found = [d for d in found if d.n and d.repeated]
    return " or ".join(dict.fromkeys(f"{d.n} {repeats(results, d)}" for d in found))


def _all_differences(results: Results) -> View | None:
    """Every paired difference, where there are more than those of the headline metric."""
    rows = []
    metrics = [
        m for m in metrics_of(results) if any(difference(results, n, m) for n in mapping(results.get("differences")))
    ]
    if len(metrics) < 2 or baseline_of(results) is None:
        return None
    for name in mapping(results.get("differences")):
        cells = [cell_of(difference(results, name, m), m, sign=True) for m in metrics]
        rows.append({"name": clean(name), "cells": cells})
    return {"metrics": [m.label for m in metrics], "rows": rows}


def _forest(results: Results, styles: dict[str, Any], key: str) -> View | None:
    from prefdistill.report import figures

    metrics, baseline = metrics_of(results), baseline_of(results)
    if not metrics or baseline is None:
        return None
    metric = metrics[0]
    rows, words = [], []
    for name in mapping(results.get("differences")):
        estimate = difference(results, name, metric)
        if estimate is None or name == baseline:
            continue
        low, high = estimate.interval() or (None, None)
        text = estimate.text(metric, sign=True)
        control = role(results, name) != "method"
        rows.append(
            figures.ForestRow(
                clean(name), estimate.mean, low, high, text, styles.get(name, figures.Style()), control=control
            )
        )
        span = f", 95 % interval {metric.format(low)} to {metric.format(high)}" if low is not None and high else ""
        words.append(f"{clean(name)} {text}{span}")
    if not rows:
        return None
    floor = noise_floor(results, metric)
    base = pretty(baseline)
    left, right = {
        True: (f"worse than {base}", f"better than {base}"),
        False: (f"better than {base}", f"worse than {base}"),
        None: (f"lower than {base}", f"higher than {base}"),
    }[metric.higher_is_better]
    alt = f"Paired difference to {base} on {metric.label}. " + "; ".join(words) + "."
    if floor is not None:
        alt += f" Noise floor: {metric.format(floor)} to either side of zero."
    return {
        "svg": figures.forest(rows, floor=floor, left=left, right=right, alt=alt, key=f"{key}-forest"),
        "metric": metric.label,
        "baseline": base,
        "over": _repeated(results, metric),
        "floor": metric.format(floor) if floor is not None else None,
    }


def _curve_figures(
    curves: dict[str, dict[str, list[Points]]], names: list[str], styles: dict[str, Any], key: str, budget: int
) -> View | None:
    """One panel per logged metric with a line per method; the stages before the students by themselves."""
    from prefdistill.report import figures

    methods: dict[str, dict[str, list[Points]]] = {panel: {} for panel in PANELS}
    before: dict[str, list[Points]] = {}
    for stage in sorted(curves, key=natural):
        name = method_of(stage, names)
        for metric, lines in curves[stage].items():
            if name is not None:
                methods[metric].setdefault(name, []).extend(lines)
            elif metric == "loss":
                before[stage] = lines
    order = {name: i for i, name in enumerate(names)}
    logps = [v for m in ("logps/chosen", "logps/rejected") for ls in methods[m].values() for ln in ls for _, v in ln]
    shared = figures.limits(logps, zero=False)
    points = max(20, min(80, budget // max(1, sum(map(len, methods.values())))))
    panels = []
    for i, (metric, title) in enumerate(PANELS.items()):
        runs = dict(sorted(methods[metric].items(), key=lambda item: order.get(item[0], len(order))))
        if not runs:
            continue
        ends = [f"{clean(n)} {_last(average(ls))}" for n, ls in runs.items()]
        alt = f"{title} by optimiser step. At the last step: {', '.join(ends)}."
        y_limits = shared if metric.startswith("logps/") else None
        panels.append(
            figures.curves(runs, styles, title=title, alt=alt, key=f"{key}-curve{i}", y_limits=y_limits, points=points),
        )
    early = []
    for i, (stage, lines) in enumerate(list(before.items())[:8]):
        end = _last(average(lines))
        early.append(
            figures.curves(
                {stage: lines},
                {stage: figures.Style(figures.BLUE)},
                title=f"{clean(stage)}: loss",
                alt=f"Training loss of {clean(stage)} by step; at the last step {end}.",
                key=f"{key}-early{i}",
            )
        )
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


def _margin_accuracy(results: Results, key: str) -> View | None:
    from prefdistill.report import figures

    metric = Metric("accuracy", "margin accuracy", True)
    found = [
        (clean(term), e)
        for term, v in mapping(results.get("margin_accuracy")).items()
        if (e := Estimate.parse(v)) is not None
    ]
    if not found:
        return None
    rows = [
        (term, e.mean, e.se, e.text(metric), re.search(r"shaping|psi|value|tvkd", term.lower()) is not None)
        for term, e in found
    ]
    alt = "Fraction of held-out pairs that each term orders right; one half is chance. "
    alt += "; ".join(f"{term} {text}" for term, _, _, text, _ in rows) + "."
    return {"svg": figures.bars(rows, title="Margin accuracy", alt=alt, key=f"{key}-accuracy")}


def gauge_sentence(results: Results) -> str | None:
    """How much of the value's word is its gauge."""
    flips = Estimate.parse(results.get("gauge_flips"))
    if flips is None:
        return None
    share = Metric("flips", "share of pairs", False)
    return (
        "Adding u·h(s) to all logits of a state changes no probability, but it moves the value: for random u as long "
        f"as a row of the head, {flips.text(share)} of the pairs change their order by the shaping return (0 if the "
        "policy alone fixed it, one half if nothing did)."
    )


def _shaping(results: Results, styles: dict[str, Any], key: str, budget: int) -> View | None:
    """The spread of the shaping margin beside that of the DPO margin, and a scatter of one against the other."""
    from prefdistill.report import figures

    metric = Metric("margin", "margin", None)
    rows, clouds = [], []
    for name, value in mapping(results.get("shaping")).items():
        about = mapping(value)
        std, dpo_std = number(about.get("std")), number(about.get("dpo_margin_std"))
        ratio = std / dpo_std if std is not None and dpo_std else None
        points = points_of(about.get("points"))
        rows.append(
            {
                "name": clean(name),
                "cells": [cell_of(Estimate.parse(v), metric) for v in (about.get("mean"), std, dpo_std, ratio)],
                "agreement": _agreement(points),
            }
        )
        if points:
            clouds.append((clean(name), points, styles.get(name, figures.Style(figures.BLUE))))
    if not rows:
        return None
    plots = figures.clouds(
        [
            (
                name,
                points,
                style,
                f"{len(points)} pairs: shaping margin of {name} against DPO margin. {_agreement(points)}.",
            )
            for name, points, style in clouds[:_MAX_SCATTERS]
        ],
        labels=("DPO margin", "shaping margin"),
        key=f"{key}-scatter",
        budget=budget,
        zero=True,
    )
    return {"rows": rows, "plots": plots}


def _agreement(points: Points) -> str:
    """How much two margins say the same: correlation, and the share of pairs on which their signs agree."""
    if len(points) < 3:
        return ""
    agree = sum(1.0 if x * y > 0 else 0.5 if x * y == 0 else 0.0 for x, y in points) / len(points)
    try:
        r = f"correlation {statistics.correlation([x for x, _ in points], [y for _, y in points]):+.2f}, "
    except statistics.StatisticsError:
        r = ""
    return f"{r}same sign in {agree:.0%} of pairs"


def samples_of(results: Results, budget: int) -> list[View]:
    names = list(results["methods"])
    found = [s for s in results.get("samples", []) if isinstance(s, dict)][:_MAX_SAMPLES]
    size = sum(len(mapping(s.get("responses"))) + 1 for s in found)
    limit = max(200, min(3_000, budget // max(size, 1)))
    samples = []
    for sample in found:
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


def stages_of(results: Results) -> View | None:
    """Time by kind of stage: the same stage of several seeds and data orders is added up."""
    groups: dict[str, dict[str, float]] = {}
    names = list(results["methods"])
    for stage in results.get("stages", []):
        about = mapping(stage)
        seconds = number(about.get("seconds"))
        if "name" not in about or seconds is None:
            continue
        name = clean(about["name"])
        method = method_of(name, names)
        group = groups.setdefault(
            f"distill-{method}" if method else name,
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


def reading_of(runs: list[Run]) -> list[tuple[str, str]]:
    """Short plain words on what the page shows; only what occurs in it."""
    names = [n for run in runs for n in run["results"]["methods"]]
    keys = " ".join(f"{m.key} {m.label}" for run in runs for m in metrics_of(run["results"]))
    over = {
        repeats(run["results"], d)
        for run in runs
        for n in run["results"]["methods"]
        for m in metrics_of(run["results"])[:1]
        if (d := difference(run["results"], n, m))
    }
    words = [
        (
            "±",
            "the standard error of the mean over the repeats: how far the mean would move if all of it were repeated. "
            "It is not the spread of single runs.",
        )
    ]
    if over:
        words.append(
            (
                "Difference",
                "paired: within each repeat a method and the baseline share the student's start, the pairs and the "
                "test prompts, so what varies between starts cancels. Compare differences, not levels.",
            )
        )
        words.append(
            (
                "Ahead, behind",
                "the difference is larger than two standard errors and than the noise floor, and its 95 % interval "
                "(Student's t, wide where repeats are few) excludes zero. “Leans”: the interval still includes zero. "
                "“Within noise”: anything smaller. Nothing is corrected for comparing many methods.",
            )
        )
    if "data orders" in over:
        words.append(
            (
                "Data orders",
                "the repeats differ only in the order of the training data. They say nothing about another seed, "
                "that is another teacher, other pairs and another start.",
            )
        )
    if any(n.endswith("other-order") for n in names):
        words.append(
            (
                "Noise floor",
                "the baseline against itself with another data order. That difference should be zero; a method has to "
                "move further than this to have done anything.",
            )
        )
    if any("shuffled" in n for n in names):
        words.append(
            (
                "Placebo (shuffled)",
                "the same method with the teacher's values of another row. If it does as well, the values are not why.",
            )
        )
    if any("oracle" in n for n in names):
        words.append(
            (
                "Oracle",
                "the true reward's margin in place of the teacher's: what one could hope for from a perfect term, "
                "not a method one could use.",
            )
        )
    if "T=1" in keys or "sampled" in keys:
        words.append(
            (
                "T=1",
                "responses are sampled at temperature 1: what the model does on average. Greedy decoding takes the "
                "most likely token instead and hides how often it errs.",
            )
        )
    if any(run["results"].get("margin_accuracy") for run in runs):
        words.append(
            (
                "Margin accuracy",
                "the fraction of held-out pairs in which a term is larger for the better response, a tie counting one "
                "half. One half is chance; compare the shaping term with the simple ones beside it, such as length.",
            )
        )
    if any(run["curves"] for run in runs):
        words.append(("Loss", "methods have different losses; compare shapes, not heights."))
    return words


def comparison_of(runs: list[Run]) -> list[View]:
    """For each metric that all runs share: methods by runs."""
    results = [run["results"] for run in runs]
    tables = []
    for metric, names, rows in comparison(results):
        body = []
        for name, estimates in zip(names, rows, strict=True):
            cells = []
            for result, estimate in zip(results, estimates, strict=True):
                d = difference(result, name, metric) if estimate is not None and baseline_of(result) != name else None
                cells.append(
                    {"value": cell_of(estimate, metric), "difference": cell_of(d, metric, sign=True) if d else None}
                )
            body.append({"name": clean(name), "cells": cells})
        tables.append({"metric": metric.label, "runs": [run["name"] for run in runs], "rows": body})
    return tables
