"""Read a run directory: its results, recipe, environment and training logs, and what of these is unreadable.

Only `results.json` with its key "methods" is required.
"""

import json
import math
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from prefdistill.core.errors import UserError
from prefdistill.evaluation.results import NOT_FINITE, Results, clean, mapping, number
from prefdistill.report.format import plural

Run = dict[str, Any]
Points = list[tuple[float, float]]
Lines = dict[str, list[Points]]  # by logged metric, one line per seed and data order

NO_ROLES = (
    "results.json declares no roles, as older versions did not: every run counts as a method, without a baseline or "
    "controls. To rebuild it from the finished steps: prefdistill run {path}/recipe.yaml --out {path}, with `control: "
    "true` in the recipe replaced as the error message says."
)

PANELS = {
    "loss": "loss",
    "rewards/margins": "reward margin",
    "rewards/accuracies": "reward accuracy",
    "logps/chosen": "log-prob of chosen",
    "logps/rejected": "log-prob of rejected",
    "shaping/margins_abs": "size of shaping margin",
}

# Optional sections of results.json and their types; one of another type counts as missing, with a warning.
_SECTIONS: dict[type | tuple[type, ...], str] = {
    dict: "differences gaps labels metrics margin_accuracy shaping gauge_flips responses by_length reward_model roles "
    "headline display_names read",
    list: "samples stages warnings notes seeds",
    str: "recipe task",
    (int, float): "orders",
}


def average(lines: list[Points]) -> Points:
    """Return the mean of several lines at the steps that all of them have."""
    tables = [dict(line) for line in lines]
    shared = set(tables[0]).intersection(*tables[1:]) if tables else set()
    return [(step, math.fsum(t[step] for t in tables) / len(tables)) for step in sorted(shared)]


def load_run(path: str | Path) -> Run:
    """Read one run directory.

    Returns:
        {"path", "name", "results", "recipe", "environment", "curves", "early", "problems", "notes"}: `results` is a
        `Results`, `recipe` text or None, `environment` a dictionary, `curves` the training logs by method,
        {method: {metric: [line]}} with a line a list of (step, value), `early` those of the other steps by name,
        `problems` the optional parts that could not be read, in words, and `notes` those of the results and on them.

    Raises:
        UserError: if the directory or its results.json is missing or is not what a run writes.
    """
    path = Path(path)
    if path.name == "results.json" and path.is_file():
        path = path.parent
    if not path.exists():
        raise UserError(f"run directory {path} does not exist: name a directory that `prefdistill run` wrote")
    if not path.is_dir():
        raise UserError(f"{path} is not a directory: name the run directory that holds results.json")
    problems: list[str] = []
    results = _results(path / "results.json", problems)
    curves, early = _curves(path, results, problems)
    return {
        "path": str(path),
        "name": results.text("recipe") or clean(path.resolve().name),
        "results": results,
        "recipe": _text(path / "recipe.yaml", problems),
        "environment": _environment(path / "environment.json", problems),
        "curves": curves,
        "early": early,
        "problems": problems,
        "notes": [
            *([] if results.mapping("roles") else [NO_ROLES.format(path=path)]),
            *map(str, results.items("notes")),
        ],
    }


def load_runs(runs: list[Path]) -> list[Run]:
    """Read several run directories; runs of the same name get their path beside it."""
    if not runs:
        raise UserError("no run directory given: name at least one directory that holds results.json")
    loaded = [load_run(run) for run in runs]
    names = Counter(run["name"] for run in loaded)
    for run in loaded:
        if names[run["name"]] > 1:
            run["name"] = f"{run['name']} ({run['path']})"
    return loaded


def _results(file: Path, problems: list[str]) -> Results:
    try:
        raw = json.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError:
        why = " of a run: name a directory that `prefdistill run` wrote"
        if (file.parent / "recipe.yaml").is_file():
            why = ": the run has not finished; start the same `prefdistill run` again, it resumes"
        raise UserError(f"{file.parent} holds no results.json{why}") from None
    except OSError as error:
        raise UserError(f"{file} cannot be read: {error.strerror or error}") from None
    except (UnicodeDecodeError, json.JSONDecodeError, RecursionError) as error:
        raise UserError(f"{file} is not valid JSON ({error}): delete it and start the run again") from None
    if not (methods := mapping(mapping(raw).get("methods"))):
        raise UserError(f'{file} has no "methods": {{NAME: {{METRIC: number}}}}; is it the results.json of a run?')
    for name, scores in methods.items():
        if not isinstance(scores, dict):
            raise UserError(f'{file}: "methods" -> "{clean(name)}" must be {{METRIC: number}}, not {scores!r:.40}')
    for kind, keys in _SECTIONS.items():
        for key in keys.split():
            if raw.get(key) is not None and not isinstance(raw[key], kind):
                problems.append(f'results.json: "{key}" has an unexpected form and is left out')
    return Results(raw)


def _text(file: Path, problems: list[str]) -> str | None:
    try:
        return file.read_text(encoding="utf-8", errors="replace")
    except FileNotFoundError:
        return None
    except OSError as error:
        problems.append(f"{file.name} could not be read: {error.strerror or error}")
        return None


def _environment(file: Path, problems: list[str]) -> dict[str, Any]:
    text = _text(file, problems)
    environment = {} if text is None else _json_object(text)
    if environment is None:
        problems.append(f"{file.name} is not a JSON object and is left out")
    return environment or {}


def _json_object(text: str) -> dict[str, Any] | None:
    try:
        value = json.loads(text)
    except (json.JSONDecodeError, RecursionError):
        return None
    return value if isinstance(value, dict) else None


def _curves(path: Path, results: Results, problems: list[str]) -> tuple[dict[str, Lines], dict[str, Lines]]:
    """Return the training logs by method, of the last round of each, and those of the steps before by name.

    Only the steps that the results name are read: an earlier run may have left others in the directory.
    """
    last: dict[str, tuple[float, str | None, dict[str, Any]]] = {}  # by name or method, seed and order
    for step in map(mapping, results.items("stages")):
        method = step.get("method") if step.get("kind") == "distill" else None
        method = method if isinstance(method, str) and method in results.methods else None
        identity = json.dumps([step.get("name"), None] if method is None else [method, step.get("order")])
        identity += json.dumps(step.get("seed"))
        done = number(step.get("round")) or 0.0
        if isinstance(step.get("directory"), str) and done >= last.get(identity, (0.0,))[0]:
            last[identity] = done, method, step
    curves: dict[str, Lines] = {name: {} for name in results.methods}
    early: dict[str, Lines] = {}
    for _, method, step in last.values():
        file = path / step["directory"] / "metrics.jsonl"
        if not file.resolve().is_relative_to(path.resolve()) or not file.is_file():
            continue
        lines = early.setdefault(str(step.get("name")), {}) if method is None else curves[method]
        for metric, line in _read_log(file, path, problems).items():
            lines.setdefault(metric, []).append(line)
    curves, early = ({name: lines for name, lines in part.items() if lines} for part in (curves, early))
    return curves, early


def _read_log(file: Path, path: Path, problems: list[str]) -> dict[str, Points]:
    """Return the line of every logged metric in one metrics.jsonl; of a step logged twice (resumed) the last value."""
    entries = [_json_object(line) for line in (_text(file, problems) or "").split("\n") if line.strip()]
    if bad := entries.count(None):
        problems.append(f"{file.relative_to(path)}: {bad} {plural(bad, 'line is', 'lines are')} not valid JSON")
    logged: dict[str, dict[float, float]] = {}
    for key, step, value in _numbers(entries):
        logged.setdefault(key, {})[step] = value
    for key, values in logged.items():
        broken = sorted(step for step, value in values.items() if not math.isfinite(value))
        if broken:
            where = f"{len(broken)} logged {plural(len(broken), 'step', 'steps')}, the first at step {broken[0]:g}"
            problems.append(f"{file.parent.relative_to(path)}: {PANELS[key]} is {NOT_FINITE} at {where}")
    return {key: sorted(values.items()) for key, values in logged.items()}


def _numbers(entries: list[dict[str, Any] | None]) -> Iterator[tuple[str, float, float]]:
    """Yield metric, step and value of the metrics that have a panel."""
    for entry in entries:
        step = number((entry or {}).get("step"))
        for key in PANELS:
            value = number((entry or {}).get(key))
            if step is not None and math.isfinite(step) and value is not None:
                yield key, step, value
