"""What a study writes: a record per cell and seed, and results.json over all of them."""

from collections.abc import Mapping, Sequence
from typing import Any

from prefdistill.core.options import Override
from prefdistill.experiment.study.options import Cell, Study

# what a cell keeps of the results of its run
KEPT = (
    "methods",
    "differences",
    "metrics",
    "labels",
    "roles",
    "display_names",
    "margin_accuracy",
    "gauge_flips",
    "reward_model",
)

Records = Mapping[tuple[str, int], dict[str, Any]]  # by cell and seed


def without_points(shaping: dict[str, Any]) -> dict[str, Any]:
    """Return the shaping statistics of a run without the single points."""
    return {name: {key: value for key, value in row.items() if key != "points"} for name, row in shaping.items()}


def summary(
    study: Study,
    overrides: Sequence[Override],
    cells: Sequence[Cell],
    seeds: Sequence[int],
    records: Records,
    failed: list[dict[str, Any]],
) -> dict[str, Any]:
    """Return results.json of a study: every cell over its seeds.

    Args:
        study: the study file.
        overrides: of the command line.
        cells, seeds: all of the study.
        records: of the finished cells.
        failed: `{"cell", "seed", "error", "refused"}` each.
    """
    some = list(records.values())
    first = some[0] if some else {}
    return {
        "study": study.name,
        "question": study.question,
        "recipe": study.recipe,
        "overrides": study.overrides | {change.key: change.value for change in overrides},
        "metric": study.metric,
        "x": study.x,
        "x_label": study.x_label or (study.x or "").rsplit(".", 1)[-1],
        "x_scale": study.x_scale,
        "seeds": list(seeds),
        "methods": list(first["differences"]) if some else study.methods,
        "labels": first.get("labels", {}),
        "roles": first.get("roles", {}),
        "display_names": first.get("display_names", {}),
        "metrics": first.get("metrics", {}),
        "cells": [_cell(cell, [records[cell.name, s] for s in seeds if (cell.name, s) in records]) for cell in cells],
        "failed": failed,
        "seconds": round(sum(record["seconds"] for record in some), 1),
        "environments": _distinct([record["environment"] for record in some]),
        "data": {
            f"seed {seed}": _distinct([record["data"] for (_, s), record in records.items() if s == seed])
            for seed in seeds
        },
    }


def _cell(cell: Cell, records: list[dict[str, Any]]) -> dict[str, Any]:
    margins = [{"m": {"": record["margin_accuracy"]}} for record in records]
    return {
        "cell": cell.name,
        "group": cell.group,
        "x": cell.x,
        "overrides": cell.overrides,
        "files": [f"cells/{cell.file(record['seed'])}.json" for record in records],
        "seeds": [record["seed"] for record in records],
        "methods": over_seeds(records, "methods"),
        "differences": over_seeds(records, "differences"),
        "margin_accuracy": over_seeds(margins, "m").get("", {}),
        "shaping_std": {
            name: [record["shaping"][name]["std"] for record in records if name in record["shaping"]]
            for name in sorted({name for record in records for name in record["shaping"]})
        },
        "warnings": sorted({warning for record in records for warning in record["warnings"]}),
    }


def over_seeds(records: list[dict[str, Any]], part: str) -> dict[str, dict[str, Any]]:
    """Return mean, standard error and 95 % interval over the seeds, by method and metric; of one seed, its own."""
    from prefdistill.evaluation.stats import mean_and_error

    table: dict[str, dict[str, Any]] = {}
    for name in records[0][part] if records else []:
        table[name] = {}
        for metric, first in records[0][part][name].items():
            by_seed = [record[part][name][metric] for record in records if metric in record[part].get(name, {})]
            values = [one["mean"] for one in by_seed]
            estimate = {**mean_and_error(values), "over": "seeds"} if len(values) > 1 else dict(first)
            table[name][metric] = {"low": None, "high": None, **estimate, "values": values}
    return table


def _distinct(values: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [value for place, value in enumerate(values) if value not in values[:place]]
