"""Studies: one recipe, run with some of its settings varied, and what came out side by side.

A study is a file: a question, a recipe, and the cells to run. A cell is one run of the recipe with one seed; its result
is one JSON file. Only cells that are missing, or were made from something else, are run, so that a study can be
interrupted, and seeds and cells added. Stages that are the same in several cells are made once (`run_stage`'s pool).
"""

import itertools
import json
import re
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from pydantic import Field, NonNegativeInt, PositiveInt, model_validator

from prefdistill import __version__
from prefdistill.core.errors import UserError
from prefdistill.core.files import file_digest, read_json, value_digest, write_json
from prefdistill.core.options import Options, Override, Section, applied, validate
from prefdistill.core.paths import check_own, check_place
from prefdistill.core.progress import say
from prefdistill.core.yaml import read_yaml
from prefdistill.experiment.inputs import ModelChanged, Sources, source_fingerprints
from prefdistill.experiment.recipe import DIRECTORY_NAME, Recipe, load_recipe, refuse_trust
from prefdistill.training.nan_guard import NotFinite

BUILT_IN = {"quickstart": Path(__file__).parent / "recipes" / "quickstart.yaml"}
# Set by the study for each of its runs.
OURS = ("seed", "seeds", "name")
# Of a recipe: what it says about itself, without a part in what comes out, and the names that `source_fingerprints`
# replaces.
NO_PART: dict[str, Any] = {
    **dict.fromkeys([*OURS, "task", "fast"], True),
    "data": {"train", "test", "sft"},
    "model": {"teacher", "teacher_reference", "student"},
    "reward_model": {"name"},
}

Scalar = bool | int | float | str | None


class Study(Section):
    """A study file. Overrides are those of a recipe: dotted key -> value, e.g. methods.tvkd.alpha: 0.3."""

    name: str
    question: str
    recipe: str = "quickstart"  # the built-in one, or a file named relative to this one
    overrides: Options = Field(default_factory=dict)  # for every cell
    # The cells: named ones, all combinations of a grid, or every named one with every combination. A grid key may be
    # several dotted keys with commas between, which take the same value.
    cells: dict[str, Options] = Field(default_factory=dict)
    grid: dict[str, list[Scalar]] = Field(default_factory=dict)
    methods: list[str] = Field(min_length=1)  # of the recipe, beside its baseline
    metric: str = "reward"
    x: str | None = None  # the grid or override key along which to plot; default: the cells are categories
    x_label: str = ""
    x_scale: Literal["linear", "log"] = "linear"
    seed: NonNegativeInt = 1
    seeds: PositiveInt = 3

    @model_validator(mode="after")
    def _consistent(self) -> "Study":
        if not DIRECTORY_NAME.fullmatch(self.name):
            raise ValueError(f"name: {self.name!r} names a directory: use letters, digits and . _ + - only")
        if not self.cells and not self.grid:
            raise ValueError("the study has no cells: name them under cells, or give values under grid")
        for key, values in self.grid.items():
            if not values:
                raise ValueError(f"grid.{key} has no values")
            if len({json.dumps(value) for value in values}) < len(values):
                raise ValueError(f"grid.{key} has a value twice")
        fixed = {part for key in self.grid for part in _keys(key)}
        for where, overrides in (("overrides", self.overrides), *((f"cells.{n}", c) for n, c in self.cells.items())):
            for key in overrides:
                if key.split(".")[0] in OURS:
                    raise ValueError(f"{where}: {key} is set by the study; give seed and seeds at its top")
            if where != "overrides" and (both := fixed.intersection(overrides)):
                raise ValueError(f"{where}.{min(both)} is a key of the grid too; leave it out of one of them")
        cells = cells_of(self)
        if self.x is not None:
            for cell in cells:
                if not isinstance(cell.x, int | float) or isinstance(cell.x, bool):
                    raise ValueError(f"x: cell {cell.name!r} gives {self.x} no number; every cell must")
                if self.x_scale == "log" and cell.x <= 0:
                    raise ValueError(
                        f"x_scale: log has no place for {self.x}={cell.x} of cell {cell.name!r}; use x_scale: linear"
                    )
        return self


@dataclass(frozen=True)
class Cell:
    """One combination of what the study varies."""

    name: str
    overrides: dict[str, Any]  # its own, without the study's
    group: str  # its name without what is on the x axis: cells of one group are one line in the plot
    x: Any = None

    def file(self, seed: int) -> str:
        return re.sub(r"[^\w.+=-]+", "_", self.name) + f"-seed-{seed}"


def _keys(key: str) -> list[str]:
    """The dotted keys of a grid key."""
    return [part.strip() for part in key.split(",")]


def cells_of(study: Study) -> list[Cell]:
    """The cells, in the order of the file; the last grid key changes fastest.

    Raises:
        ValueError: if two have the same name.
    """
    short = _short_names(list(study.grid))
    cells: list[Cell] = []
    for name, own in (study.cells or {"": {}}).items():
        for values in itertools.product(*study.grid.values()):
            point = dict(zip(study.grid, values, strict=True))
            overrides = dict(own) | {part: value for key, value in point.items() for part in _keys(key)}
            parts = {key: f"{short[key]}={value}" for key, value in point.items()}
            on_axis = next((key for key in point if study.x in (key, *_keys(key))), study.x)
            x = point.get(on_axis, overrides.get(on_axis)) if on_axis else None
            # a named cell that sets x itself differs from its neighbours by x alone
            own_name = "" if study.x in own else name
            group = ", ".join(filter(None, [own_name, *(text for key, text in parts.items() if key != on_axis)]))
            cells.append(Cell(", ".join(filter(None, [name, *parts.values()])), overrides, group, x))
    files = [cell.file(0) for cell in cells]
    for cell, file in zip(cells, files, strict=True):
        if files.count(file) > 1:
            raise ValueError(f"two cells would be called {cell.name!r} or nearly so; name them apart")
    return cells


def _short_names(keys: list[str]) -> dict[str, str]:
    """The last part of each grid key, or all of it where two end alike."""
    last = {key: _keys(key)[0].rsplit(".", 1)[-1] for key in keys}
    return {key: name if list(last.values()).count(name) == 1 else _keys(key)[0] for key, name in last.items()}


def load_study(path: str | Path, **replaced: Any) -> Study:
    """Read a study file; `replaced` are top-level keys that win over it.

    Raises:
        UserError: on a missing file, broken YAML, an unknown key, a wrong type or no cells.
    """
    path = Path(path)
    raw = read_yaml(path, "study", "the shipped ones are under studies/", "name, question, cells")
    raw |= {key: value for key, value in replaced.items() if value is not None}
    return validate(Study, raw, str(path))


def recipe_path(study: Study, path: Path) -> Path:
    return BUILT_IN.get(study.recipe) or path.parent / study.recipe


def recipe_of(study: Study, path: Path, cell: Cell, overrides: Sequence[Override], seed: int) -> Recipe:
    """The recipe of one cell and seed: the study's overrides, then the command line's, then the cell's.

    Raises:
        UserError: if they do not make a recipe, or the command line sets what the study varies.
    """
    for override in overrides:
        if override.key.split(".")[0] in OURS:
            raise UserError(f"{override.key} is set by the study; give --seeds, and `seed`, the first, in the file")
        for key in cell.overrides:
            if f"{override.key}.".startswith(f"{key}.") or f"{key}.".startswith(f"{override.key}."):
                raise UserError(f"{override.key}: cell {cell.name!r} of the study sets {key}; leave it out")
    refuse_trust([applied(study.overrides), applied(cell.overrides)], str(path))
    changes = [Override(key, value) for key, value in study.overrides.items()]
    changes += [*overrides, *(Override(key, value) for key, value in cell.overrides.items())]
    changes += [Override("name", study.name), Override("seed", seed), Override("seeds", 1)]
    try:
        return load_recipe(recipe_path(study, path), changes, only=study.methods)
    except UserError as error:
        raise UserError(f"{path}: cell {cell.name!r}: {error}") from error


@dataclass
class StudyRun:
    """A study on its way, in `out`: results in `cells/`, a run directory for each in `work/`."""

    study: Study
    path: Path
    out: Path
    pool: Path
    overrides: list[Override]

    def __post_init__(self) -> None:
        self.cells = cells_of(self.study)
        self.seeds = range(self.study.seed, self.study.seed + self.study.seeds)
        self.sources = Sources()
        self.prints: dict[str, dict[str, Any]] = {}  # of the data and models of the recipes, by their names
        self.keys: dict[tuple[str, int], str] = {}

    def recipe(self, cell: Cell, seed: int) -> Recipe:
        return recipe_of(self.study, self.path, cell, self.overrides, seed)

    def check(self) -> None:
        """Find what is wrong with any cell before the first one runs, and what each is made from."""
        from prefdistill.experiment.check import check_models, check_plan
        from prefdistill.experiment.plan import build_plan
        from prefdistill.experiment.summary import METRICS

        if self.study.metric not in METRICS:
            raise UserError(f"{self.path}: metric {self.study.metric!r} is not measured; known: {', '.join(METRICS)}")
        for cell in self.cells:
            recipe = self.recipe(cell, self.seeds[0])
            plan = build_plan(recipe, self.out, self.seeds[0], self.sources)
            made_from = _names(recipe)
            try:
                check_plan(plan)
                if made_from not in self.prints:
                    check_models(recipe)
            except UserError as error:
                raise UserError(f"{self.path}: cell {cell.name!r}: {error}") from error
            essence = recipe.model_dump(mode="json", exclude=NO_PART)
            if made_from not in self.prints:
                self.prints[made_from] = source_fingerprints(recipe, self.sources)
            given = self.prints[made_from]
            for seed in self.seeds:
                parts = {"recipe": essence, "given": given, "seed": seed, "version": __version__}
                self.keys[cell.name, seed] = value_digest(parts)

    def file(self, cell: Cell, seed: int) -> Path:
        return self.out / "cells" / f"{cell.file(seed)}.json"

    def finished(self, cell: Cell, seed: int) -> bool:
        file = self.file(cell, seed)
        return file.is_file() and read_json(file).get("key") == self.keys[cell.name, seed]

    def run(self, command: str) -> list[dict[str, Any]]:
        """Run what is missing, a whole seed before the next, showing what there is before each; returns what failed."""
        from prefdistill.report.study import write_study

        failed: list[dict[str, Any]] = []
        wanted = [(cell, seed) for seed in self.seeds for cell in self.cells]
        missing = [(cell, seed) for cell, seed in wanted if not self.finished(cell, seed)]
        say(f"study {self.study.name}: {len(missing)} of {len(wanted)} cells to run")
        start = time.monotonic()
        for done, (cell, seed) in enumerate(missing):
            left = (time.monotonic() - start) / done * (len(missing) - done) if done else None
            rest = "" if left is None else f", about {left / 60:.0f} min left"
            say(f"study {self.study.name}: cell {done + 1} of {len(missing)} ({cell.name}, seed {seed}){rest}")
            write_study(summary(self, failed), self.out)  # the last cell is followed by the whole
            try:
                self._run_cell(cell, seed, command)
            except ModelChanged:  # of which the other cells are made as well
                raise
            except Exception as error:  # the other cells are worth having; the next call tries this one again
                reason = " ".join(str(error).split()) or type(error).__name__
                say(f"study {self.study.name}: cell {cell.name}, seed {seed} failed: {reason}")
                refused = isinstance(error, UserError) and not isinstance(error, NotFinite)
                told = reason if isinstance(error, UserError) else f"{type(error).__name__}: {reason}"
                failed.append({"cell": cell.name, "seed": seed, "error": told, "refused": refused})
        return failed

    def _run_cell(self, cell: Cell, seed: int, command: str) -> None:
        from prefdistill.experiment.run import environment, run_recipe

        recipe = self.recipe(cell, seed)
        work = self.out / "work" / cell.file(seed)
        start = time.monotonic()
        results = run_recipe(recipe, work, command=command, pool=self.pool, sources=self.sources)
        kept = (
            "baseline",
            "methods",
            "differences",
            "metrics",
            "labels",
            "controls",
            "margin_accuracy",
            "gauge_flips",
            "judge",
        )
        shaping = {
            name: {key: value for key, value in of.items() if key != "points"}
            for name, of in results["shaping"].items()
        }
        write_json(
            self.file(cell, seed),
            {
                "study": self.study.name,
                "cell": cell.name,
                "seed": seed,
                "key": self.keys[cell.name, seed],
                "overrides": {
                    **self.study.overrides,
                    **{change.key: change.value for change in self.overrides},
                    **cell.overrides,
                },
                **{name: results[name] for name in kept if name in results},
                "shaping": shaping,
                "warnings": results["warnings"],
                "seconds": round(time.monotonic() - start, 3),
                "stages": results["stages"],
                "data": data_of(recipe, work, seed, self.prints),
                "environment": environment(command),
                "recipe": recipe.model_dump(mode="json"),
            },
        )


def _names(recipe: Recipe) -> str:
    """Of the data and models that a recipe is given: where the names are the same, so is what they stand for."""
    parts = (recipe.data, recipe.model, recipe.reward_model)
    return value_digest([part.model_dump() if part else None for part in parts])


def data_of(recipe: Recipe, work: Path, seed: int, prints: dict[str, dict[str, Any]]) -> dict[str, Any]:
    """Digests of the data a cell has used: those it was given, or of the files it has made."""
    found = prints[_names(recipe)]
    if not recipe.data.synthetic:
        return found
    made = ("pairs/train.jsonl", "pairs/test.jsonl", "data/demonstrations.jsonl")
    return found | {name: file_digest(work / f"seed-{seed}" / name) for name in made}


def run_study(
    path: str | Path,
    out: Path | None = None,
    *,
    overrides: Sequence[str] = (),
    seeds: int | None = None,
    recipe: Path | None = None,
    metric: str | None = None,
    stages: Path | None = None,
    command: str = "",
) -> dict[str, Any]:
    """Run the missing cells of a study, and write results.json, table.md, plot.svg and study.html into `out`.

    Args:
        path: the study file.
        out: where everything goes; default runs/studies/NAME.
        overrides: "key=value" each, of the recipe, for every cell.
        seeds: how many, in place of the file's number.
        recipe: a recipe file in place of the study's.
        metric: in place of the study's.
        stages: the pool of finished stages; give several studies the same one, and they share teachers and starts.
            Default: OUT/stages.
        command: as it is to be told in the results.

    Returns:
        What is written to results.json.

    Raises:
        UserError: if the study or one of its cells cannot be, before anything runs; or if every cell was refused
            while it ran.
        CellsFailed: after all cells were tried, if any failed while running; the rest is written.

    Example:
        >>> run_study("studies/alpha.yaml", seeds=1)                                   # doctest: +SKIP
    """
    from prefdistill.core.lock import locked
    from prefdistill.report.study import write_study

    path = Path(path)
    study = load_study(path, seeds=seeds, metric=metric, recipe=str(recipe.resolve()) if recipe else None)
    out = out or Path("runs") / "studies" / study.name
    run = StudyRun(study, path, out, stages or out / "stages", [Override.parse(text) for text in overrides])
    check_own(out, ("cells", "work", "stages", "results.json"), "study")
    check_place(run.pool / "x", "--stages")
    run.check()
    with locked(out):
        before = {path.name for path in out.iterdir()}
        failed = run.run(command)
        results = summary(run, failed)
        if _refused(results):
            _clean(out, before)
            raise UserError(f"{path}: cell {failed[0]['cell']!r}: {failed[0]['error']}")
        write_study(results, out)
    if failed:
        first = failed[0]
        raise CellsFailed(
            f"{len(failed)} cells failed, the first ({first['cell']}, seed {first['seed']}) with {first['error']}; "
            f"the others are in {out}, and the same command tries again"
        )
    return results


def _refused(results: dict[str, Any]) -> bool:
    """Whether nothing came of a study but refusals: then it is the input that is wrong, and not a cell."""
    failed = results["failed"]
    nothing = not any(cell["seeds"] for cell in results["cells"])
    return bool(failed) and nothing and all(one["refused"] for one in failed)


def _clean(out: Path, before: set[str]) -> None:
    """Remove what such a study has written into `out`; stages that were made before they were refused stay."""
    for name in {"results.json", "table.md", "plot.svg", "study.html"} - before:
        (out / name).unlink(missing_ok=True)
    if "work" not in before:
        with suppress(OSError):  # not empty
            (out / "work").rmdir()


class CellsFailed(RuntimeError):
    """Some cells of a study failed while running."""


def summary(run: StudyRun, failed: list[dict[str, Any]]) -> dict[str, Any]:
    """results.json of a study: every cell over its seeds, from the cells' files."""
    found = {
        (cell.name, seed): read_json(run.file(cell, seed))
        for cell in run.cells
        for seed in run.seeds
        if run.finished(cell, seed)
    }
    cells = []
    for cell in run.cells:
        results = [found[cell.name, seed] for seed in run.seeds if (cell.name, seed) in found]
        cells.append(
            {
                "cell": cell.name,
                "group": cell.group,
                "x": cell.x,
                "overrides": cell.overrides,
                "files": [f"cells/{run.file(cell, result['seed']).name}" for result in results],
                "seeds": [result["seed"] for result in results],
                "methods": _over_seeds(results, "methods"),
                "differences": _over_seeds(results, "differences"),
                "margin_accuracy": _over_seeds([{"m": {"": r["margin_accuracy"]}} for r in results], "m").get("", {}),
                "shaping_std": {
                    name: [result["shaping"][name]["std"] for result in results if name in result["shaping"]]
                    for name in sorted({name for result in results for name in result["shaping"]})
                },
                "warnings": sorted({warning for result in results for warning in result["warnings"]}),
            }
        )
    some = list(found.values())
    methods = list(some[0]["differences"]) if some else run.study.methods
    return {
        "study": run.study.name,
        "question": run.study.question,
        "recipe": run.study.recipe,
        "overrides": run.study.overrides | {change.key: change.value for change in run.overrides},
        "metric": run.study.metric,
        "x": run.study.x,
        "x_label": run.study.x_label or (run.study.x or "").rsplit(".", 1)[-1],
        "x_scale": run.study.x_scale,
        "seeds": list(run.seeds),
        "methods": methods,
        "baseline": some[0]["baseline"] if some else "",
        "labels": some[0]["labels"] if some else {},
        "controls": some[0]["controls"] if some else [],
        "metrics": some[0]["metrics"] if some else {},
        "cells": cells,
        "failed": failed,
        "seconds": round(sum(result["seconds"] for result in some), 1),
        "environments": _distinct([result["environment"] for result in some]),
        "data": {
            f"seed {seed}": _distinct([result["data"] for (_, s), result in found.items() if s == seed])
            for seed in run.seeds
        },
    }


def _over_seeds(results: list[dict[str, Any]], part: str) -> dict[str, dict[str, Any]]:
    """Mean, standard error and 95 % interval over the seeds, by method and metric; with one seed, what that says."""
    from prefdistill.evaluation.stats import mean_and_error
    from prefdistill.report.table import Estimate

    table: dict[str, dict[str, Any]] = {}
    for name in results[0][part] if results else []:
        table[name] = {}
        for metric, first in results[0][part][name].items():
            by_seed = [result[part][name][metric] for result in results if metric in result[part].get(name, {})]
            values = [one["mean"] for one in by_seed]
            estimate = {**mean_and_error(values), "over": "seeds"} if len(values) > 1 else dict(first)
            interval = (estimate["low"], estimate["high"]) if "low" in estimate else None
            parsed = Estimate.parse(estimate)
            interval = interval or (parsed.interval() if parsed else None)
            low, high = interval or (None, None)
            table[name][metric] = {**estimate, "low": low, "high": high, "values": values}
    return table


def _distinct(values: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [value for place, value in enumerate(values) if value not in values[:place]]
