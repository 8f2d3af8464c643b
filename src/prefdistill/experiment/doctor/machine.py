"""Memory and disk that a run needs, from the shapes of its models alone, against what is there."""

from __future__ import annotations

import copy
import shutil
from collections import defaultdict
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import torch

from prefdistill.core.errors import UserError
from prefdistill.core.options import validate
from prefdistill.core.paths import check_place
from prefdistill.experiment.doctor.findings import Finding, Severity
from prefdistill.experiment.recipe import Recipe
from prefdistill.experiment.supply import STUDENT, held_out, source, split
from prefdistill.methods import Method, make_method, sampled
from prefdistill.models.device import default_device, default_dtype
from prefdistill.models.logprobs import vocabulary_rows
from prefdistill.signals.sizes import store_bytes
from prefdistill.training.arguments import adapter_config
from prefdistill.training.options import DPOTraining, Training

if TYPE_CHECKING:
    from transformers import PreTrainedModel

ADAM = 2  # moments of each trained weight, of its dtype
NEARLY = 0.8  # of what is free: more than that deserves a warning
CGROUP = Path("/sys/fs/cgroup")
# What is planned without a recipe; the names stand for what the caller gives.
USUAL = {
    "name": "usual",
    "data": {"train": "train"},
    "model": {"teacher": "teacher", "student": "student"},
    "methods": {"tvkd": {}},
    "baseline": "tvkd",
}


@dataclass(frozen=True)
class Lengths:
    """What the signals will be of: rows, and tokens of both responses together."""

    pairs: int
    tokens: int


@dataclass
class Plan:
    """What the parts of a run hold in memory, one after another, and leave on disk together; in bytes."""

    memory: dict[str, int] = field(default_factory=dict)
    disk: dict[str, int] = field(default_factory=dict)


def weight_bytes(model: PreTrainedModel, dtype: str, quantization: str | None = None) -> int:
    stored: Any = getattr(model.config, "quantization_config", None)
    if stored is not None:
        stored = stored if isinstance(stored, dict) else stored.to_dict()
        bits = stored.get("bits") or (4 if stored.get("load_in_4bit") else 8)
    elif quantization is not None:
        bits = int(quantization.removesuffix("bit"))
    else:
        bits = 8 * _dtype(model, dtype).itemsize
    return model.num_parameters() * bits // 8


def _dtype(model: PreTrainedModel, dtype: str) -> torch.dtype:
    if dtype == "auto":
        return cast(torch.dtype, model.config.dtype or torch.float32)
    return cast(torch.dtype, getattr(torch, dtype))


def training_bytes(model: PreTrainedModel, training: Training, dtype: str) -> int:
    r"""Weights, gradients and Adam's moments; activations come on top.

    .. math:: 4 n b \quad\text{or, with adapters of } m \text{ weights,}\quad n b + 16 m
    """
    weights = weight_bytes(model, dtype)
    if training.lora is None:
        return weights * (2 + ADAM)
    return weights + adapter_bytes(model, training) * (2 + ADAM)


def adapter_bytes(model: PreTrainedModel, training: Training) -> int:
    """Of what LoRA adds to the weights, in float32; 0 without.

    Raises:
        UserError: if the model has nothing that the adapter asks for.
    """
    config = adapter_config(training)
    if config is None:
        return 0
    from peft import get_peft_model

    try:
        adapted = get_peft_model(copy.deepcopy(model), config)
    except ValueError as error:
        raise UserError(f"training.lora: {error}") from error
    return adapted.get_nb_trainable_parameters()[0] * 4


def checkpoint_bytes(trained: int, training: Training) -> int:
    """Of trained weights, those that are kept and one more: an old one goes when the new one is whole; no gradients."""
    kept = training.arguments.get("save_total_limit") or 1
    return (cast(int, kept) + 1) * trained * (1 + ADAM)


def plan_for(
    recipe: Recipe | None,
    models: dict[str, PreTrainedModel],
    train: Lengths | None,
    test: Lengths | None,
    judge: PreTrainedModel | None = None,
) -> Plan:
    """What a recipe's run takes; without one, TVKD on one student."""
    recipe = recipe or validate(Recipe, USUAL, "the usual run")
    plan = Plan()
    teacher, student = models.get("teacher"), models.get("student")
    dtype = recipe.model.dtype
    checkpoints = [0]

    def trained(what: str, model: PreTrainedModel, training: Training, held_beside: int, times: int) -> None:
        weights, adapter = weight_bytes(model, dtype), adapter_bytes(model, training)
        plan.memory[f"training {what}"] = training_bytes(model, training, dtype) + held_beside * weights
        plan.disk[f"weights of {what}"] = (weights + adapter) * times
        checkpoints.append(checkpoint_bytes(adapter or weights, training))

    for role, model in models.items():
        if getattr(recipe.model, role) is None:
            plan.disk[f"weights of the {role} from scratch"] = weight_bytes(model, "float32") * recipe.seeds
    if teacher is not None:
        for stage, training in (("SFT", recipe.teacher.sft), ("DPO", recipe.teacher.dpo)):
            if training is not None:
                beside = int(isinstance(training, DPOTraining) and training.lora is None)
                trained(f"the teacher's {stage}", teacher, training, beside, recipe.seeds)
    methods = {name: make_method(run.method, run.options) for name, run in recipe.methods.items()}
    if teacher is not None and any(need.role == "teacher" for method in methods.values() for need in method.needs):
        asked = recipe.signals.dtype or default_dtype("teacher")
        plan.memory["reading the teacher"] = weight_bytes(teacher, asked, recipe.signals.quantization)
    if student is not None:
        if recipe.student.sft:
            trained("the student's SFT", student, recipe.student.sft, 0, recipe.seeds)
        for name, run in recipe.methods.items():  # trainers of ours hold the student alone
            held = len(getattr(methods[name], "models", _one)(lambda: None, adapter=run.training.lora is not None)) - 1
            trained(f"{name}", student, run.training, held, recipe.seeds * recipe.orders * run.rounds)
    if judge is not None and recipe.reward_model:
        if recipe.reward_model.name:
            plan.memory["reading the reward model"] = weight_bytes(judge, "auto")
        else:
            trained("the reward model", judge, recipe.reward_model.training, 0, recipe.seeds)
    rows = {role: vocabulary_rows(model) for role, model in models.items()}
    for where, part in (("train", train), ("test", test)):
        if part is not None and rows:
            plan.disk |= _signals(recipe, methods, where, part, max(rows.values()))
    drawn = {(response, name) for name, method in methods.items() for response in sampled(method)}
    if train is not None and drawn:
        times = _starts(recipe, [name for response, name in drawn if response == STUDENT])
        times += any(response != STUDENT for response, _ in drawn)  # the teacher's are drawn once
        most = train.pairs * recipe.sampling.n * recipe.sampling.max_new_tokens * times
        plan.disk["sampled responses, at most"] = most * 5 * recipe.seeds  # characters of a token
    plan.disk["checkpoints while training"] = max(checkpoints)
    plan.disk = {what: size for what, size in plan.disk.items() if size}
    return plan


def _one(load: Any, adapter: bool) -> dict[str, Any]:
    """What a trainer of ours holds: the student."""
    return {"model": load()}


def _signals(recipe: Recipe, methods: dict[str, Method], where: str, part: Lengths, vocabulary: int) -> dict[str, int]:
    asked = recipe.signals
    packed = asked.topk_coding != "float32" if asked.topk_coding else asked.k != "vocab"
    readers: dict[tuple[str, str], set[str]] = defaultdict(set)  # methods, by model and responses
    kinds: dict[tuple[str, str], set[str]] = defaultdict(set)
    if where == "test":
        reference = recipe.teacher.dpo is not None or recipe.model.teacher_reference is not None
        kinds |= {(role, where): read for role, read in held_out(methods.values(), reference).items()}
    else:
        for name, method in methods.items():
            for need in split(method.needs):
                readers[need.role, source(need)].add(name)
                kinds[need.role, source(need)].add(need.kind)
    found: dict[str, int] = {}
    for (role, of), read in kinds.items():
        drawn = of not in ("train", "test")
        responses = part.pairs * (recipe.sampling.n if drawn else 2)
        size = store_bytes(
            read,
            responses * recipe.sampling.max_new_tokens if drawn else part.tokens,
            responses,
            vocabulary,
            positions=asked.positions if read == {"values"} and where == "train" else "all",
            value_dtype=asked.value_dtype,
            k=asked.k,
            packed=packed,
            own_ids=role == "teacher",
        )
        own = where == "train" and (role == "reference" or of == STUDENT)
        size *= recipe.seeds * (_starts(recipe, readers[role, of]) if own else 1)
        what = f"signals of the {role.replace('_', ' ')} on {of} ({', '.join(sorted(read))})"
        found[what + (", at most" if drawn else "")] = size
    return found


def _starts(recipe: Recipe, names: Iterable[str]) -> int:
    """How many models the students of these methods start from; each is read, and answers, on its own."""
    starts: set[object] = set()
    for name in names:
        run = recipe.methods[name]
        for order in range(recipe.orders):
            starts.add((run.start, order) if run.start else None)
            starts |= {(name, order, number) for number in range(1, run.rounds)}
    return len(starts)


# -- what is there -----------------------------------------------------------------------------------------------------


def memory_there() -> tuple[str, int, int]:
    """Device, free and total bytes of the memory that models are held in; a container's limit counts.

    What a container holds of files that were read is there for the taking, as it is in a machine's "available".
    """
    device = default_device().type
    if device not in ("cpu", "mps"):  # these two share the machine's
        free, total = torch.accelerator.get_memory_info()
        return device, free, total
    import psutil

    there = psutil.virtual_memory()
    free, total = there.available, there.total
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


def disk_there(place: Path) -> int:
    """Free bytes where `place` will be."""
    while not place.exists():
        place = place.absolute().parent
    return shutil.disk_usage(place).free


# -- findings ----------------------------------------------------------------------------------------------------------


def memory(plan: Plan, device: str, free: int, total: int) -> Iterator[Finding]:
    if not plan.memory:
        return
    what, need = max(plan.memory.items(), key=lambda item: item[1])
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


def disk(plan: Plan, place: Path, free: int) -> Iterator[Finding]:
    if not plan.disk:
        return
    need = sum(plan.disk.values())
    what, most = max(plan.disk.items(), key=lambda item: item[1])
    severity: Severity = "error" if need > free else "warning" if need > NEARLY * free else "note"
    fix = "Free some, or take less: positions=endpoints, value_dtype=float16, a smaller k, LoRA."
    yield Finding(
        "machine.disk",
        severity,
        f"up to {size(need)} of disk, most of it for {what} ({size(most)}); {size(free)} are free in {place}",
        "Nothing to do." if severity == "note" else fix,
    )


def size(count: int) -> str:
    """Bytes for a reader.

    Example:
        >>> size(3 * 2**30 // 2)
        '1.5 GiB'
    """
    for unit, power in (("GiB", 30), ("MiB", 20), ("KiB", 10)):
        if count >= 1 << power:
            return f"{count / (1 << power):,.1f} {unit}"
    return f"{count} bytes"
