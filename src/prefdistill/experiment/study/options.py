"""The study file: its options, and the cells they make."""

import itertools
import json
import re
from dataclasses import dataclass
from typing import Any, Literal

from pydantic import Field, NonNegativeInt, PositiveInt, model_validator

from prefdistill.core.options import Options, Section
from prefdistill.experiment.recipe import DIRECTORY_NAME

RESERVED = ("seed", "seeds", "name")  # keys of a recipe that the study sets for each run

Scalar = bool | int | float | str | None


class Study(Section):
    """A study file. Overrides are those of a recipe: dotted key -> value, e.g. methods.tvkd.alpha: 0.3.

    The cells are the named ones, all combinations of the grid, or every named one with every combination.
    """

    name: str = Field(description="Names the directory.")
    question: str = Field(description="What the study answers; the title of its page.")
    recipe: str = Field("quickstart", description="The built-in recipe, or a file named relative to this one.")
    overrides: Options = Field(default_factory=dict, description="Overrides for every cell.")
    cells: dict[str, Options] = Field(default_factory=dict, description="Overrides of each named cell.")
    grid: dict[str, list[Scalar]] = Field(
        default_factory=dict,
        description="Values by dotted key, or by several keys, comma-separated; the last changes fastest.",
    )
    methods: list[str] = Field(min_length=1, description="Methods of the recipe, beside its baseline.")
    metric: str = Field("reward", description="What the methods are compared by.")
    x: str | None = Field(
        None, description="The grid or override key along which to plot; default: the cells are categories."
    )
    x_label: str = Field("", description="Label of the axis; default: the last part of x.")
    x_scale: Literal["linear", "log"] = Field("linear", description="Scale of the axis.")
    seed: NonNegativeInt = Field(1, description="The first seed.")
    seeds: PositiveInt = Field(3, description="Seeds of each cell, each a whole pipeline.")

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
                if key.split(".")[0] in RESERVED:
                    raise ValueError(f"{where}: {key} is set by the study; give seed and seeds at its top")
            if where != "overrides" and (both := fixed.intersection(overrides)):
                raise ValueError(f"{where}.{min(both)} is a key of the grid too; leave it out of one of them")
        cells = cells_of(self)
        if self.x is not None:
            for cell in cells:
                if not isinstance(cell.x, int | float) or isinstance(cell.x, bool):
                    raise ValueError(f"x: cell {cell.name!r} sets no number for {self.x}; every cell must")
                if self.x_scale == "log" and cell.x <= 0:
                    raise ValueError(
                        f"x_scale: log: {self.x}={cell.x} of cell {cell.name!r} is not positive; use x_scale: linear"
                    )
        return self


@dataclass(frozen=True)
class Cell:
    """One combination of the options that the study varies."""

    name: str
    overrides: dict[str, Any]  # without the study's own
    group: str  # the name without the x axis: cells of one group are one line in the plot
    x: Any = None

    def file(self, seed: int) -> str:
        return re.sub(r"[^\w.+=-]+", "_", self.name) + f"-seed-{seed}"


def _keys(key: str) -> list[str]:
    """Split a grid key into its dotted keys."""
    return [part.strip() for part in key.split(",")]


def cells_of(study: Study) -> list[Cell]:
    """Return the cells, in the order of the file; the last grid key changes fastest.

    Raises:
        ValueError: if two have the same name.
    """
    last = [_keys(key)[0].rsplit(".", 1)[-1] for key in study.grid]  # all of the key if two end alike
    short = {key: n if last.count(n) == 1 else _keys(key)[0] for key, n in zip(study.grid, last, strict=True)}
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
            raise ValueError(f"two cells have the name {cell.name!r}, or nearly; rename one")
    return cells
