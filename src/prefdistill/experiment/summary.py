"""Results from measurements: means over data orders and seeds, paired differences to the baseline, and roles.

Errors are over all variation the run has: seeds (each a whole pipeline) if there are several, else data orders, and the
test prompts, which all seeds share unless the data are synthetic.
"""

from typing import Any

import numpy as np

from prefdistill.evaluation.length import length_balanced
from prefdistill.evaluation.measure import (
    Measured,
    add_win_rates,
    by_length,
    complete,
    difference_of,
    mean_of,
    over_repeats,
    points,
)
from prefdistill.evaluation.metrics import METRICS, headline_metric
from prefdistill.evaluation.pairs import LENGTH_TERM, SHAPING_TERMS
from prefdistill.evaluation.stats import mean_and_error
from prefdistill.experiment.recipe import Recipe
from prefdistill.experiment.roles import START, TEACHER
from prefdistill.methods import METHODS as METHOD_CLASSES

LABELS = {TEACHER: "the teacher", START: "the student before any method"}


def summarise(recipe: Recipe, by_seed: list[dict[str, list[Measured]]]) -> dict[str, Any]:
    """Return the part of results.json that compares the models: scores, differences, roles and their descriptions.

    Args:
        by_seed: for each seed, the measurements by name, one entry per data order.
    """
    for models in by_seed:
        add_win_rates(models, START)
    same_items = share_tests(recipe)
    names = list(by_seed[0])
    measured = {metric for name in names for metric in by_seed[0][name][0].metrics}
    metrics = [metric for metric in METRICS if metric in measured]
    methods: dict[str, Any] = {}
    differences: dict[str, Any] = {}
    baseline = [models[recipe.baseline] for models in by_seed]
    for name in names:
        runs = [models[name] for models in by_seed]
        methods[name] = {
            metric: mean_of(runs, metric, same_items=same_items) for metric in metrics if complete(runs, metric)
        }
        if name != recipe.baseline and name in recipe.methods:
            shared = [metric for metric in methods[name] if complete(baseline, metric)]
            differences[name] = {
                metric: difference_of(runs, baseline, metric, same_items=same_items) for metric in shared
            }
    gaps: dict[str, Any] = {}
    for control, run in recipe.methods.items():
        if run.control is not None and {control, run.control.of} <= methods.keys():
            ours, theirs = ([models[name] for models in by_seed] for name in (run.control.of, control))
            shared = [metric for metric in methods[control] if metric in methods[run.control.of]]
            gaps[control] = {metric: difference_of(ours, theirs, metric, same_items=same_items) for metric in shared}
    return {
        "methods": methods,
        "differences": differences,
        "gaps": gaps,
        "roles": roles_of(recipe, names),
        "headline": {"metric": recipe.headline.metric or headline_metric(metrics), "method": recipe.headline.method},
        "metrics": {metric: METRICS[metric].describe() for metric in metrics},
        "labels": {
            name: label
            for name in names
            if (label := recipe.methods[name].label if name in recipe.methods else LABELS.get(name, ""))
        },
        "display_names": display_names(recipe),
        "responses": {name: {"points": shown} for name in names if (shown := points(by_seed[0][name][0]))},
        "by_length": by_length(
            {name: [models[name] for models in by_seed] for name in names},
            recipe.evaluate.length_ranges,
            same_items=same_items,
        ),
    }


def share_tests(recipe: Recipe) -> bool:
    """Return whether all seeds have the same test pairs and prompts, in the same tokens.

    A synthetic task draws them anew, and a tokenizer that is trained, which is where neither model is named, drops and
    orders other ones.
    """
    return recipe.data.synthetic is None and bool(recipe.model.name_of("student") or recipe.model.teacher)


def margin_accuracies(
    terms: list[dict[str, np.ndarray]], groups: list[int] | None = None, *, same_items: bool = False
) -> dict[str, Any]:
    """Return the accuracy of each term of the teacher on the held-out pairs, with its error, see `over_repeats`.

    Args:
        terms: for each seed, `pair_wins` by term.
        groups: the number of each pair's prompt.
        same_items: whether the seeds share the pairs.
    """
    means = {
        name: over_repeats([[seed[name]] for seed in terms], groups, same_items=same_items)
        for name in (terms[0] if terms else {})
    }
    return {name: mean | ({"shaping": True} if name in SHAPING_TERMS else {}) for name, mean in means.items()}


def length_controlled_margins(
    terms: list[dict[str, np.ndarray]], groups: list[int] | None = None, *, same_items: bool = False
) -> dict[str, Any]:
    """Return the accuracy of each term where length says nothing, see `length_balanced`; empty if it says all."""
    longer = [seed[LENGTH_TERM] * 2 - 1 for seed in terms]
    balanced = [
        {name: length_balanced(wins, extra) for name, wins in seed.items() if name != LENGTH_TERM}
        for seed, extra in zip(terms, longer, strict=True)
    ]
    if not all(len(numbers) for seed in balanced for numbers in seed.values()):
        return {}
    if groups is not None:  # of the pairs that `length_balanced` keeps
        groups = [group for group, extra in zip(groups, longer[0], strict=True) if extra]
    return margin_accuracies(balanced, groups, same_items=same_items)


def gauge(by_seed: list[dict[str, Any]]) -> dict[str, Any]:
    """Return `gauge_flips` of the teacher's values on the held-out pairs, over seeds or over directions."""
    if len({flips["mean"] for flips in by_seed}) < 2:
        return by_seed[0] | {"over": "directions"} if by_seed else {}
    return mean_and_error([flips["mean"] for flips in by_seed]) | {"over": "seeds"}


def side_by_side(measured: dict[str, list[Measured]]) -> list[dict[str, Any]]:
    """Return the responses of every model (the first order of each) to the same prompts."""
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


def roles_of(recipe: Recipe, names: list[str]) -> dict[str, dict[str, str | None]]:
    """Return `roles` of results.json: the kind of each row, and the run a control is a control of.

    Args:
        names: the rows of the results, in their order.
    """
    roles: dict[str, dict[str, str | None]] = {}
    for name in names:
        run = recipe.methods.get(name)
        if run is None:
            roles[name] = {"kind": name, "of": None}  # teacher, start
        elif run.control is not None:
            roles[name] = {"kind": run.control.kind, "of": run.control.of}
        else:
            roles[name] = {"kind": "baseline" if name == recipe.baseline else "method", "of": None}
    return roles


def display_names(recipe: Recipe) -> dict[str, str]:
    """Return how sentences write the runs: as the recipe says, else as the method does that gives the run its name."""
    names = {}
    for name, run in recipe.methods.items():
        own = METHOD_CLASSES.find(run.method).display_name if run.method.lower() == name.lower() else ""
        if shown := run.display_name or own:
            names[name] = shown
    return names
