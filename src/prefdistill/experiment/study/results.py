"""What a study writes of a cell: a record per seed, and its part of results.json over all of them."""

from pathlib import Path
from typing import Any

from prefdistill.core.files import read_json
from prefdistill.evaluation.measure import Measured, add_win_rates, complete, difference_of, mean_of, mean_over
from prefdistill.evaluation.stats import mean_and_error
from prefdistill.experiment.roles import START
from prefdistill.experiment.study.options import Cell

# what a cell keeps of the results of its run
KEPT = (
    "methods",
    "differences",
    "metrics",
    "labels",
    "roles",
    "display_names",
    "margin_accuracy",
    "length_controlled_margins",
    "gauge_flips",
    "reward_model",
)


def without_points(shaping: dict[str, Any]) -> dict[str, Any]:
    """Return the shaping statistics of a run without the single points."""
    return {name: {key: value for key, value in row.items() if key != "points"} for name, row in shaping.items()}


def items_of(run: Path, stages: list[dict[str, Any]]) -> dict[str, Any]:
    """Return the measurements of each model in a run directory, test item by test item: the mean of its data orders.

    Args:
        stages: those of the run's results.
    """
    models: dict[str, list[Measured]] = {}
    for stage in stages:
        if stage["kind"] == "evaluate":
            measured = Measured(**read_json(run / stage["directory"] / "evaluation.json"))
            models.setdefault(stage["method"] or stage["role"], []).append(measured)
    add_win_rates(models, START)
    means = {name: mean_over(runs) for name, runs in models.items()}
    return {name: {"items": mean.items, "groups": mean.groups} for name, mean in means.items()}


def over_records(cell: Cell, records: list[dict[str, Any]]) -> dict[str, Any]:
    """Return the part of a cell in results.json, from its records."""
    margins = {
        part: over_seeds([{part: {"": record.get(part, {})}} for record in records], part).get("", {})
        for part in ("margin_accuracy", "length_controlled_margins")
    }
    shared = len(records) > 1 and all(record["items"] for record in records)
    return {
        "cell": cell.name,
        "group": cell.group,
        "x": cell.x,
        "overrides": cell.overrides,
        "files": [f"cells/{cell.file(record['seed'])}.json" for record in records],
        "seeds": [record["seed"] for record in records],
        **(
            over_seeds_and_items(records)
            if shared
            else {part: over_seeds(records, part) for part in ("methods", "differences")}
        ),
        **margins,
        "shaping_std": {
            name: [record["shaping"][name]["std"] for record in records if name in record["shaping"]]
            for name in sorted({name for record in records for name in record["shaping"]})
        },
        "warnings": sorted({warning for record in records for warning in record["warnings"]}),
    }


def over_seeds_and_items(records: list[dict[str, Any]]) -> dict[str, dict[str, dict[str, Any]]]:
    """Return "methods" and "differences" as `over_seeds` does, with the error over seeds and the items they share."""
    models = {name: [[Measured(**record["items"][name])] for record in records] for name in records[0]["items"]}
    baseline = models[next(name for name, role in records[0]["roles"].items() if role["kind"] == "baseline")]
    tables: dict[str, dict[str, dict[str, Any]]] = {"methods": {}, "differences": {}}
    for part, table in tables.items():
        for name in records[0][part]:
            table[name] = {}
            compared = [models[name]] if part == "methods" else [models[name], baseline]
            for metric in records[0][part][name]:
                if not all(complete(by_seed, metric) for by_seed in compared):
                    continue
                if part == "methods":
                    estimate = mean_of(models[name], metric, same_items=True)
                else:
                    estimate = difference_of(models[name], baseline, metric, same_items=True)
                values = [record[part][name][metric]["mean"] for record in records]
                table[name][metric] = {"low": None, "high": None, **estimate, "values": values}
    return tables


def over_seeds(records: list[dict[str, Any]], part: str) -> dict[str, dict[str, Any]]:
    """Return mean, standard error and 95 % interval over the seeds, by method and metric.

    Those of the first seed's own run where there is no other seed, or where seeds do not vary the number, as how a
    teacher that all of them share orders the pairs.
    """
    table: dict[str, dict[str, Any]] = {}
    for name in records[0][part] if records else []:
        table[name] = {}
        for metric, first in records[0][part][name].items():
            by_seed = [record[part][name][metric] for record in records if metric in record[part].get(name, {})]
            values = [one["mean"] for one in by_seed]
            estimate = {**mean_and_error(values), "over": "seeds"} if len(set(values)) > 1 else dict(first)
            table[name][metric] = {"low": None, "high": None, **estimate, "values": values}
    return table


def distinct(values: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [value for place, value in enumerate(values) if value not in values[:place]]
