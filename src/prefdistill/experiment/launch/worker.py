"""One of the processes that make a step: `python -m prefdistill.experiment.launch.worker DIRECTORY`."""

from pathlib import Path
from typing import Any

from prefdistill.experiment.launch.outcome import process_main


def make_step(request: dict[str, Any]) -> dict[str, Any]:
    """Make the step of a request of `Step.work`, and return its peak memory in this process, in bytes."""
    import torch

    from prefdistill.core.errors import UserError
    from prefdistill.core.memory import PeakMemory
    from prefdistill.core.options import validate
    from prefdistill.core.processes import processes
    from prefdistill.core.progress import not_again, quiet_libraries
    from prefdistill.experiment.plan import build_plan
    from prefdistill.experiment.recipe import Recipe
    from prefdistill.models.hub import pin_commits

    quiet_libraries()
    not_again(request["said"])
    pin_commits(request["commits"])
    recipe: Recipe = validate(Recipe, request["recipe"], "the recipe of the run", strict=False)
    if recipe.threads:
        torch.set_num_threads(recipe.threads)
    plan = build_plan(recipe, Path(request["out"]), request["seed"])
    step = next(step for step in plan.steps if step.name == request["step"])
    team = processes()  # gives this process its device
    if step.row_keys != request["rows"]:
        raise UserError("the data were changed during the run; run the same command again")
    with PeakMemory() as peak:
        step.make(step.directory)
    team.destroy_process_group()
    return {"peak_memory": peak.bytes}


if __name__ == "__main__":
    process_main(make_step)
