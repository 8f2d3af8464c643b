"""From what was measured to what is reported: means over data orders and seeds, and paired differences to the baseline.

The unit of an error bar is the widest source of variation the run has: seeds (each a whole pipeline) if there are
several, else data orders, else test prompts, over which a bootstrap gives an interval too.
"""

import os
import platform
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import torch

from prefdistill import __version__
from prefdistill.core.artifact import REQUEST, Stage
from prefdistill.core.errors import UserError
from prefdistill.core.files import write_json
from prefdistill.core.lock import LOCK
from prefdistill.core.paths import check_own
from prefdistill.evaluation.measure import BY_LENGTH, Measured, by_length, mean_of, points
from prefdistill.evaluation.pairs import pair_wins
from prefdistill.evaluation.reward_model import judge_of
from prefdistill.evaluation.stats import PROMPTS, estimate, mean_and_error, paired_difference
from prefdistill.experiment.inputs import Given
from prefdistill.experiment.pipeline import START, TEACHER, SeedRun, remove_results
from prefdistill.experiment.recipe import Recipe

METRICS: dict[str, dict[str, Any]] = {
    "reward": {"label": "true reward, T=1", "higher_is_better": True, "format": ".3f"},
    "reward_greedy": {"label": "true reward, greedy", "higher_is_better": True, "format": ".3f"},
    "win_rate": {"label": "win rate against the start, T=1", "higher_is_better": True, "format": ".3f"},
    "judge_win_rate": {"label": "judged win rate against the start", "higher_is_better": True, "format": ".3f"},
    "judge_score": {"label": "judge's score", "higher_is_better": True, "format": ".3f"},
    "rouge_l": {"label": "ROUGE-L", "higher_is_better": True, "format": ".3f"},
    "exact_match": {"label": "exact match", "higher_is_better": True, "format": ".3f"},
    "response_tokens": {"label": "tokens", "higher_is_better": None, "format": ".1f"},
    "reward_accuracy": {"label": "implicit-reward accuracy", "higher_is_better": True, "format": ".3f"},
    "chosen_logp": {"label": "log-prob of chosen, per token", "higher_is_better": None, "format": ".3f"},
}
LABELS = {TEACHER: "the teacher", START: "the student before any method"}


def add_win_rates(measured: dict[str, list[Measured]]) -> None:
    """Win rate of every model against the student's start on the same prompts, by the known reward or by the judge."""
    for score, rate in (("reward", "win_rate"), ("judge_score", "judge_win_rate")):
        if START not in measured or score not in measured[START][0].items:
            continue
        start = measured[START][0]
        for runs in measured.values():
            for run in runs:
                run.add(rate, pair_wins(run.items[score], start.items[score]), run.groups.get(score))


def summarise(recipe: Recipe, by_seed: list[dict[str, list[Measured]]]) -> dict[str, Any]:
    """What results.json says of the models: `methods`, `differences`, `metrics`, `generations` and `by_length`."""
    for measured in by_seed:
        add_win_rates(measured)
    names = list(by_seed[0])
    present = {metric for name in names for metric in by_seed[0][name][0].metrics}
    metrics = [metric for metric in METRICS if metric in present]
    methods: dict[str, Any] = {}
    differences: dict[str, Any] = {}
    baseline = [seed[recipe.baseline] for seed in by_seed]
    for name in names:
        runs = [seed[name] for seed in by_seed]
        shown = [metric for metric in metrics if metric in runs[0][0].metrics]
        methods[name] = {metric: mean_of(runs, metric) for metric in shown}
        if name != recipe.baseline and name in recipe.methods:
            differences[name] = {metric: _difference(runs, baseline, metric) for metric in shown}
    return {
        "methods": methods,
        "differences": differences,
        "metrics": {metric: METRICS[metric] for metric in metrics},
        "generations": {name: {"points": found} for name in names if (found := points(by_seed[0][name][0]))},
        "by_length": by_length(
            {name: [seed[name] for seed in by_seed] for name in names},
            recipe.evaluate.length_ranges,
            [metric for metric in BY_LENGTH if metric in METRICS],
        ),
    }


def _difference(ours: list[list[Measured]], theirs: list[list[Measured]], metric: str) -> dict[str, Any]:
    """Order k of a method is paired with order k of the baseline: same start, same pairs, same test prompts."""
    per_order = [
        [a.metrics[metric] - b.metrics[metric] for a, b in zip(a_runs, b_runs, strict=True)]
        for a_runs, b_runs in zip(ours, theirs, strict=True)
    ]
    if len(per_order) > 1:
        return mean_and_error([float(np.mean(orders)) for orders in per_order]) | {"over": "seeds"}
    if len(per_order[0]) > 1:
        return mean_and_error(per_order[0]) | {"over": "data orders"}
    our, their = ours[0][0], theirs[0][0]
    return paired_difference(our.items[metric], their.items[metric], our.groups.get(metric)) | {"over": PROMPTS}


def margin_accuracies(terms: list[dict[str, np.ndarray]], groups: list[int] | None = None) -> dict[str, Any]:
    """Accuracy of each term of the teacher on the held-out pairs, over seeds or over the prompts of the pairs."""
    if not terms or not terms[0]:
        return {}
    if len(terms) > 1:
        return {name: mean_and_error([seed[name].mean() for seed in terms]) | {"over": "seeds"} for name in terms[0]}
    return {name: estimate(wins, groups) | {"over": PROMPTS} for name, wins in terms[0].items()}


def gauge(runs: list[SeedRun]) -> dict[str, Any]:
    """`gauge_flips` of the teacher's values on the held-out pairs, over seeds or over directions."""
    found = [flips for run in runs if (flips := run.measuring.gauge_flips())]
    if len(found) < 2:
        return found[0] | {"over": "directions"} if found else {}
    return mean_and_error([flips["mean"] for flips in found]) | {"over": "seeds"}


def side_by_side(measured: dict[str, list[Measured]]) -> list[dict[str, Any]]:
    """The same prompts answered by every model (first order of each)."""
    first = {name: runs[0].samples for name, runs in measured.items() if runs[0].samples}
    if not first:
        return []
    return [
        {
            "prompt": rows[0]["prompt"],
            "responses": {name: row["response"] for name, row in zip(first, rows, strict=True)},
            "scores": {name: row["score"] for name, row in zip(first, rows, strict=True) if "score" in row},
        }
        for rows in zip(*first.values(), strict=True)
    ]


def judge_worth(runs: list[SeedRun]) -> dict[str, Any]:
    """`judge` of results.json: what the reward model is worth; nothing where the true reward is known."""
    judges = [run.judge for run in runs if run.judge]
    return {"judge": judge_of(judges[0].label, [judge.worth for judge in judges])} if judges else {}


def run_recipe(
    recipe: Recipe, out: Path, *, command: str = "", pool: Path | None = None, given: Given | None = None
) -> dict[str, Any]:
    """Run every seed of a recipe, and write recipe.yaml, environment.json, results.json and report.html into `out`.

    Stages that another run has left in `pool` are not made again; `given` is what a study has read already.
    """
    from prefdistill.core.lock import locked
    from prefdistill.report import write_report

    if recipe.threads:
        torch.set_num_threads(recipe.threads)
    seeds = range(recipe.seed, recipe.seed + recipe.seeds)
    given = given or Given()
    runs = [SeedRun(recipe, out, seed, pool=pool, given=given) for seed in seeds]
    check_own(out, ("environment.json",), "run")  # not recipe.yaml, which may be the user's own
    runs[0].check()
    runs[0].check_models()
    with locked(out), _clean_if_refused(out):
        write_json(out / "environment.json", environment(command))
        _begin(recipe, out)
        measured = [run.run() for run in runs]
        shaping = [run.measuring.shaping(found) for run, found in zip(runs, measured, strict=True)]
        results = {
            "recipe": recipe.name,
            "task": recipe.task,
            "seed": recipe.seed,
            "seeds": list(seeds),
            "orders": recipe.orders,
            "baseline": recipe.baseline,
            **summarise(recipe, measured),
            "labels": LABELS | {name: run.label for name, run in recipe.methods.items() if run.label},
            "controls": [name for name, run in recipe.methods.items() if run.control],
            "margin_accuracy": margin_accuracies(
                [run.measuring.margin_terms() for run in runs], runs[0].measuring.margin_groups()
            ),
            **judge_worth(runs),
            "gauge_flips": gauge(runs),
            "shaping": shaping[0],
            "samples": side_by_side(measured[0]),
            "stages": [_stage(stage, run.seed) for run in runs for stage in run.stages],
            "warnings": sorted({warning for run in runs for warning in run.warnings}),
        }
        write_json(out / "results.json", results)
        write_report([out], out / "report.html")
    return results


def _begin(recipe: Recipe, out: Path) -> None:
    """Write recipe.yaml; results of another recipe go before."""
    path, text = out / "recipe.yaml", recipe.as_yaml()
    if path.is_file() and path.read_text(encoding="utf-8", errors="replace") != text:
        remove_results(out)
    recipe.save(path)


@contextmanager
def _clean_if_refused(out: Path) -> Iterator[None]:
    """A run that is refused before any of its stages has made something leaves nothing in a directory that was new."""
    notes = {LOCK, REQUEST, "recipe.yaml", "environment.json"}
    new = all(path.name == LOCK for path in out.iterdir())
    try:
        yield
    except UserError:
        if new and all(path.name in notes for path in out.rglob("*") if path.is_file()):
            for path in out.iterdir():
                if path.name != LOCK:
                    shutil.rmtree(path) if path.is_dir() else path.unlink()
        raise


def _stage(stage: Stage, seed: int) -> dict[str, Any]:
    shown = ("name", "seconds", "reused", "peak_memory", "bytes")
    return {key: value for key, value in asdict(stage).items() if key in shown} | {"seed": seed}


def environment(command: str) -> dict[str, Any]:
    """What the numbers depend on besides the recipe."""
    from importlib.metadata import version

    packages = ("torch", "transformers", "trl", "peft", "datasets", "accelerate", "tokenizers", "numpy")
    return {
        "command": command,
        "prefdistill": __version__,
        "python": platform.python_version(),
        "system": f"{platform.system()} {platform.machine()}",
        "cpus": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "accelerators": [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())],
        "packages": {name: version(name) for name in packages},
    }
