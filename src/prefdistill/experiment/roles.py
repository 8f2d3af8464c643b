"""Declared roles of a recipe's runs: the baseline, methods and controls, and the headline of the results."""

from collections.abc import Mapping
from typing import Any, Literal

from pydantic import Field, field_validator

from prefdistill.core.options import Section

# Models that are evaluated beside the methods, under these names, which are their kinds too; no method may take them.
TEACHER, START = "teacher", "start"


class Control(Section):
    """What a run controls for. A control is shown beside the methods and never counts as one.

    placebo: the same training with an uninformative teacher signal. bound: the method with the best
    signal that is known, such as the true reward; a method may exceed it.
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


def check_roles(baseline: str, controls: Mapping[str, Control | None], headline: str | None) -> None:
    """Check that the baseline, the controls and the headline name runs of the recipe that can have these roles.

    Args:
        baseline: of the recipe.
        controls: what each run controls for, by its name.
        headline: the method of the headline.

    Raises:
        ValueError: if one does not.
    """
    known = ", ".join(controls)
    if baseline not in controls:
        raise ValueError(f"baseline {baseline!r} is not among the methods: {known}")
    for name, control in controls.items():
        if control is None:
            continue
        if name == baseline:
            raise ValueError(f"methods.{name}.control: the baseline cannot be a control; leave it out")
        if control.of not in controls:
            raise ValueError(f"methods.{name}.control.of: {control.of!r} is not among the methods: {known}")
        if controls[control.of] is not None:
            raise ValueError(f"methods.{name}.control.of: {control.of!r} is a control; name a method")
    if headline is None:
        return
    if headline not in controls:
        raise ValueError(f"headline.method {headline!r} is not among the methods: {known}")
    if headline == baseline or controls[headline] is not None:
        raise ValueError(f"headline.method {headline!r} is the baseline or a control; name a method, or null for all")
