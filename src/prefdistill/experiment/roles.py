"""Declared roles of a recipe's runs: the baseline, methods and controls, and the headline of the results."""

from typing import TYPE_CHECKING, Any, Literal

from pydantic import Field, field_validator

from prefdistill.core.options import Section

if TYPE_CHECKING:
    from prefdistill.experiment.recipe import Recipe

# Models that are evaluated beside the methods, under these names; no method may take them.
TEACHER, START = "teacher", "start"
REFERENCE_KINDS = {TEACHER: "teacher", START: "start"}


class Control(Section):
    """What a run controls for. A control is shown beside the methods and never counts as one.

    placebo: the same training with an uninformative teacher signal. bound: an upper bound on what the signal can give.
    noise_floor: a repeat of `of` with nothing changed but the random order of the data.
    """

    kind: Literal["placebo", "bound", "noise_floor"] = Field(description="placebo, bound or noise_floor.")
    of: str = Field(description="The method that it is a control of.")


class Headline(Section):
    """What the verdict is about."""

    metric: str | None = Field(None, description="Default: the first metric of the registry that was measured.")
    method: str | None = Field(None, description="Default: every method alike.")

    @field_validator("metric")
    @classmethod
    def _known(cls, metric: str | None) -> str | None:
        from prefdistill.core.errors import UserError
        from prefdistill.evaluation.metrics import METRICS

        if metric is None or metric.lower() in METRICS:
            return metric and metric.lower()
        try:
            METRICS.find(metric)
        except UserError as error:
            raise ValueError(f"headline.metric: {error}") from error
        raise ValueError(f"headline.metric: {metric!r} is not registered; METRICS.register it under a name")


def refuse_flag(control: Any) -> Any:
    """Return a `control` section; refuse the true or false of older recipes.

    Raises:
        ValueError: with the form to use.
    """
    if isinstance(control, bool):
        raise ValueError(
            f"`control: {str(control).lower()}` does not say what the run controls for; "
            + (
                "write e.g. `control: {kind: placebo, of: tvkd}`: kind is placebo, bound or noise_floor, of is the "
                "method it is a control of"
                if control
                else "leave it out"
            )
        )
    return control


def check_roles(recipe: "Recipe") -> None:
    """Check that the baseline, the controls and the headline name runs of the recipe that can have these roles.

    Raises:
        ValueError: if one does not.
    """
    known = ", ".join(recipe.methods)
    if recipe.baseline not in recipe.methods:
        raise ValueError(f"baseline {recipe.baseline!r} is not among the methods: {known}")
    for name, run in recipe.methods.items():
        if run.control is None:
            continue
        if name == recipe.baseline:
            raise ValueError(f"methods.{name}.control: the baseline cannot be a control; leave it out")
        of = recipe.methods.get(run.control.of)
        if of is None:
            raise ValueError(f"methods.{name}.control.of: {run.control.of!r} is not among the methods: {known}")
        if of.control is not None or of is run:
            raise ValueError(f"methods.{name}.control.of: {run.control.of!r} is a control; name a method")
    headline = recipe.headline.method
    if headline is None:
        return
    if headline not in recipe.methods:
        raise ValueError(f"headline.method {headline!r} is not among the methods: {known}")
    if headline == recipe.baseline or recipe.methods[headline].control is not None:
        raise ValueError(f"headline.method {headline!r} is the baseline or a control; name a method, or null for all")


def roles_of(recipe: "Recipe", names: list[str]) -> dict[str, dict[str, str | None]]:
    """Return `roles` of results.json: the kind of each row, and the run a control is a control of.

    Args:
        names: the rows of the results, in their order.
    """
    roles: dict[str, dict[str, str | None]] = {}
    for name in names:
        run = recipe.methods.get(name)
        if run is None:
            roles[name] = {"kind": REFERENCE_KINDS[name], "of": None}
        elif run.control is not None:
            roles[name] = {"kind": run.control.kind, "of": run.control.of}
        else:
            roles[name] = {"kind": "baseline" if name == recipe.baseline else "method", "of": None}
    return roles


def display_names(recipe: "Recipe") -> dict[str, str]:
    """Return how sentences write the runs: as the recipe says, else as the method does that gives the run its name."""
    from prefdistill.methods import METHODS

    names = {}
    for name, run in recipe.methods.items():
        own = METHODS.find(run.method).display_name if run.method.lower() == name.lower() else ""
        if shown := run.display_name or own:
            names[name] = shown
    return names
