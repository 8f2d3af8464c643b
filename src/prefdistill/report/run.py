"""Read a run directory: its results, recipe, environment and training logs, and what of these is unreadable.

Only `results.json` with its key "methods" is required.
"""

import json
import math
from collections import Counter
from pathlib import Path
from typing import Any

from prefdistill.core.errors import UserError
from prefdistill.evaluation.results import NOT_FINITE, Results, clean, declares_roles, mapping, number
from prefdistill.report.format import plural

Run = dict[str, Any]
Points = list[tuple[float, float]]
Lines = dict[str, list[Points]]  # by logged metric, one line per seed and data order

NO_ROLES = (
    "results.json declares no roles, as older versions did not: every run counts as a method, without a baseline or "
    "controls. To rebuild it from the finished stages: prefdistill run {path}/recipe.yaml --out {path}, with `control: "
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

# Optional sections of results.json and their types; a section of another type is left out, with a warning.
_SHAPES: dict[str, type | tuple[type, ...]] = {
    "differences": dict, "labels": dict, "metrics": dict, "margin_accuracy": dict, "shaping": dict,
    "gauge_flips": dict, "responses": dict, "by_length": dict, "reward_model": dict, "roles": dict, "headline": dict,
    "display_names": dict, "samples": list, "stages": list, "warnings": list, "notes": list, "seeds": list,
    "recipe": str, "task": str, "orders": (int, float),
}  # fmt: skip


def average(lines: list[Points]) -> Points:
    """Return the mean of several lines at the steps that all of them have."""
    tables = [dict(line) for line in lines]
    shared = set(tables[0]).intersection(*tables[1:]) if tables else set()
    return [(step, math.fsum(t[step] for t in tables) / len(tables)) for step in sorted(shared)]


def load_run(path: str | Path) -> Run:
    """Read one run directory.

    Returns:
        {"path", "name", "results", "recipe", "environment", "curves", "early", "problems", "notes"}: `recipe` is text
        or None, `environment` a dictionary or None, `curves` the training logs by method, {method: {metric: [line]}}
        with a line a list of (step, value), `early` those of the other stages by name, `problems` the optional parts
        that could not be read, in words, and `notes` what to know about the results file.

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
    results = _tidy(_results(path / "results.json"), problems)
    recipe = _text(path / "recipe.yaml", problems)
    environment = _environment(path / "environment.json", problems)
    curves, early = _curves(path, results, problems)
    return {
        "path": str(path),
        "name": clean(results.get("recipe") or path.resolve().name),
        "results": results,
        "recipe": recipe,
        "environment": environment,
        "curves": curves,
        "early": early,
        "problems": problems,
        "notes": [] if declares_roles(results) else [NO_ROLES.format(path=path)],
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


def _results(file: Path) -> Results:
    try:
        results = json.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError:
        if not (file.parent / "recipe.yaml").is_file():
            raise UserError(
                f"{file.parent} holds no results.json of a run: name a directory that `prefdistill run` wrote"
            ) from None
        raise UserError(
            f"{file.parent} holds no results.json: the run has not finished; "
            "start the same `prefdistill run` again, it resumes"
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
    """Return the results without optional sections of the wrong type, which are added to the problems."""
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


def _curves(path: Path, results: Results, problems: list[str]) -> tuple[dict[str, Lines], dict[str, Lines]]:
    """Return the training logs by method, of the last round of each, and those of the stages before by name.

    Only the stages that the results name are read: an earlier run may have left others in the directory.
    """
    last: dict[tuple[Any, ...], dict[str, Any]] = {}
    methods = results["methods"]
    for stage in map(mapping, results.get("stages", [])):
        identity: tuple[Any, ...] = (stage.get("name"), stage.get("seed"))
        if (method := _trained_method(stage, methods)) is not None:
            identity = (method, stage.get("seed"), stage.get("order"))
        if all(isinstance(part, str | int | None) for part in identity) and isinstance(stage.get("directory"), str):
            rounds = [number(one.get("round")) or 0 for one in (stage, last.get(identity, stage))]
            last[identity] = stage if rounds[0] >= rounds[1] else last[identity]
    curves: dict[str, Lines] = {name: {} for name in methods}
    early: dict[str, Lines] = {}
    for stage in last.values():
        file = path / stage["directory"] / "metrics.jsonl"
        if not file.resolve().is_relative_to(path.resolve()) or not file.is_file():
            continue
        method = _trained_method(stage, methods)
        lines = early.setdefault(str(stage.get("name")), {}) if method is None else curves[method]
        for metric, line in _read_log(file, path, problems).items():
            lines.setdefault(metric, []).append(line)
    with_lines = [{name: lines for name, lines in part.items() if lines} for part in (curves, early)]
    return with_lines[0], with_lines[1]


def _trained_method(stage: dict[str, Any], methods: dict[str, Any]) -> str | None:
    """Return the method that a stage of results.json trained a student with."""
    method = stage.get("method")
    return method if stage.get("kind") == "distill" and isinstance(method, str) and method in methods else None


def _read_log(file: Path, path: Path, problems: list[str]) -> dict[str, Points]:
    """Return the line of every logged metric in one metrics.jsonl."""
    logged: dict[str, dict[float, float]] = {}
    bad = 0
    try:
        with file.open(encoding="utf-8", errors="replace") as lines:
            for line in lines:
                bad += not _log_line(line, logged)
    except OSError as error:
        problems.append(f"{file.relative_to(path)} could not be read: {error.strerror or error}")
    if bad:
        problems.append(f"{file.relative_to(path)}: {bad} {plural(bad, 'line is', 'lines are')} not valid JSON")
    points = {key: sorted(steps.items()) for key, steps in logged.items()}
    for key, line_ in points.items():
        broken = [step for step, value in line_ if not math.isfinite(value)]
        if broken:
            where = f"{len(broken)} logged {plural(len(broken), 'step', 'steps')}, the first at step {broken[0]:g}"
            problems.append(f"{file.parent.relative_to(path)}: {PANELS[key]} is {NOT_FINITE} at {where}")
    return points


def _log_line(line: str, logged: dict[str, dict[float, float]]) -> bool:
    """Add one line of metrics.jsonl, return whether it is valid; a step logged twice (resumed) keeps its last value."""
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
