"""Print the differences of a study's cells to its baseline with errors over the test prompts.

    python studies/over_prompts.py runs/studies/NAME ... --baseline dpo

`prefdistill study` has errors over seeds. Where the seeds share their test prompts, these say how much trainings vary
on these prompts, and nothing about other prompts. Here each prompt's value is averaged over all trainings (seeds and
data orders), and the error is a bootstrap over the prompts. Several directories are read as one study.
"""

import argparse
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from prefdistill.core.files import read_json
from prefdistill.evaluation.measure import Measured, add_win_rates
from prefdistill.evaluation.metrics import METRICS
from prefdistill.evaluation.stats import estimate, paired_difference
from prefdistill.experiment.roles import START, TEACHER
from prefdistill.report.format import markdown_table

Trainings = dict[str, list[Measured]]  # by name, in the same order of seeds and data orders as the baseline's


def runs_of(out: Path) -> Iterator[tuple[str, int, Trainings]]:
    """Yield the name of each finished cell and its seed with the measurements, by model."""
    for record in sorted((out / "cells").glob("*.json")):
        models: Trainings = defaultdict(list)
        for file in sorted((out / "work" / record.stem).glob("seed-*/evaluate-*/evaluation.json")):
            name = file.parent.name.removeprefix("evaluate-")
            if name not in (START, TEACHER, "reward-model"):
                name = name.rpartition("-")[0]  # without the number of the data order
            models[name].append(Measured(**read_json(file)))
        models.pop("reward-model", None)
        add_win_rates(models, START)
        about = read_json(record)
        yield about["cell"], about["seed"], models


def mean_items(runs: list[Measured], metric: str) -> np.ndarray:
    """Return the mean of a metric over trainings, for each test item."""
    return np.mean([run.items[metric] for run in runs], axis=0)


def shown(values: dict[str, float | None], sign: str) -> str:
    return (
        f"{values['mean']:{sign}.3f} ± {values['se'] or 0:.3f} [{values['low']:{sign}.3f}, {values['high']:{sign}.3f}]"
    )


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", nargs="+", type=Path)
    parser.add_argument("--baseline", default="dpo")
    parser.add_argument("--metrics", default="", help="comma-separated; default: all that were measured")
    arguments = parser.parse_args(argv)
    shared = {arguments.baseline, START, TEACHER}
    of_cells: dict[tuple[str, str], Trainings] = defaultdict(lambda: defaultdict(list))
    of_seeds: dict[tuple[Path, int], Trainings] = {}  # of each directory and seed what all of its cells share
    for out in arguments.out:
        for cell, seed, models in runs_of(out):
            of_seeds[out, seed] = models
            for name in set(models) - shared:
                of_cells[cell, name][name] += models[name]
                of_cells[cell, name][arguments.baseline] += models[arguments.baseline]
    levels = {name: [run for models in of_seeds.values() for run in models.get(name, [])] for name in sorted(shared)}
    measured = next(iter(of_cells.values()))[arguments.baseline][0].items
    metrics = arguments.metrics.split(",") if arguments.metrics else [name for name in METRICS if name in measured]
    for metric in metrics:
        rows = []
        for name, runs in levels.items():
            if runs and metric in runs[0].items:
                level = estimate(mean_items(runs, metric), runs[0].groups.get(metric))
                rows.append([name, str(len(runs)), shown(level, ""), "", ""])
        for (cell, name), trainings in of_cells.items():
            runs, base = trainings[name], trainings[arguments.baseline]
            each = [run.metrics[metric] - other.metrics[metric] for run, other in zip(runs, base, strict=True)]
            groups, values = runs[0].groups.get(metric), mean_items(runs, metric)
            difference = paired_difference(values, mean_items(base, metric), groups)
            spread = f"{min(each):+.3f} .. {max(each):+.3f}"
            rows.append(
                [f"{cell}: {name}", str(len(runs)), shown(estimate(values, groups), ""), shown(difference, "+"), spread]
            )
        print(f"\n## {metric}\n")
        header = ["", "trainings", "mean", f"minus {arguments.baseline}", "of each training"]
        print(markdown_table(header, rows))


if __name__ == "__main__":
    main()
