"""From what was measured to what is reported: means over data orders and seeds, and paired differences to the baseline.

The unit of an error bar is the widest source of variation the run has: seeds (each a whole pipeline) if there are
several, else data orders, else test prompts, over which a bootstrap gives an interval too.
"""

from typing import Any

import numpy as np

from prefdistill.evaluation.measure import BY_LENGTH, Measured, by_length, mean_of, points
from prefdistill.evaluation.pairs import pair_wins
from prefdistill.evaluation.reward_model import judge_of
from prefdistill.evaluation.stats import PROMPTS, estimate, mean_and_error, paired_difference
from prefdistill.experiment.plan import START, TEACHER
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


def gauge(by_seed: list[dict[str, Any]]) -> dict[str, Any]:
    """Return `gauge_flips` of the teacher's values on the held-out pairs, over seeds or over directions."""
    flips = [one for one in by_seed if one]
    if len(flips) < 2:
        return flips[0] | {"over": "directions"} if flips else {}
    return mean_and_error([one["mean"] for one in flips]) | {"over": "seeds"}


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


def reward_model_accuracy(name: str, by_seed: list[Measured]) -> dict[str, Any]:
    """Return `judge` of results.json: the accuracy of the reward model on the held-out pairs; {} without one."""
    return {"judge": judge_of(name, by_seed)} if by_seed else {}
