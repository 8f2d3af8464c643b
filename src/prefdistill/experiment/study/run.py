"""Run the missing and the stale cells of a study."""

import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from prefdistill import __version__
from prefdistill.core.artifact import State
from prefdistill.core.errors import UserError
from prefdistill.core.file_artifact import RecordArtifact
from prefdistill.core.files import file_digest
from prefdistill.core.lock import locked
from prefdistill.core.options import Override
from prefdistill.core.paths import check_own, check_place
from prefdistill.core.progress import say
from prefdistill.experiment.inputs import ModelChanged, Sources, source_fingerprints
from prefdistill.experiment.recipe import Recipe
from prefdistill.experiment.study.load import load_study, recipe_of
from prefdistill.experiment.study.options import Cell, Study, cells_of
from prefdistill.experiment.study.results import KEPT, distinct, items_of, over_records, without_points
from prefdistill.training.nan_guard import NotFinite

RECORD = 2  # changes with what a record holds
SYNTHETIC_FILES = ("pairs/train.jsonl", "pairs/test.jsonl", "data/demonstrations.jsonl")  # of a seed


class CellsFailed(RuntimeError):
    """Some cells of a study failed while running."""


@dataclass
class StudyRun:
    """A study in a directory: a record per cell and seed in `cells/`, a run directory for each in `work/`."""

    study: Study
    path: Path
    out: Path
    pool: Path
    overrides: list[Override]

    def __post_init__(self) -> None:
        self.cells = cells_of(self.study)
        self.seeds = range(self.study.seed, self.study.seed + self.study.seeds)
        self.sources = Sources()
        self.artifacts: dict[tuple[str, int], RecordArtifact] = {}  # by cell and seed

    def recipe(self, cell: Cell, seed: int) -> Recipe:
        return recipe_of(self.study, self.path, cell, self.overrides, seed)

    def check(self) -> None:
        """Check every cell before the first one runs, and find the request of each.

        Raises:
            UserError: on the first cell that cannot run.
        """
        from prefdistill.experiment.check import check_models, check_plan
        from prefdistill.experiment.plan import build_plan
        from prefdistill.experiment.summary import METRICS

        if self.study.metric not in METRICS:
            raise UserError(f"{self.path}: metric {self.study.metric!r} is not measured; known: {', '.join(METRICS)}")
        for cell in self.cells:
            recipe = self.recipe(cell, self.seeds[0])
            plan = build_plan(recipe, self.out, self.seeds[0], self.sources)
            try:
                check_plan(plan)
                check_models(recipe, self.sources)
            except UserError as error:
                raise UserError(f"{self.path}: cell {cell.name!r}: {error}") from error
            sources = source_fingerprints(recipe, self.sources)
            options = {key: value for key, value in recipe.cache_key().items() if key != "seed"}
            for seed in self.seeds:
                request = {
                    "recipe": options, "sources": sources, "seed": seed, "version": __version__, "record": RECORD,
                }  # fmt: skip
                place = self.out / "cells" / f"{cell.file(seed)}.json"
                self.artifacts[cell.name, seed] = RecordArtifact(
                    f"cell {cell.name}, seed {seed}", place, request, "study"
                )

    def finished(self) -> dict[tuple[str, int], dict[str, Any]]:
        """Return the records of the cells that need not be run."""
        inspections = {at: artifact.inspect() for at, artifact in self.artifacts.items()}
        return {at: inspection.seal for at, inspection in inspections.items() if inspection.state is State.FINISHED}

    def summary(self, failed: list[dict[str, Any]]) -> dict[str, Any]:
        """Return results.json as it stands: every cell over its seeds.

        Args:
            failed: `{"cell", "seed", "error", "refused"}` each.
        """
        study, records = self.study, self.finished()
        first = next(iter(records.values()), None)
        shared = ("labels", "roles", "display_names", "metrics")
        cells = [
            over_records(cell, [records[cell.name, s] for s in self.seeds if (cell.name, s) in records])
            for cell in self.cells
        ]
        data = {seed: [record["data"] for (_, s), record in records.items() if s == seed] for seed in self.seeds}
        return {
            "study": study.name,
            **study.model_dump(include={"question", "recipe", "metric", "x", "x_scale"}),
            "overrides": study.overrides | {change.key: change.value for change in self.overrides},
            "x_label": study.x_label or (study.x or "").rsplit(".", 1)[-1],
            "seeds": list(self.seeds),
            "methods": list(first["differences"]) if first else study.methods,
            **{name: (first or {}).get(name, {}) for name in shared},
            "cells": cells,
            "failed": failed,
            "seconds": round(sum(record["seconds"] for record in records.values()), 1),
            "environments": distinct([record["environment"] for record in records.values()]),
            "data": {f"seed {seed}": distinct(digests) for seed, digests in data.items()},
        }

    def run(self, command: str) -> list[dict[str, Any]]:
        """Run what is missing or stale, one seed after the other, writing the results so far before each cell.

        Returns:
            The cells that failed.
        """
        from prefdistill.report.study import write_study

        failed: list[dict[str, Any]] = []
        finished = self.finished()
        missing = [(cell, seed) for seed in self.seeds for cell in self.cells if (cell.name, seed) not in finished]
        say(f"study {self.study.name}: {len(missing)} of {len(self.artifacts)} cells to run")
        start = time.monotonic()
        for done, (cell, seed) in enumerate(missing):
            left = (time.monotonic() - start) / done * (len(missing) - done) if done else None
            remaining = "" if left is None else f", about {left / 60:.0f} min left"
            say(f"study {self.study.name}: cell {done + 1} of {len(missing)} ({cell.name}, seed {seed}){remaining}")
            write_study(self.summary(failed), self.out)  # `run_study` writes it after the last cell
            try:
                self.run_cell(cell, seed, command)
            except ModelChanged:  # the other cells use that model as well
                raise
            except Exception as error:  # run the other cells; the next call retries this one
                reason = " ".join(str(error).split()) or type(error).__name__
                say(f"study {self.study.name}: cell {cell.name}, seed {seed} failed: {reason}")
                refused = isinstance(error, UserError) and not isinstance(error, NotFinite)
                message = reason if isinstance(error, UserError) else f"{type(error).__name__}: {reason}"
                failed.append({"cell": cell.name, "seed": seed, "error": message, "refused": refused})
        return failed

    def run_cell(self, cell: Cell, seed: int, command: str) -> None:
        """Run the recipe of a cell, and write the record."""
        from prefdistill.experiment.run import environment, run_recipe
        from prefdistill.experiment.summary import share_tests

        artifact = self.artifacts[cell.name, seed]
        with artifact.session(lock=False):
            recipe = self.recipe(cell, seed)
            work = self.out / "work" / cell.file(seed)
            start = time.monotonic()
            results = run_recipe(recipe, work, command=command, pool=self.pool, sources=self.sources)
            overrides = self.study.overrides | {change.key: change.value for change in self.overrides} | cell.overrides
            artifact.seal(
                {
                    "study": self.study.name,
                    "cell": cell.name,
                    "seed": seed,
                    "overrides": overrides,
                    **{name: results[name] for name in KEPT if name in results},
                    "items": items_of(work, results["stages"]) if share_tests(recipe) else {},
                    "shaping": without_points(results["shaping"]),
                    "warnings": results["warnings"],
                    "seconds": round(time.monotonic() - start, 3),
                    "stages": results["stages"],
                    "data": self._data_digests(recipe, work, seed),
                    "environment": environment(command),
                    "recipe": recipe.model_dump(mode="json"),
                }
            )

    def _data_digests(self, recipe: Recipe, work: Path, seed: int) -> dict[str, Any]:
        """Return digests of the data that a cell used: the user's, or of the files it made."""
        digests = source_fingerprints(recipe, self.sources)
        if not recipe.data.synthetic:
            return digests
        return digests | {name: file_digest(work / f"seed-{seed}" / name) for name in SYNTHETIC_FILES}


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
    """Run the missing and stale cells of a study, and write results.json, table.md, plot.svg and study.html into `out`.

    Args:
        path: the study file.
        out: the directory; default runs/studies/NAME.
        overrides: "key=value" each, of the recipe, for every cell.
        seeds: number of seeds instead of the file's.
        recipe: a recipe file instead of the study's.
        metric: instead of the study's.
        stages: the pool of finished steps; studies with the same pool share teachers and starts. Default: OUT/stages.
        command: for the record.

    Returns:
        The content of results.json.

    Raises:
        UserError: if the study or one of its cells is invalid, before anything runs; or if every cell was refused while
            it ran.
        CellsFailed: after all cells were tried, if any failed while running; the results of the others are written.

    Example:
        >>> run_study("studies/alpha.yaml", seeds=1)                                   # doctest: +SKIP
    """
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
        results = run.summary(failed)
        if failed and not run.finished() and all(cell["refused"] for cell in failed):  # then the input is wrong
            _clean(out, before)
            raise UserError(f"{path}: cell {failed[0]['cell']!r}: {failed[0]['error']}")
        write_study(results, out)
    if failed:
        first = failed[0]
        raise CellsFailed(
            f"{len(failed)} cells failed, the first ({first['cell']}, seed {first['seed']}) with {first['error']}; "
            f"the others are in {out}, and the same command retries"
        )
    return results


def _clean(out: Path, before: set[str]) -> None:
    """Remove what a refused study wrote into `out`; steps that were finished stay."""
    for name in {"results.json", "table.md", "plot.svg", "study.html"} - before:
        (out / name).unlink(missing_ok=True)
    if "work" not in before:
        with suppress(OSError):  # not empty
            (out / "work").rmdir()
