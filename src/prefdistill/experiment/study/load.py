"""Read study files, and the recipe of each cell."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from prefdistill.core.errors import UserError
from prefdistill.core.options import Override, applied, validate
from prefdistill.core.yaml import read_yaml
from prefdistill.experiment.recipe import Recipe, load_recipe, refuse_trust
from prefdistill.experiment.study.options import RESERVED, Cell, Study

BUILT_IN = {"quickstart": Path(__file__).parents[1] / "recipes" / "quickstart.yaml"}


def load_study(path: str | Path, **replaced: Any) -> Study:
    """Read a study file; `replaced` are top-level keys that win over it.

    Raises:
        UserError: on a missing file, broken YAML, an unknown key, a wrong type or no cells.
    """
    path = Path(path)
    raw = read_yaml(path, "study", "the shipped ones are under studies/", "name, question, cells")
    raw |= {key: value for key, value in replaced.items() if value is not None}
    return validate(Study, raw, str(path))


def recipe_of(study: Study, path: Path, cell: Cell, overrides: Sequence[Override], seed: int) -> Recipe:
    """Return the recipe of one cell and seed: the study's overrides, then the command line's, then the cell's.

    Raises:
        UserError: if the result is not a valid recipe, or the command line sets what the study varies.
    """
    for override in overrides:
        if override.key.split(".")[0] in RESERVED:
            raise UserError(f"{override.key} is set by the study; give --seeds, and `seed`, the first, in the file")
        for key in cell.overrides:
            if f"{override.key}.".startswith(f"{key}.") or f"{key}.".startswith(f"{override.key}."):
                raise UserError(f"{override.key}: cell {cell.name!r} of the study sets {key}; leave it out")
    refuse_trust([applied(study.overrides), applied(cell.overrides)], str(path))
    changes = [Override(key, value) for key, value in study.overrides.items()]
    changes += [*overrides, *(Override(key, value) for key, value in cell.overrides.items())]
    changes += [Override("name", study.name), Override("seed", seed), Override("seeds", 1)]
    try:
        return load_recipe(BUILT_IN.get(study.recipe) or path.parent / study.recipe, changes, only=study.methods)
    except UserError as error:
        raise UserError(f"{path}: cell {cell.name!r}: {error}") from error
