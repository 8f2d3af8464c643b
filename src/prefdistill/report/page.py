"""The report: reads run directories and writes one self-contained page, as HTML or as markdown.

`load_run` reads, `_view` turns what was read into words, numbers-as-text and figures, `page.html.j2` lays them out.
Only `results.json` with its key "methods" is required; a section without data is left out. Text that came from a model
or from data is escaped by the template (HTML) or by `markdown_cell` and fenced blocks (markdown).
"""

import contextlib
import functools
import json
import math
import os
import re
import statistics
import tempfile
from collections import Counter
from pathlib import Path
from typing import Any

from prefdistill import __version__
from prefdistill.errors import UserError
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
    markdown_cell,
    markdown_table,
    method_table,
    metrics_of,
    noise_floor,
    number,
    pretty,
    repeats,
    role,
    verdict,
)

Run = dict[str, Any]
View = dict[str, Any]
Points = list[tuple[float, float]]

PANELS = {
    "loss": "loss",
    "rewards/margins": "reward margin",
    "rewards/accuracies": "reward accuracy",
    "logps/chosen": "log-prob of chosen",
    "logps/rejected": "log-prob of rejected",
    "shaping/margin_std": "spread of shaping margin",
}

# Optional sections of results.json and what they must be; anything else is left out and said so.
_SHAPES: dict[str, type | tuple[type, ...]] = {
    "differences": dict, "labels": dict, "metrics": dict, "margin_accuracy": dict, "shaping": dict,
    "samples": list, "stages": list, "warnings": list, "notes": list, "seeds": list, "controls": list,
    "recipe": str, "task": str, "baseline": str, "orders": (int, float),
}  # fmt: skip

# What one page may hold, shared by its runs: it stays under 1 MB for all but very many runs.
_TEXT_BUDGET = 240_000  # characters of samples
_LINE_BUDGET = 10_000  # points of all mean curves
_CLOUD_BUDGET = 6_000  # points of all scatters
_MAX_SAMPLES = 12
_MAX_POINTS = 500
_MAX_SCATTERS = 6


# ---------------------------------------------------------------------------------------------------------------------
# Reading
# ---------------------------------------------------------------------------------------------------------------------


def load_run(path: str | Path) -> Run:
    """Read one run directory.

    Returns {"path", "name", "results", "recipe", "environment", "curves", "problems"}: `recipe` is text or None,
    `environment` a dictionary or None, `curves` {stage: {metric: [run, ...]}} with a run a list of (step, value), and
    `problems` what could not be read of the optional parts, in words.

    Raises UserError where the directory or its results.json is missing or is not what a run writes.
    """
    path = Path(path)
    if path.name == "results.json" and path.is_file():
        path = path.parent
    if not path.exists():
        raise UserError(f"run directory {path} does not exist: give a directory that `prefdistill run` wrote")
    if not path.is_dir():
        raise UserError(f"{path} is not a directory: give the run directory that holds results.json")
    problems: list[str] = []
    results = _tidy(_results(path / "results.json"), problems)
    recipe = _text(path / "recipe.yaml", problems)
    environment = _environment(path / "environment.json", problems)
    name = clean(results.get("recipe") or path.resolve().name)
    return {
        "path": str(path),
        "name": name,
        "results": results,
        "recipe": recipe,
        "environment": environment,
        "curves": _curves(path, problems),
        "problems": problems,
    }


def _results(file: Path) -> Results:
    try:
        results = json.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(
            f"{file.parent} holds no results.json: the run has not finished; "
            "start the same `prefdistill run` again, it goes on where it stopped"
        ) from None
    except OSError as error:
        raise UserError(f"{file} cannot be read: {error.strerror or error}") from None
    except (UnicodeDecodeError, json.JSONDecodeError, RecursionError) as error:
        raise UserError(f"{file} is not valid JSON ({error}): delete it and start the run again") from None
    if not isinstance(results, dict) or not isinstance(results.get("methods"), dict) or not results["methods"]:
        raise UserError(f'{file} has no "methods": {{NAME: {{METRIC: number}}}}; is it the results.json of a run?')
    for name, scores in results["methods"].items():
        if not isinstance(scores, dict):
            raise UserError(f'{file}: "methods" -> "{clean(name)}" must be {{METRIC: number}}, not {scores!r:.40}')
    return results


def _tidy(results: Results, problems: list[str]) -> Results:
    """Leave out optional parts that have the wrong shape, and say so."""
    tidy = {}
    for key, value in results.items():
        if value is None:
            continue
        if key in _SHAPES and not isinstance(value, _SHAPES[key]):
            problems.append(f'results.json: "{key}" has an unexpected form and is left out')
            continue
        tidy[key] = value
    return tidy


def _text(file: Path, problems: list[str]) -> str | None:
    try:
        return file.read_text(encoding="utf-8", errors="replace")
    except FileNotFoundError:
        return None
    except OSError as error:
        problems.append(f"{file.name} could not be read: {error.strerror or error}")
        return None


def _environment(file: Path, problems: list[str]) -> dict[str, Any] | None:
    text = _text(file, problems)
    if text is None:
        return None
    try:
        environment = json.loads(text)
    except (json.JSONDecodeError, RecursionError):
        environment = None
    if not isinstance(environment, dict):
        problems.append(f"{file.name} is not a JSON object and is left out")
        return None
    return environment


def _curves(path: Path, problems: list[str]) -> dict[str, dict[str, list[Points]]]:
    """What every stage logged: {stage: {metric: [one line per seed]}}."""
    files = sorted(path.glob("seed-*/*/metrics.jsonl"), key=lambda f: _natural(str(f.relative_to(path))))
    files += sorted(f for f in path.glob("*/metrics.jsonl") if not f.parent.name.startswith("seed-"))
    curves: dict[str, dict[str, list[Points]]] = {}
    for file in files:
        logged: dict[str, dict[float, float]] = {}
        bad = 0
        try:
            with file.open(encoding="utf-8", errors="replace") as lines:
                for line in lines:
                    bad += not _log_line(line, logged)
        except OSError as error:
            problems.append(f"{file.relative_to(path)} could not be read: {error.strerror or error}")
        if bad:
            problems.append(f"{file.relative_to(path)}: {bad} {_plural(bad, 'line is', 'lines are')} not valid JSON")
        for key, steps in logged.items():
            line_ = sorted(steps.items())
            curves.setdefault(file.parent.name, {}).setdefault(key, []).append(line_)
            broken = [step for step, value in line_ if not math.isfinite(value)]
            if broken:
                where = f"{len(broken)} logged {_plural(len(broken), 'step', 'steps')}, the first at step {broken[0]:g}"
                problems.append(f"{file.parent.relative_to(path)}: {PANELS[key]} is {NOT_FINITE} at {where}")
    return curves


def _log_line(line: str, logged: dict[str, dict[float, float]]) -> bool:
    """Add one line of metrics.jsonl; a step that was logged twice (a resumed run) keeps its last value."""
    if not line.strip():
        return True
    try:
        entry = json.loads(line)
    except (json.JSONDecodeError, RecursionError):
        return False
    if not isinstance(entry, dict):
        return False
    step = number(entry.get("step"))
    if step is not None and math.isfinite(step):
        for key in PANELS:
            value = number(entry.get(key))
            if value is not None:
                logged.setdefault(key, {})[step] = value
    return True


# ---------------------------------------------------------------------------------------------------------------------
# Writing
# ---------------------------------------------------------------------------------------------------------------------


def render_html(runs: list[Path]) -> str:
    """The report on one or several run directories, as one HTML file that loads nothing from elsewhere."""
    loaded = _load(runs)
    views = [_view(run, f"run{i + 1}", len(loaded)) for i, run in enumerate(loaded)]
    html = _template().render(
        title=_title(loaded),
        views=views,
        comparison=_comparison(loaded) if len(loaded) > 1 else [],
        reading=_reading(loaded),
        version=__version__,
    )
    return _printable(html)


def render_markdown(runs: list[Path]) -> str:
    """The report as GitHub markdown: the tables and texts of the page, without its figures."""
    loaded = _load(runs)
    parts = [f"# {markdown_cell(_title(loaded))}"]
    if len(loaded) > 1:
        parts += _markdown_comparison(loaded)
    for run in loaded:
        parts += _markdown_run(run, heading="## " if len(loaded) > 1 else "", budget=_TEXT_BUDGET // len(loaded))
    parts += ["## How to read this", "\n".join(f"- **{term}**: {text}" for term, text in _reading(loaded))]
    return _printable("\n\n".join(part for part in parts if part) + "\n")


def write_report(runs: list[Path], out: str | Path, format: str = "html") -> Path:
    """Render `runs` and write the page to `out`; nothing is left half written. Returns `out`."""
    renderers = {"html": render_html, "md": render_markdown}
    if format not in renderers:
        raise UserError(f'unknown report format "{format}": use one of {", ".join(renderers)}')
    text = renderers[format]([Path(run) for run in runs])
    out = Path(out)
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        descriptor, name = tempfile.mkstemp(dir=out.parent, prefix=f".{out.name}.")
        try:
            with os.fdopen(descriptor, "wb") as file:
                file.write(text.encode())
            os.chmod(name, 0o644)
            os.replace(name, out)
        except BaseException:
            with contextlib.suppress(OSError):
                os.unlink(name)
            raise
    except OSError as error:
        raise UserError(f"the report cannot be written to {out}: {error.strerror or error}") from None
    return out


@functools.cache
def _template() -> Any:
    from jinja2 import Environment, PackageLoader, StrictUndefined

    environment = Environment(
        loader=PackageLoader("prefdistill.report", "."),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters["typeset"] = _typeset
    return environment.get_template("page.html.j2")


def _load(runs: list[Path]) -> list[Run]:
    if not runs:
        raise UserError("no run directory given: name at least one directory that holds results.json")
    loaded = [load_run(run) for run in runs]
    names = Counter(run["name"] for run in loaded)
    for run in loaded:
        if names[run["name"]] > 1:
            run["name"] = f"{run['name']} ({run['path']})"
    return loaded


def _title(runs: list[Run]) -> str:
    if len(runs) > 1:
        return f"{len(runs)} runs compared"
    return str(runs[0]["name"])


# ---------------------------------------------------------------------------------------------------------------------
# From a run to what the page shows
# ---------------------------------------------------------------------------------------------------------------------


def _view(run: Run, key: str, of: int) -> View:
    """All that the template needs for one run; an empty value leaves its section out."""
    from prefdistill.report import figures

    results: Results = run["results"]
    names = list(results["methods"])
    baseline = baseline_of(results)
    trained = [_method_of(stage, names) for stage in run["curves"]]
    styles = figures.styles(dict.fromkeys([*names, *(t for t in trained if t)]), baseline)
    return {
        "key": key,
        "name": run["name"],
        "path": run["path"],
        "task": clean(results.get("task", "")),
        "facts": _facts(results),
        "verdict": verdict(results),
        "warnings": _warnings(run),
        "notes": [str(note) for note in results.get("notes", [])],
        "table": _table_view(results, styles),
        "all_differences": _all_differences(results),
        "forest": _forest(results, styles, key),
        "curves": _curve_figures(run["curves"], names, styles, key, _LINE_BUDGET // of),
        "margin_accuracy": _margin_accuracy(results, key),
        "shaping": _shaping(results, styles, key, _CLOUD_BUDGET // of),
        "samples": _samples(results, _TEXT_BUDGET // of),
        "stages": _stages(results),
        "recipe": _cut(run["recipe"], 40_000) if run["recipe"] else None,
        "environment": _flat(run["environment"] or {}),
    }


def _facts(results: Results) -> list[str]:
    """The line under the title: how much was repeated."""
    facts = []
    seeds = _seeds(results)
    if seeds:
        facts.append(f"{_plural(len(seeds), 'seed', 'seeds')} {', '.join(seeds)}")
    orders = number(results.get("orders"))
    if orders is not None and math.isfinite(orders):
        facts.append(f"{orders:g} data {_plural(int(orders), 'order', 'orders')} each")
    baseline = baseline_of(results)
    if baseline is not None:
        facts.append(f"compared with {pretty(baseline)}")
    return facts


def _seeds(results: Results) -> list[str]:
    seeds = results.get("seeds")
    if isinstance(seeds, list):
        return [clean(seed) for seed in seeds]
    return [clean(results["seed"])] if results.get("seed") is not None else []


def _warnings(run: Run) -> list[str]:
    """What the pipeline warned of, what is not finite, and what could not be read."""
    results = run["results"]
    warnings = [str(w) for w in results.get("warnings", [])]
    for part in ("methods", "differences"):
        for name, scores in mapping(results.get(part)).items():
            bad = [k for k, v in mapping(scores).items() if (e := Estimate.parse(v)) is not None and not e.finite]
            if bad:
                what = "" if part == "methods" else "difference of "
                warnings.append(f"{clean(name)}: {what}{', '.join(map(clean, bad))} {NOT_FINITE}")
    warnings += run["problems"]
    shown = [_cut(w, 600) for w in warnings[:40]]
    if len(warnings) > len(shown):
        shown.append(f"... and {len(warnings) - len(shown)} more")
    return shown


def _number(estimate: Estimate | None, metric: Metric, *, sign: bool = False) -> dict[str, Any]:
    """A cell of a table: the mean, its standard error, and whether something is wrong with it."""
    if estimate is None:
        return {"mean": "–", "se": "", "bad": False}
    mean, _, se = estimate.text(metric, sign=sign).partition(" ± ")
    return {"mean": mean, "se": se, "bad": not estimate.finite}


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
                "cells": [_number(Estimate.parse(scores.get(m.key)), m) for m in metrics],
                "difference": _number(judgement.estimate, headline, sign=True) if headline else None,
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
        cells = [_number(difference(results, name, m), m, sign=True) for m in metrics]
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


def _method_of(stage: str, names: list[str]) -> str | None:
    """ "distill-tvkd-0" -> "tvkd": the method that a stage trained, None for the other stages."""
    if not stage.startswith("distill-"):
        return None
    rest = stage.removeprefix("distill-")
    known = [n for n in names if rest == n or rest.startswith(f"{n}-")]
    exact = re.sub(r"-(order-?)?\d+$", "", rest)
    return exact if exact in names or not known else max(known, key=len)


def _curve_figures(
    curves: dict[str, dict[str, list[Points]]], names: list[str], styles: dict[str, Any], key: str, budget: int
) -> View | None:
    """One panel per logged metric with a line per method; the stages before the students by themselves."""
    from prefdistill.report import figures

    methods: dict[str, dict[str, list[Points]]] = {panel: {} for panel in PANELS}
    before: dict[str, list[Points]] = {}
    for stage in sorted(curves, key=_natural):
        name = _method_of(stage, names)
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
        ends = [f"{clean(n)} {_last(figures.average(ls))}" for n, ls in runs.items()]
        alt = f"{title} by optimiser step. At the last step: {', '.join(ends)}."
        y_limits = shared if metric.startswith("logps/") else None
        panels.append(
            figures.curves(runs, styles, title=title, alt=alt, key=f"{key}-curve{i}", y_limits=y_limits, points=points),
        )
    early = []
    for i, (stage, lines) in enumerate(list(before.items())[:8]):
        end = _last(figures.average(lines))
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


def _shaping(results: Results, styles: dict[str, Any], key: str, budget: int) -> View | None:
    """The spread of the shaping margin beside that of the DPO margin, and a scatter of one against the other."""
    from prefdistill.report import figures

    metric = Metric("margin", "margin", None)
    rows, clouds = [], []
    for name, value in mapping(results.get("shaping")).items():
        about = mapping(value)
        std, dpo_std = number(about.get("std")), number(about.get("dpo_margin_std"))
        ratio = std / dpo_std if std is not None and dpo_std else None
        points = _points(about.get("points"))
        rows.append(
            {
                "name": clean(name),
                "cells": [_number(Estimate.parse(v), metric) for v in (about.get("mean"), std, dpo_std, ratio)],
                "agreement": _agreement(points),
            }
        )
        if points:
            clouds.append((clean(name), points, styles.get(name, figures.Style(figures.BLUE))))
    if not rows:
        return None
    clouds = clouds[:_MAX_SCATTERS]
    shown = max(40, budget // max(1, len(clouds)))
    x_limits = figures.limits(x for _, points, _ in clouds for x, _ in points)
    y_limits = figures.limits(y for _, points, _ in clouds for _, y in points)
    plots = [
        figures.scatter(
            points[:: math.ceil(len(points) / shown)],
            style,
            title=name,
            key=f"{key}-scatter{i}",
            x_limits=x_limits,
            y_limits=y_limits,
            alt=f"{len(points)} pairs: shaping margin of {name} against DPO margin. {_agreement(points)}.",
        )
        for i, (name, points, style) in enumerate(clouds)
    ]
    return {"rows": rows, "plots": plots}


def _points(value: Any) -> Points:
    points = []
    for item in value if isinstance(value, list) else []:
        if isinstance(item, list) and len(item) == 2:
            x, y = number(item[0]), number(item[1])
            if x is not None and y is not None and math.isfinite(x) and math.isfinite(y):
                points.append((x, y))
    return points[:_MAX_POINTS]


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


def _samples(results: Results, budget: int) -> list[View]:
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
            cards.append({"name": clean(name), "text": _cut(_string(responses[name]), limit), "score": score})
        longest = max((len(card["text"]) for card in cards), default=0)
        samples.append(
            {"prompt": _cut(_string(sample.get("prompt", "")), limit), "cards": cards, "long": longest > 160}
        )
    return samples


def _stages(results: Results) -> View | None:
    """Time by kind of stage: the same stage of several seeds and data orders is added up."""
    groups: dict[str, dict[str, float]] = {}
    names = list(results["methods"])
    for stage in results.get("stages", []):
        about = mapping(stage)
        seconds = number(about.get("seconds"))
        if "name" not in about or seconds is None:
            continue
        name = clean(about["name"])
        method = _method_of(name, names)
        group = groups.setdefault(f"distill-{method}" if method else name, {"seconds": 0.0, "runs": 0, "reused": 0})
        group["seconds"] += seconds
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
                "time": _duration(g["seconds"]),
                "width": f"{100 * max(0.0, share):.1f}",
                "reused": "" if not reused else "reused" if reused == runs else f"{reused} of {runs} reused",
                "all_reused": reused == runs,
            }
        )
    return {
        "rows": rows,
        "total": _duration(math.fsum(g["seconds"] for g in groups.values())),
        "any_reused": any(g["reused"] for g in groups.values()),
    }


def _reading(runs: list[Run]) -> list[tuple[str, str]]:
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


def _comparison(runs: list[Run]) -> list[View]:
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
                    {"value": _number(estimate, metric), "difference": _number(d, metric, sign=True) if d else None}
                )
            body.append({"name": clean(name), "cells": cells})
        tables.append({"metric": metric.label, "runs": [run["name"] for run in runs], "rows": body})
    return tables


# ---------------------------------------------------------------------------------------------------------------------
# Markdown
# ---------------------------------------------------------------------------------------------------------------------


def _markdown_run(run: Run, *, heading: str, budget: int) -> list[str]:
    results: Results = run["results"]
    level = "#" * (3 if heading else 2)
    parts = [f"{heading}{markdown_cell(run['name'])}"] if heading else []
    parts.append(f"**{markdown_cell(verdict(results))}**")
    about = [clean(results.get("task", "")), "; ".join(_facts(results))]
    parts += [markdown_cell(line) for line in about if line]
    warnings = _warnings(run)
    if warnings:
        parts.append("> [!WARNING]\n" + "\n".join(f"> - {markdown_cell(w)}" for w in warnings))
    parts += [f"{level} Methods", method_table(results, markdown=True)]
    labels = mapping(results.get("labels"))
    named = [f"- {markdown_cell(n)}: {markdown_cell(labels[n])}" for n in results["methods"] if labels.get(n)]
    parts.append("\n".join(named))

    accuracy = Metric("accuracy", "margin accuracy", True)
    terms = [
        [markdown_cell(t), e.text(accuracy)]
        for t, v in mapping(results.get("margin_accuracy")).items()
        if (e := Estimate.parse(v))
    ]
    if terms:
        parts += [
            f"{level} Margin accuracy",
            markdown_table(["term", "fraction of held-out pairs ordered right"], terms),
        ]
    shaping = []
    for name, value in mapping(results.get("shaping")).items():
        about_ = mapping(value)
        numbers = [_number(Estimate.parse(about_.get(k)), accuracy)["mean"] for k in ("mean", "std", "dpo_margin_std")]
        shaping.append([markdown_cell(name), *numbers])
    if shaping:
        header = ["method", "mean shaping margin", "its spread", "spread of the DPO margin"]
        parts += [f"{level} Shaping margin", markdown_table(header, shaping)]

    samples = _samples(results, budget)
    if samples:
        parts.append(f"{level} Samples")
        for sample in samples:
            parts.append("Prompt:\n\n" + _fence(sample["prompt"]))
            for card in sample["cards"]:
                score = f" (score {card['score']})" if card["score"] else ""
                parts.append(f"{markdown_cell(card['name'])}{score}:\n\n" + _fence(card["text"]))
    stages = _stages(results)
    if stages:
        rows = [[markdown_cell(r["name"]), str(r["runs"]), r["time"], r["reused"]] for r in stages["rows"]]
        parts += [f"{level} Time", markdown_table(["stage", "runs", "time", ""], rows)]
    notes = [f"- {markdown_cell(n)}" for n in results.get("notes", [])]
    if notes:
        parts += [f"{level} Notes", "\n".join(notes)]
    parts += _markdown_provenance(run, level)
    return parts


def _markdown_provenance(run: Run, level: str) -> list[str]:
    parts = []
    if run["recipe"]:
        recipe = _fence(_cut(run["recipe"], 40_000), "yaml")
        parts.append(f"<details><summary>Recipe</summary>\n\n{recipe}\n\n</details>")
    rows = [[markdown_cell(k), markdown_cell(v)] for k, v in _flat(run["environment"] or {})]
    if rows:
        parts.append(markdown_table(["environment", ""], rows, left=2))
    return [f"{level} Provenance", *parts] if parts else []


def _markdown_comparison(runs: list[Run]) -> list[str]:
    parts = ["## Comparison"]
    for table in _comparison(runs):
        rows = []
        for row in table["rows"]:
            cells = []
            for cell in row["cells"]:
                value, d = cell["value"], cell["difference"]
                text = f"{value['mean']} ± {value['se']}" if value["se"] else value["mean"]
                if d:
                    text += f" ({d['mean']} ± {d['se']})" if d["se"] else f" ({d['mean']})"
                cells.append(text)
            rows.append([markdown_cell(row["name"]), *cells])
        header = [markdown_cell(table["metric"]), *map(markdown_cell, table["runs"])]
        parts.append(markdown_table(header, rows))
    if len(parts) == 1:
        parts.append("The runs share no metric.")
    else:
        parts.append("In brackets: the paired difference to each run's own baseline.")
    return parts


def _fence(text: str, language: str = "") -> str:
    """A code block whose fence is longer than any in `text`."""
    ticks = "`" * max(3, 1 + max((len(t) for t in re.findall("`+", text)), default=0))
    return f"{ticks}{language}\n{text}\n{ticks}"


# ---------------------------------------------------------------------------------------------------------------------
# Small things
# ---------------------------------------------------------------------------------------------------------------------


def _flat(value: dict[str, Any], prefix: str = "") -> list[tuple[str, str]]:
    """Nested environment values as dotted names and text."""
    rows: list[tuple[str, str]] = []
    for key, item in value.items():
        name = f"{prefix}{clean(key)}"
        if isinstance(item, dict) and item and prefix.count(".") < 4:
            rows += _flat(item, f"{name}.")
        else:
            text = ", ".join(map(str, item)) if isinstance(item, list) else _string(item)
            rows.append((name, _cut(text, 1_000)))
    return rows[:300]


def _string(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)


def _cut(text: str, limit: int) -> str:
    return text if len(text) <= limit else f"{text[:limit]} … (cut here: {len(text):,} characters in all)"


def _duration(seconds: float) -> str:
    if not math.isfinite(seconds):
        return NOT_FINITE
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes} min {rest:02d} s" if minutes < 60 else f"{minutes // 60} h {minutes % 60:02d} min"


def _printable(text: str) -> str:
    """Control characters as their pictures, so that no browser or terminal guesses; lone surrogates as "?"."""
    pictures = {i: 0x2400 + i for i in range(32) if chr(i) not in "\t\n\r"}
    return text.encode("utf-8", errors="replace").decode().translate(pictures)


def _typeset(text: str) -> str:
    """A true minus before numbers, and no line break inside "0.1 ± 0.2" or "95 %"."""
    text = re.sub(r"(?<![\w.)])-(?=[\d.])", "−", text)
    return re.sub(r"(?<=\d) (?=[±%])|(?<=±) (?=\d)", "\u00a0", text)


def _plural(n: int, one: str, many: str) -> str:
    return one if n == 1 else many


def _natural(text: str) -> list[Any]:
    """Sort "seed-10" after "seed-2"."""
    return [int(part) if part.isdigit() else part for part in re.split(r"(\d+)", text)]
