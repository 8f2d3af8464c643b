"""A plan at scale: operations, memory per device by part, hours, the devices that a run needs, and what to change."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, get_args

from prefdistill.core.options import merged, validate
from prefdistill.experiment.cost import Cost, Shapes, costs
from prefdistill.experiment.flops import Lengths
from prefdistill.experiment.hardware import GPUS, Scale
from prefdistill.experiment.launch.options import Launch
from prefdistill.experiment.memory import Memory, Strategy
from prefdistill.experiment.step import Input, Rows, Step
from prefdistill.experiment.steps.models import Sft
from prefdistill.experiment.steps.reward_model import TrainRewardModel
from prefdistill.experiment.steps.signals import ReadSignals, Sample
from prefdistill.experiment.steps.students import Distill, Evaluate
from prefdistill.experiment.steps.synthetic import Pairs
from prefdistill.signals.needs import TEACHERS
from prefdistill.training.arguments import can_split

if TYPE_CHECKING:
    from prefdistill.experiment.plan import Plan
    from prefdistill.experiment.recipe import Recipe
    from prefdistill.training.options import Training

STRATEGIES: tuple[Strategy, ...] = get_args(Strategy)
SHARDED = ("sft", "dpo", "distill")  # kinds of steps that train on several devices
USABLE = 0.9  # of a device's memory: the rest is the runtime's and lost between blocks
MOST_DEVICES = 4096
TEST_PAIRS = 1000  # at most, of a plan without data
# What may make a training fit, tried in this order, one on top of another.
REMEDIES: tuple[tuple[str, dict[str, Any]], ...] = (
    ("gradient_checkpointing=true", {"gradient_checkpointing": True}),
    ("micro_batch_size=1", {"micro_batch_size": 1}),
    ("lora.r=16", {"lora": {"r": 16}}),
)
SMALLER = (4, 16, 64)  # what batches of a reading are divided by, tried in this order
Changes = dict[str, dict[str, Any]]  # options by section of a recipe; "training": of all but a reward model


@dataclass(frozen=True)
class Machine:
    """Devices that share the work of a step.

    Args:
        strategy: how they share it.
        devices: how many.
        memory: of each, in bytes.
    """

    strategy: Strategy
    devices: int
    memory: float

    def per_device(self, held: Memory) -> int:
        """Return the bytes that each holds."""
        return sum(held.parts(self.strategy, self.devices).values())

    def fits(self, held: Memory) -> bool:
        """Return whether each can hold its part."""
        return self.per_device(held) <= USABLE * self.memory


def assumed_lengths(plan: Plan, scale: Scale) -> dict[Input, Lengths]:
    """Return the lengths of data that are not there, as the options say."""
    assert scale.pairs is not None
    third = scale.tokens_per_pair / 3

    def of(pairs: float, responses: int) -> Lengths:
        tokens, prompts = round(pairs * third * responses), round(pairs * third)
        return Lengths(round(pairs), tokens, prompts, exact=False, responses=responses)

    rows = {one for step in plan.steps for one in step.inputs if isinstance(one, Rows)}
    lengths: dict[Input, Lengths] = {one: of(scale.pairs, 2) for one in rows}
    if plan.test is not None:
        lengths[plan.test] = of(min(scale.pairs, TEST_PAIRS), 2)
    demonstrations = {step.rows for step in plan.steps if type(step) is Sft}
    return lengths | {one: of(scale.pairs, 1) for one in demonstrations}


def at_scale(
    plan: Plan,
    priced: Mapping[Step, Cost],
    shapes: Shapes,
    lengths: Mapping[Input, Lengths],
    scale: Scale,
    teacher_lengths: Mapping[Input, Lengths] | None = None,
) -> dict[str, Any]:
    """Return what the steps of one seed need of some devices.

    Args:
        priced: the cost of every step, see `costs`.
        shapes, lengths, teacher_lengths: what the costs are of.

    Returns:
        `{"gpu", "devices", "strategy", "utilisation", "steps": [...], "hours", "flops", "advice": [...]}`. A step has
        flops, hours, and for each strategy that applies to it `memory` per device by part and `fits`: the fewest
        devices, or None.
    """
    name, devices = scale.gpu or "H100", scale.devices or 1
    strategy: Strategy = "one" if devices == 1 else scale.strategy or "fsdp2"
    utilisation = scale.utilisation or 0.4
    gpu, steps = GPUS[name], []
    machine = Machine(strategy, devices, gpu.memory)
    for step, cost in priced.items():
        if cost.held is None:
            continue
        at_work = _devices_at_work(plan, step, devices)
        seconds = max(cost.flops / gpu.flops, cost.moved / gpu.bandwidth) / utilisation / at_work
        strategies = strategies_of(plan, step)
        steps.append(
            {
                "name": step.name,
                "kind": step.kind,
                "flops": cost.flops,
                "hours": seconds / 3600,
                "signals": dict(cost.kinds),
                "memory": {one: cost.held.parts(one, max(devices, 2)) for one in strategies},
                "fits": {one: fewest(cost.held, one, gpu.memory, _training(plan, step)) for one in strategies},
                "per_device": _of_step(plan, step, machine).per_device(cost.held),
            }
        )
    return {
        "gpu": name,
        "devices": devices,
        "strategy": strategy,
        "utilisation": utilisation,
        "memory": gpu.memory,
        "flops": sum(step["flops"] for step in steps),
        "hours": sum(step["hours"] for step in steps),
        "steps": steps,
        "advice": [*_batches(plan, devices), *_Advice(plan, priced, shapes, lengths, teacher_lengths, machine).lines()],
    }


def strategies_of(plan: Plan, step: Step) -> tuple[Strategy, ...]:
    """Return how devices can share a step. A model that is only read is whole on a device, or spread over several where
    `signals.device_map` applies; a reward model trains on one."""
    if step.kind in SHARDED:
        return tuple(strategy for strategy in STRATEGIES if strategy != "device_map")
    return ("one", "device_map") if _can_spread(plan, step) else ("one",)


def fewest(held: Memory, strategy: Strategy, memory: float, training: Training | None = None) -> int | None:
    """Return the fewest devices of which each can hold its part; None if no number can.

    Args:
        training: counts that its batch can be split between; without one, powers of 2.
    """
    if strategy == "one":
        counts = [1]
    elif training is None:
        counts = [2**i for i in range(int(math.log2(MOST_DEVICES)) + 1)]
    else:
        first, most = 2 if strategy == "ddp" else 1, min(training.batch_size, MOST_DEVICES)
        counts = [n for n in range(first, most + 1) if can_split(training, n)]
    return next((n for n in counts if Machine(strategy, n, memory).fits(held)), None)


def _of_step(plan: Plan, step: Step, machine: Machine) -> Machine:
    """Return how the devices share a step."""
    if step.kind in SHARDED:
        return machine
    return replace(machine, strategy="device_map") if _is_spread(plan, step) else Machine("one", 1, machine.memory)


def _reads_teacher(plan: Plan, step: Step) -> bool:
    """Return whether a step loads its model as the section `signals` says: a teacher, or its reference."""
    if not isinstance(step, ReadSignals | Sample | Evaluate) or step.role == "reference":
        return False
    if isinstance(step, Sample) and plan.context.recipe.sampling.engine == "vllm":  # which loads it itself
        return False
    return step.model.role in TEACHERS and not (isinstance(step, Evaluate) and step.language)


def _can_spread(plan: Plan, step: Step) -> bool:
    """Return whether `signals.device_map` applies to a step."""
    recipe = plan.context.recipe
    workers = {"signals": recipe.launch.signals or recipe.signals.engine == "ray", "sample": _on_workers(plan, step)}
    return _reads_teacher(plan, step) and not workers.get(step.kind)


def _on_workers(plan: Plan, step: Step) -> bool:
    return step.kind == "sample" and plan.context.recipe.sampling.engine == "ray"


def _is_spread(plan: Plan, step: Step) -> bool:
    """Return whether the layers of the model that a step reads lie on several devices, which take turns."""
    return _can_spread(plan, step) and plan.context.recipe.signals.device_map is not None


def _devices_at_work(plan: Plan, step: Step, devices: int) -> int:
    """Return how many devices compute at a time: those of a launcher, or of Ray's workers, else one."""
    launched = step.kind in Launch.model_fields
    return devices if (launched or _on_workers(plan, step)) and not _is_spread(plan, step) else 1


def _training(plan: Plan, step: Step) -> Training | None:
    """Return how a step trains; None if it does not."""
    if isinstance(step, Distill):
        return plan.context.recipe.methods[step.method].training
    if isinstance(step, TrainRewardModel):
        return step.section.training
    return step.training if isinstance(step, Sft) else None


def _section(step: Step) -> str:
    """Return the section of the recipe with the options of a training step."""
    return "training" if step.kind in SHARDED else "reward_model.training"


def _batches(plan: Plan, devices: int) -> list[str]:
    """Return what to set where the devices cannot share a batch: a run would refuse such a training."""
    lines: dict[tuple[int, int, int], str] = {}
    for step in plan.steps:
        training, n = _training(plan, step), devices if step.kind in SHARDED else 1
        if training is None or can_split(training, n):
            continue
        size, micro, section = training.batch_size, training.rows_at_once, _section(step)
        whole = -(-size // (micro * n)) * micro * n
        fitting = next((m for m in range(micro, 0, -1) if size % (m * n) == 0), None)
        line = (
            f"{step.name}: batch_size={size} is not a multiple of micro_batch_size x devices = {micro} x {n}: set "
            f"{section}.batch_size={whole}" + (f", or {section}.micro_batch_size={fitting}" if fitting else "")
        )
        lines.setdefault((size, micro, n), line)
    return [*lines.values()]


@dataclass(frozen=True)
class _Advice:
    """Finds what makes steps fit that do not. Every change is tried on the plan."""

    plan: Plan
    priced: Mapping[Step, Cost]
    shapes: Shapes
    lengths: Mapping[Input, Lengths]
    teacher_lengths: Mapping[Input, Lengths] | None
    machine: Machine

    def lines(self) -> Iterator[str]:
        """Yield what to change for each step that does not fit, the steps of one size together."""
        seen = set()
        for step, cost in self.priced.items():
            held = cost.held
            key = held, strategies_of(self.plan, step), type(step)
            if held is None or key in seen or _of_step(self.plan, step, self.machine).fits(held):
                continue
            seen.add(key)
            training = _training(self.plan, step)
            more = self._of_training(step, held, training) if training else self._of_reading(step, held)
            shorter = step.kind in SHARDED
            nothing = "take shorter texts (data.max_length), or fewer layers" if shorter else "take a smaller model"
            yield f"{step.name} does not fit: {', or '.join(more) or nothing}"

    def _of_training(self, step: Step, held: Memory, training: Training) -> list[str]:
        """Return the devices that a training fits on, and the shortest list of its options that make it fit."""
        more, section, sharded = [], _section(step), step.kind in SHARDED
        if sharded and (count := fewest(held, "fsdp2", self.machine.memory, training)):
            more.append(f"--strategy fsdp2 --devices {count}")
        changes: dict[str, Any] = {}
        names: list[str] = []
        for name, change in REMEDIES if sharded else REMEDIES[:-1]:  # all weights of a reward model are trained
            if all(getattr(training, key) == value for key, value in change.items()):
                continue
            changes, names = {**changes, **change}, [*names, f"{section}.{name}"]
            if self._fits(step, {"training": changes} if sharded else {"reward_model": {"training": changes}}):
                return [*more, " ".join(names)]
        return more

    def _of_reading(self, step: Step, held: Memory) -> list[str]:
        """Return the devices that a model fits on in parts, and the first options that make it fit on one."""
        more: list[str] = []
        weights: list[Changes] = [{}]
        if _can_spread(self.plan, step) and (count := fewest(held, "device_map", self.machine.memory)):
            more.append(f"signals.device_map=auto --devices {count}")
        if _reads_teacher(self.plan, step) and self.plan.context.recipe.signals.quantization is None:
            weights.append({"signals": {"quantization": "4bit"}})
        for changes in (merged(one, batch) for one in weights for batch in self._smaller_batches(step)):
            if changes and self._fits(step, changes):
                options = (f"{name}.{key}={x}" for name, of in changes.items() for key, x in of.items())
                return [*more, " ".join(options)]
        return more

    def _smaller_batches(self, step: Step) -> list[Changes]:
        """Return options of the batches that a step reads or samples, as they are and smaller."""
        recipe = self.plan.context.recipe
        sizes: list[tuple[str, str, int]] = []
        if isinstance(step, ReadSignals) or (isinstance(step, Evaluate) and step.reference):
            sizes.append(("signals", "batch_tokens", recipe.signals.batch_tokens))
        if isinstance(step, Sample):
            sizes.append(("sampling", "batch_size", recipe.sampling.batch_size))
        if isinstance(step, Evaluate | Pairs):
            sizes.append(("evaluate", "batch_size", recipe.evaluate.batch_size))
        smaller = [{name: {key: max(1, size // by)} for name, key, size in sizes} for by in SMALLER if sizes]
        return [{}, *smaller]

    def _fits(self, step: Step, changes: Changes) -> bool:
        """Return whether a step fits with other options."""
        changed = _changed(self.plan, changes)
        other = changed.steps[self.plan.steps.index(step)]
        lengths = _moved(self.plan, changed, self.lengths)
        of_teachers = self.teacher_lengths and _moved(self.plan, changed, self.teacher_lengths)
        (cost,) = costs(changed, self.shapes, lengths, of_teachers, steps=[other], peak=True).values()
        return cost.held is not None and _of_step(changed, other, self.machine).fits(cost.held)


def _changed(plan: Plan, changes: Changes) -> Plan:
    """Return the plan with other options."""
    from prefdistill.experiment.plan import build_plan

    recipe: Recipe = plan.context.recipe
    raw = recipe.model_dump()
    for name, options in changes.items():
        if name == "training":
            stages = (raw["teacher"]["sft"], raw["teacher"]["dpo"], raw["student"]["sft"])
            for section in [*filter(None, stages), *(run["training"] for run in raw["methods"].values())]:
                section.update(options)
        else:
            raw[name] = merged(raw[name], options)
    return build_plan(validate(type(recipe), raw, "the changed recipe"), plan.context.root.parent, plan.context.seed)


def _moved(plan: Plan, changed: Plan, lengths: Mapping[Input, Lengths]) -> dict[Input, Lengths]:
    """Return the lengths of the same data in a plan of the same steps with other options."""
    steps = zip(plan.steps, changed.steps, strict=True)
    inputs = (pair for old, new in steps for pair in zip(old.inputs, new.inputs, strict=True))
    rows = ((old, new) for old, new in inputs if isinstance(old, Rows) and isinstance(new, Rows))
    return {new: lengths[old] for old, new in rows if old in lengths}
