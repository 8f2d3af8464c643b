"""Run a recipe: every seed, then results.json and the report."""

import os
import platform
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from prefdistill import __version__
from prefdistill.core.errors import UserError
from prefdistill.core.files import write_json
from prefdistill.core.lock import LOCK
from prefdistill.core.paths import check_own
from prefdistill.core.stages import REQUEST
from prefdistill.experiment.inputs import Given
from prefdistill.experiment.pipeline import SeedRun, remove_results
from prefdistill.experiment.recipe import Recipe
from prefdistill.experiment.summary import LABELS, gauge, judge_worth, margin_accuracies, side_by_side, summarise


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
            "stages": [stage for run in runs for stage in run.stages],
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
