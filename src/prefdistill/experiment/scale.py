"""A plan at scale: operations, memory per device by part, hours, the devices that a run needs, and what to change."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, get_args

from prefdistill.core.options import validate
from prefdistill.experiment.cost import Cost, Shapes, costs
from prefdistill.experiment.flops import Lengths
from prefdistill.experiment.hardware import GPUS, Scale
from prefdistill.experiment.launch.options import Launch
from prefdistill.experiment.memory import Memory, Strategy
from prefdistill.experiment.step import Input, Model, Rows, Step
from prefdistill.experiment.steps.models import Sft
from prefdistill.experiment.steps.students import Distill

if TYPE_CHECKING:
    from prefdistill.experiment.plan import Plan
    from prefdistill.experiment.recipe import Recipe
    from prefdistill.training.options import Training

STRATEGIES: tuple[Strategy, ...] = get_args(Strategy)
USABLE = 0.9  # of a device's memory: the rest is the runtime's and lost between blocks
MOST_DEVICES = 4096
TEST_PAIRS = 1000  # at most, of a plan without data
# What may make a training fit, tried in this order, one on top of another.
REMEDIES: tuple[tuple[str, dict[str, Any]], ...] = (
    ("gradient_checkpointing=true", {"gradient_checkpointing": True}),
    ("micro_batch_size=1", {"micro_batch_size": 1}),
    ("lora.r=16", {"lora": {"r": 16}}),
)


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
    plan: Plan, priced: Mapping[Step, Cost], shapes: Shapes, lengths: Mapping[Input, Lengths], scale: Scale
) -> dict[str, Any]:
    """Return what the steps of one seed need of some devices.

    Returns:
        `{"gpu", "devices", "strategy", "utilisation", "steps": [...], "hours", "flops", "advice": [...]}`. A step has
        flops, hours, `memory` per device by strategy and part, and `fits`: the fewest devices by strategy, or None.
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
        steps.append(
            {
                "name": step.name,
                "kind": step.kind,
                "flops": cost.flops,
                "hours": seconds / 3600,
                "signals": dict(cost.kinds),
                "memory": {one: cost.held.parts(one, max(devices, 2)) for one in STRATEGIES},
                "fits": {one: fewest(cost.held, one, gpu.memory) for one in STRATEGIES},
                "per_device": _of_step(plan, step, cost.held, machine).per_device(cost.held),
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
        "advice": [*_advice(plan, priced, shapes, lengths, machine)],
    }


def fewest(held: Memory, strategy: Strategy, memory: float) -> int | None:
    """Return the fewest devices, a power of 2, of which each can hold its part; None if no number can."""
    counts = {"one": [1], "ddp": [2]}  # more hold no less
    powers = counts.get(strategy) or [2**i for i in range(int(math.log2(MOST_DEVICES)) + 1)]
    return next((n for n in powers if Machine(strategy, n, memory).fits(held)), None)


def _advice(
    plan: Plan,
    priced: Mapping[Step, Cost],
    shapes: Shapes,
    lengths: Mapping[Input, Lengths],
    machine: Machine,
) -> Iterator[str]:
    """Yield what to change for each step that does not fit, the steps of one size together."""
    seen = set()
    for step, cost in priced.items():
        held = cost.held
        if held is None or held in seen or _of_step(plan, step, held, machine).fits(held):
            continue
        seen.add(held)
        sharded = fewest(held, "fsdp2", machine.memory)
        if held.gradients:
            more = [f"--strategy fsdp2 --devices {sharded}"] if sharded else []
            more += _remedies(plan, step, shapes, lengths, machine)
        else:
            more = [f"signals.device_map=auto --devices {sharded}"] if sharded else []
            more += ["signals.quantization=4bit"] if held.weights > USABLE * machine.memory / 2 else []
            more += [] if sharded else ["smaller batches: signals.batch_tokens, sampling.batch_size"]
        changes = ", or ".join(more) or "take shorter texts (data.max_length), or fewer layers"
        yield f"{step.name} does not fit: {changes}"


def _of_step(plan: Plan, step: Step, held: Memory, machine: Machine) -> Machine:
    """Return how the devices share a step. A model that is only read is whole on each of them, or spread over them."""
    if held.gradients:
        return machine
    return replace(machine, strategy="fsdp2" if _is_spread(plan, step) else "one")


def _is_spread(plan: Plan, step: Step) -> bool:
    """Return whether the layers of the model that a step reads lie on several devices, which take turns."""
    model = getattr(step, "model", None)
    return isinstance(model, Model) and plan.context.placement(model.role).get("device_map") is not None


def _devices_at_work(plan: Plan, step: Step, devices: int) -> int:
    """Return how many devices compute at a time: those of a launcher, or of Ray's workers, else one."""
    launched = step.kind in Launch.model_fields
    on_workers = step.kind == "sample" and plan.context.recipe.sampling.engine == "ray"
    return devices if (launched or on_workers) and not _is_spread(plan, step) else 1


def _remedies(plan: Plan, step: Step, shapes: Shapes, lengths: Mapping[Input, Lengths], machine: Machine) -> list[str]:
    """Return the shortest list of changes of the training that make it fit, as one item; empty if there is none."""
    place = plan.steps.index(step)
    changes: dict[str, Any] = {}
    names: list[str] = []
    section = _training(plan, step)
    for name, change in REMEDIES:
        if section and all(getattr(section, key) == value for key, value in change.items()):
            continue
        changes, names = {**changes, **change}, [*names, name]
        changed = _changed(plan, changes)
        steps = [changed.steps[place]]
        (cost,) = costs(changed, shapes, _moved(plan, changed, lengths), steps=steps, peak=True).values()
        if cost.held and machine.fits(cost.held):
            return [" ".join(f"training.{one}" for one in names)]
    return []


def _training(plan: Plan, step: Step) -> Training | None:
    if isinstance(step, Distill):
        return plan.context.recipe.methods[step.method].training
    return step.training if isinstance(step, Sft) else None


def _changed(plan: Plan, training: dict[str, Any]) -> Plan:
    """Return the plan with other options in every training."""
    from prefdistill.experiment.plan import build_plan

    recipe: Recipe = plan.context.recipe
    raw = recipe.model_dump()
    sections = [
        raw[part][stage] for part, stages in (("teacher", ("sft", "dpo")), ("student", ("sft",))) for stage in stages
    ]
    for section in [*filter(None, sections), *(run["training"] for run in raw["methods"].values())]:
        section.update(training)
    return build_plan(validate(type(recipe), raw, "the changed recipe"), plan.context.root.parent, plan.context.seed)


def _moved(plan: Plan, changed: Plan, lengths: Mapping[Input, Lengths]) -> dict[Input, Lengths]:
    """Return the lengths of the same data in a plan of the same steps with other options."""
    steps = zip(plan.steps, changed.steps, strict=True)
    inputs = (pair for old, new in steps for pair in zip(old.inputs, new.inputs, strict=True))
    rows = ((old, new) for old, new in inputs if isinstance(old, Rows) and isinstance(new, Rows))
    return {new: lengths[old] for old, new in rows if old in lengths}
