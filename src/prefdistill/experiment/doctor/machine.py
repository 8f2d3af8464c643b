"""Check the memory and the disk that a run needs, from the shapes of its models, against the machine."""

from __future__ import annotations

import shutil
from collections import defaultdict
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import torch

from prefdistill.core.errors import UserError
from prefdistill.core.options import validate
from prefdistill.core.paths import check_place
from prefdistill.core.text import size
from prefdistill.experiment.cost import Shapes, costs
from prefdistill.experiment.doctor.findings import Finding, Severity
from prefdistill.experiment.flops import Lengths
from prefdistill.experiment.plan import build_plan
from prefdistill.experiment.recipe import Recipe
from prefdistill.experiment.step import Input, Step
from prefdistill.experiment.steps.models import Init, Prune, Sft
from prefdistill.experiment.steps.reward_model import EvaluateRewardModel, TrainRewardModel
from prefdistill.experiment.steps.signals import ReadSignals, Sample
from prefdistill.experiment.steps.students import Distill
from prefdistill.models.device import default_device

NEARLY = 0.8  # share of the free bytes from which on a need is a warning
CGROUP = Path("/sys/fs/cgroup")
# The recipe that is planned where the user names none; its names stand for the models and data of the caller.
USUAL = {
    "name": "usual",
    "data": {"train": "train"},
    "model": {"teacher": "teacher", "student": "student"},
    "methods": {"tvkd": {}},
    "baseline": "tvkd",
}


@dataclass
class Needs:
    """What the parts of a run hold in memory, one after another, and leave on disk together; in bytes."""

    memory: dict[str, int] = field(default_factory=dict)
    disk: dict[str, int] = field(default_factory=dict)


def needs_of(
    recipe: Recipe | None, shapes: Shapes, lengths: Mapping[str, Lengths], teacher_lengths: Mapping[str, Lengths]
) -> Needs:
    """Return what a recipe's run needs; without a recipe, TVKD on one student.

    Args:
        recipe: what is run.
        shapes: of its models.
        lengths: of the data sets "train" and "test", as far as they are known.
        teacher_lengths: the same in the tokens that the teacher reads.

    Raises:
        UserError: if training.lora does not fit its model.
    """
    if recipe is None:
        recipe = validate(Recipe, USUAL | {"data": {"train": "train", **{n: n for n in lengths}}}, "the usual run")
    plan = build_plan(recipe, Path(), recipe.seed)
    data: dict[str, Input] = {name: rows for name, rows in (("train", plan.train), ("test", plan.test)) if rows}
    of_student, of_teacher = ({data[n]: part[n] for n in data if n in part} for part in (lengths, teacher_lengths))
    memory: dict[str, int] = defaultdict(int)
    disk: dict[str, int] = defaultdict(int)
    checkpoints = 0
    for step, cost in costs(plan, shapes, of_student, of_teacher).items():
        doing, leaves = _labels(step)
        memory[doing] = max(memory[doing], cost.memory)
        disk[leaves] += cost.disk * recipe.seeds
        checkpoints = max(checkpoints, cost.checkpoints)
    disk["checkpoints while training"] = checkpoints
    return Needs(*({what: size for what, size in parts.items() if size} for parts in (memory, disk)))


def _labels(step: Step) -> tuple[str, str]:
    """Return what a step does in memory and leaves on disk, in words; the same words for steps that belong together."""
    if isinstance(step, Sft):
        what = f"the {step.role}'s {step.kind.upper()}"
    elif isinstance(step, Distill):
        what = step.method
    elif isinstance(step, TrainRewardModel):
        what = "the reward model"
    elif isinstance(step, Init):
        return "making models from random weights", "weights of the models from scratch"
    elif isinstance(step, Prune):
        return "leaving layers out of the student", "weights of the student with fewer layers"
    elif isinstance(step, EvaluateRewardModel):
        return "reading the reward model", "accuracy of the reward model"
    elif isinstance(step, ReadSignals):
        drawn = isinstance(step.data, Sample)
        data = step.data.column if isinstance(step.data, Sample) else step.data.name
        role = str(step.role).replace("_", " ")
        leaves = f"signals of the {role} on {data} ({', '.join(step.kinds)})" + (", at most" if drawn else "")
        return f"reading the {'student' if step.role == 'reference' else role}", leaves
    else:
        model = getattr(step, "model", None)
        return f"reading the {model.role if model else 'data'}", "sampled responses, at most"
    return f"training {what}", f"weights of {what}"


# -- the machine -------------------------------------------------------------------------------------------------------


def available_memory() -> tuple[str, int, int]:
    """Return the device, and the free and total bytes of the memory that holds models, within a container's limit.

    The page cache of a container counts as free, as it does in a machine's "available" memory.
    """
    device = default_device().type
    if device not in ("cpu", "mps"):  # these two use the machine's memory
        free, total = torch.accelerator.get_memory_info()
        return device, free, total
    import psutil

    memory = psutil.virtual_memory()
    free, total = memory.available, memory.total
    if (limit := _number(CGROUP / "memory.max")) is not None:
        used = (_number(CGROUP / "memory.current") or 0) - _cached_files()
        free, total = min(free, limit - used), min(total, limit)
    return device, max(free, 0), total


def _number(path: Path) -> int | None:
    try:
        return int(path.read_text())
    except (OSError, ValueError):  # not a container, or without a limit ("max")
        return None


def _cached_files() -> int:
    try:
        lines = (CGROUP / "memory.stat").read_text().splitlines()
    except OSError:
        return 0
    return next((int(line.split()[1]) for line in lines if line.startswith("inactive_file ")), 0)


def free_disk(place: Path) -> int:
    """Return the free bytes of the disk that `place` will be on."""
    while not place.exists():
        place = place.absolute().parent
    return shutil.disk_usage(place).free


# -- findings ----------------------------------------------------------------------------------------------------------


def memory(needs: Needs, device: str, free: int, total: int) -> Iterator[Finding]:
    if not needs.memory:
        return
    what, need = max(needs.memory.items(), key=lambda item: item[1])
    where = f"{size(free)} of {size(total)} are free ({device})"
    text = f"{what} needs at least {size(need)}, activations on top; {where}"
    fix = (
        "Use LoRA (training.lora), a smaller student, or dtype bfloat16."
        if what.startswith("training")
        else "Read the teacher in 4bit (signals --quantization 4bit) or choose a smaller one."
    )
    if need > total:
        yield Finding("machine.memory", "error", text, fix)
    elif need > NEARLY * free:
        yield Finding("machine.memory", "warning", text, f"Free memory first. {fix}")
    else:
        yield Finding("machine.memory", "note", text, "Nothing to do.")


def place(out: Path) -> Iterator[Finding]:
    try:
        check_place(out)
    except UserError as error:
        message, _, fix = str(error).rpartition("; ")
        yield Finding("machine.place", "error", message, f"{fix[:1].upper()}{fix[1:]}.")


def disk(needs: Needs, place: Path, free: int) -> Iterator[Finding]:
    if not needs.disk:
        return
    need = sum(needs.disk.values())
    what, most = max(needs.disk.items(), key=lambda item: item[1])
    severity: Severity = "error" if need > free else "warning" if need > NEARLY * free else "note"
    fix = "Free some, or take less: positions=endpoints, value_dtype=float16, a smaller k, LoRA."
    yield Finding(
        "machine.disk",
        severity,
        f"up to {size(need)} of disk, most of it for {what} ({size(most)}); {size(free)} are free in {place}",
        "Nothing to do." if severity == "note" else fix,
    )
