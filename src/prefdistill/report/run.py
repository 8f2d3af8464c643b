"""Reading a run directory: `load_run` returns all that a report needs of it, and says what it could not read.

Only `results.json` with its key "methods" is required.
"""

import json
import math
from collections import Counter
from pathlib import Path
from typing import Any

from prefdistill.core.errors import UserError
from prefdistill.report.table import NOT_FINITE, Results, clean, number
from prefdistill.report.text import natural, plural

Run = dict[str, Any]
Points = list[tuple[float, float]]

PANELS = {
    "loss": "loss",
    "rewards/margins": "reward margin",
    "rewards/accuracies": "reward accuracy",
    "logps/chosen": "log-prob of chosen",
    "logps/rejected": "log-prob of rejected",
    "shaping/margins_abs": "size of shaping margin",
}

# Optional sections of results.json and what they must be; anything else is left out and said so.
_SHAPES: dict[str, type | tuple[type, ...]] = {
    "differences": dict, "labels": dict, "metrics": dict, "margin_accuracy": dict, "shaping": dict,
    "gauge_flips": dict, "generations": dict, "by_length": dict, "judge": dict,
    "samples": list, "stages": list, "warnings": list, "notes": list, "seeds": list, "controls": list,
    "recipe": str, "task": str, "baseline": str, "orders": (int, float),
}  # fmt: skip


def average(lines: list[Points]) -> Points:
    """The mean of several runs at the steps that all of them logged."""
    tables = [dict(line) for line in lines]
    shared = set(tables[0]).intersection(*tables[1:]) if tables else set()
    return [(step, math.fsum(t[step] for t in tables) / len(tables)) for step in sorted(shared)]


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
        "curves": _curves(path, results.get("stages"), problems),
        "problems": problems,
    }


def load_runs(runs: list[Path]) -> list[Run]:
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
                f"{file.parent} holds no results.json of a run: give a directory that `prefdistill run` wrote"
            ) from None
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


def _curves(path: Path, stages: list[Any] | None, problems: list[str]) -> dict[str, dict[str, list[Points]]]:
    """What every stage logged: {stage: {metric: [one line per seed]}}; of `stages` alone, if the results name theirs:
    an earlier run with more seeds, orders or methods may have left others."""
    files = sorted(path.glob("seed-*/*/metrics.jsonl"), key=lambda f: natural(str(f.relative_to(path))))
    if stages is not None:
        ours = {(f"seed-{stage.get('seed')}", str(stage.get("name"))) for stage in stages if isinstance(stage, dict)}
        files = [file for file in files if (file.parent.parent.name, file.parent.name) in ours]
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
            problems.append(f"{file.relative_to(path)}: {bad} {plural(bad, 'line is', 'lines are')} not valid JSON")
        for key, steps in logged.items():
            line_ = sorted(steps.items())
            curves.setdefault(file.parent.name, {}).setdefault(key, []).append(line_)
            broken = [step for step, value in line_ if not math.isfinite(value)]
            if broken:
                where = f"{len(broken)} logged {plural(len(broken), 'step', 'steps')}, the first at step {broken[0]:g}"
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
