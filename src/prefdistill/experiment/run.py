"""Run a recipe: execute the plan of every seed, then write results.json and the report."""

import os
import platform
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from prefdistill import __version__
from prefdistill.core.artifact import State
from prefdistill.core.errors import UserError
from prefdistill.core.files import write_json
from prefdistill.core.lock import LOCK, locked
from prefdistill.core.paths import check_own
from prefdistill.core.progress import say
from prefdistill.core.stages import REQUEST, Stage, inspect_stage, run_stage
from prefdistill.data.columns import SIDES
from prefdistill.evaluation.measure import Measured
from prefdistill.evaluation.pairs import gauge_flips, pair_terms, prompt_texts
from prefdistill.evaluation.reward_model import accuracy_of
from prefdistill.evaluation.shaping import shaping_of
from prefdistill.evaluation.stats import numbered
from prefdistill.evaluation.verdict import verdict_of
from prefdistill.experiment.check import check_models, check_plan
from prefdistill.experiment.inputs import Sources
from prefdistill.experiment.plan import Plan, build_plans
from prefdistill.experiment.readings import read_of, unlike, warnings_of_trainings
from prefdistill.experiment.recipe import Recipe
from prefdistill.experiment.step import Step
from prefdistill.experiment.summary import (
    gauge,
    length_controlled_margins,
    margin_accuracies,
    share_tests,
    side_by_side,
    summarise,
)
from prefdistill.signals import SignalSet
from prefdistill.signals.join import join


def run_recipe(
    recipe: Recipe, out: Path, *, command: str = "", pool: Path | None = None, sources: Sources | None = None
) -> dict[str, Any]:
    """Run every seed of a recipe, and write recipe.yaml, environment.json, results.json and report.html into `out`.

    Args:
        recipe: what to run.
        out: the run directory; finished steps in it are reused.
        command: what the results say the run was started with.
        pool: a directory of finished steps that several runs share.
        sources: the user's data and models, where the caller has read them already.

    Returns:
        What is written to results.json.
    """
    from prefdistill.report import write_report

    if recipe.threads:
        torch.set_num_threads(recipe.threads)
    sources = sources or Sources()
    plans = build_plans(recipe, out, sources)
    check_own(out, ("environment.json",), "run")  # not recipe.yaml, which may be the user's own
    check_plan(plans[0])
    check_models(recipe, sources)
    with locked(out), _clean_if_refused(out):
        write_json(out / "environment.json", environment(command))
        _save_recipe(recipe, out)
        stages: list[dict[str, Any]] = []
        shared: dict[str, Path] = {}
        for plan in plans:
            if len(plans) > 1:
                say(f"seed {plan.context.seed}")
            stages += execute(plan, out, sources, pool, shared)
        results = _results(recipe, plans, stages)
        write_json(out / "results.json", results)
        write_report([out], out / "report.html")
    return results


def execute(
    plan: Plan, out: Path, sources: Sources, pool: Path | None, shared: dict[str, Path]
) -> list[dict[str, Any]]:
    """Run the steps of a plan, reusing finished ones; return them as results.json lists them.

    Before the first step that is not reused, results of an earlier run go: they would pass for those of the new one.
    From there on, steps are compared with the data as it is encoded now; if nothing is left to run, they stay.

    Args:
        shared: directories by key of the steps without draws that earlier seeds have run, to reuse. Those of this plan
            are added.
    """
    stages: list[dict[str, Any]] = []
    to_compare: list[Step] = []
    compared = False
    for step in plan.steps:
        if inspect_stage(step.directory, step.request).state is not State.FINISHED:
            remove_results(out)
            compared = True
        while compared and to_compare:
            to_compare.pop(0).refresh()
        make = sources.unchanged(step.models, step.work)
        twin = None if step.draws else shared.setdefault(step.key, step.directory)
        stage = run_stage(step.name, step.directory, step.request, make, replace=True, pool=pool, twin=twin)
        step.repair()
        to_compare.append(step)
        stages.append(_entry(step, stage))
    return stages


def _entry(step: Step, stage: Stage) -> dict[str, Any]:
    read, context = step.read(), step.context
    if read and context.two_tokenizers:
        read["tokenizer"] = "student" if step.reads_with is context.tokenizer else "teacher"
    return {
        "name": step.name,
        "seconds": stage.seconds,
        "reused": stage.reused,
        "peak_memory": stage.peak_memory,
        "bytes": stage.bytes,
        **step.describe(),
        "read": read,
    }


def _results(recipe: Recipe, plans: list[Plan], stages: list[dict[str, Any]]) -> dict[str, Any]:
    """Return what results.json says of plans that have run."""
    measured: list[dict[str, list[Measured]]] = [
        {name: [step.measured() for step in steps] for name, steps in plan.evaluations.items()} for plan in plans
    ]
    summary = summarise(recipe, measured)
    held_out = [signals for plan in plans if (signals := _held_out_signals(plan)) is not None]  # of all seeds, or none
    groups = numbered(prompt_texts(held_out[0].data, held_out[0].rows)) if held_out else None
    terms = [pair_terms(signals) for signals in held_out]
    shaping = [
        shaping_of(plan.methods, signals, models)
        for plan, signals, models in zip(plans, held_out, measured, strict=False)
    ]
    same_items = share_tests(recipe)
    scored = [plan.reward_model.measured() for plan in plans if plan.reward_model]
    judge = accuracy_of(_reward_model_name(plans[0]), scored, same_items=same_items) if scored else None
    results: dict[str, Any] = {
        "recipe": recipe.name,
        "task": recipe.task,
        "seed": recipe.seed,
        "seeds": [plan.context.seed for plan in plans],
        "orders": recipe.orders,
        **summary,
        "margin_accuracy": margin_accuracies(terms, groups, same_items=same_items),
        "length_controlled_margins": length_controlled_margins(terms, groups, same_items=same_items),
        **({"reward_model": judge} if judge else {}),
        "gauge_flips": gauge([gauge_flips(signals.store("teacher", "values", "chosen")) for signals in held_out]),
        "shaping": shaping[0][0] if shaping else {},
        "samples": side_by_side(measured[0]),
        "read": read_of(plans[0]),
        "stages": stages,
        "warnings": sorted(
            {
                *unlike(stages),
                *warnings_of_trainings(stages),
                *(warning for _, warnings in shaping for warning in warnings),
            }
        ),
    }
    return results | {"verdict": verdict_of(results)}


def _held_out_signals(plan: Plan) -> SignalSet | None:
    """Return the signals on the test pairs of a plan that has run, where the teacher's are among them."""
    if plan.test is None or not any(step.role == "teacher" for step in plan.test_signals):
        return None
    stores = [step.store for step in plan.test_signals]
    return join(stores, plan.test.rows, plan.context.tokenizer.tokenizer, responses=SIDES).signals


def _reward_model_name(plan: Plan) -> str:
    section, user_data = plan.context.recipe.reward_model, plan.user_data
    if section is None or user_data is None or not plan.reward_model:
        return ""
    return section.name or f"trained on {len(user_data.reward_pairs)} pairs that no other model has seen"


def remove_results(out: Path) -> None:
    for name in ("report.html", "results.json"):
        (out / name).unlink(missing_ok=True)


def _save_recipe(recipe: Recipe, out: Path) -> None:
    """Write recipe.yaml. Remove the results of another recipe first."""
    path, text = out / "recipe.yaml", recipe.as_yaml()
    if path.is_file() and path.read_text(encoding="utf-8", errors="replace") != text:
        remove_results(out)
    recipe.save(path)


@contextmanager
def _clean_if_refused(out: Path) -> Iterator[None]:
    """On a UserError before any step has written output, empty the directory if it was new."""
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
    """Return what the numbers depend on besides the recipe."""
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
