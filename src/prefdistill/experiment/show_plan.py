"""`prefdistill plan`: the steps of a recipe, what each costs, and what of it is on disk already."""

from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from prefdistill import __version__
from prefdistill.core.artifact import State
from prefdistill.core.differences import Difference, compare
from prefdistill.core.errors import UserError
from prefdistill.core.paths import check_own
from prefdistill.core.stages import inspect_stage
from prefdistill.core.text import printable, size, table
from prefdistill.data import synthetic
from prefdistill.data.columns import SIDES
from prefdistill.data.encode import encode_pairs
from prefdistill.experiment.check import check_models, check_plan
from prefdistill.experiment.cost import WHOLE, Cost, costs
from prefdistill.experiment.flops import Lengths
from prefdistill.experiment.hardware import Scale
from prefdistill.experiment.inputs import Sources
from prefdistill.experiment.launch.options import launcher_of
from prefdistill.experiment.plan import Plan, build_plans
from prefdistill.experiment.recipe import Recipe
from prefdistill.experiment.scale import assumed_lengths, at_scale
from prefdistill.experiment.show_scale import as_text as scale_text
from prefdistill.experiment.step import Input, Rows, Step, Tokenizer
from prefdistill.experiment.steps.models import Init
from prefdistill.experiment.steps.synthetic import Language
from prefdistill.models.classifiers import empty_classifier
from prefdistill.models.load import empty_model
from prefdistill.models.logprobs import vocabulary_rows
from prefdistill.models.pruned import pruned
from prefdistill.models.scratch import random_model

if TYPE_CHECKING:
    from datasets import Dataset
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

ACTIONS = {
    State.FINISHED: "reuse",
    State.UNFINISHED: "resume",
    State.MISSING: "run",
    State.STALE: "rebuild",
    State.DAMAGED: "rebuild",
    State.FOREIGN: "refuse",
}
SHOWN = 3  # reasons of a step that the table names


@dataclass(frozen=True)
class Status:
    """What a run will do with a step.

    Args:
        action: reuse, resume, run, rebuild, or refuse for files of somebody else.
        changes: where the request differs from that of what is on disk.
        reason: why, in words; empty for a step to run, or to reuse from its own directory.
    """

    action: str
    changes: tuple[Difference, ...] = ()
    reason: str = ""


def status(step: Step) -> Status:
    """Look at what is on disk for a step, and change nothing."""
    inspection = inspect_stage(step.directory, step.request)
    action = ACTIONS[inspection.state]
    if inspection.state is State.STALE:
        before = inspection.note.get("request", {})
        changes = tuple(compare(before, {**step.request, "version": __version__}, ignored=()))
        return Status(action, changes, "; ".join(map(_in_words, changes[:SHOWN])) or inspection.reason)
    if inspection.state is State.DAMAGED:
        return Status(action, reason=f"{inspection.reason} is missing or damaged")
    return Status(action, reason=inspection.reason if inspection.state is State.FOREIGN else "")


def _in_words(change: Difference) -> str:
    """A change of an input is a change of its key, which tells nothing."""
    name = change.path.removeprefix("inputs.")
    if name == change.path:
        return str(change)
    if isinstance(change.before, str) and isinstance(change.after, str):
        return f"{name} changed"
    return f"{name} is {'no longer' if isinstance(change.before, str) else 'now'} an input"


def plan_recipe(recipe: Recipe, out: Path, scale: Scale | None = None) -> dict[str, Any]:
    """Return the plan of every seed of a recipe with costs and status. Reads data and tokenizers, no weights.

    Args:
        recipe: what would run.
        out: the run directory; it need not exist.
        scale: data of a size, and devices, to plan for; adds `scale`, see `scale.at_scale`. With its `pairs`, no data,
            tokenizers or steps on disk are read.

    Returns:
        `{"recipe", "out", "steps": [...], "totals": {...}}`. A step has its name, kind, seed, role, method, order,
        round, the names of the steps and other inputs that it reads, rows, tokens, `exact` (False: upper bounds),
        memory, disk and checkpoints in bytes, its directory, `launch` (what starts its processes), its key, and action,
        reason and changes.

    Raises:
        UserError: on what a run of the recipe would refuse.
    """
    scale = scale or Scale()
    sources = Sources()
    plans = build_plans(recipe, out, sources)
    if scale.pairs is None:
        check_own(out, ("environment.json",), "run")
        check_plan(plans[0])
        check_models(recipe, sources, fetch=False)
    elif recipe.data.synthetic:
        raise UserError("--pairs plans for pairs of yours; the built-in task has its own (data.synthetic)")
    steps: list[dict[str, Any]] = []
    seeds: dict[str, int] = {}  # by key: the first seed with this step, of steps without draws
    scaled: dict[str, Any] = {}
    for plan in plans:
        if scale.pairs is not None:
            shapes, lengths = _shapes(plan, None, None), assumed_lengths(plan, scale)
            priced = costs(plan, shapes, lengths, peak=True)
            steps += [_entry(step, priced[step], None) for step in plan.steps]
            scaled = scaled or {"scale": at_scale(plan, priced, shapes, lengths, scale)}
            continue
        tokenizer, teachers = _tokenizer(plan), plan.context.teacher_tokenizer
        teachers_own = tokenizer if teachers is plan.context.tokenizer else teachers.tokenizer
        lengths = _lengths(plan, plan.context.tokenizer, tokenizer)
        teacher_lengths = _lengths(plan, teachers, teachers_own) if teachers is not plan.context.tokenizer else None
        shapes = _shapes(plan, tokenizer, teachers_own)
        priced = costs(plan, shapes, lengths, teacher_lengths, peak=scale.is_set)
        for step in plan.steps:
            state, seed = status(step), plan.context.seed
            if (
                not step.draws
                and seeds.setdefault(step.key, seed) < seed
                and state.action in ("run", "resume", "rebuild")
            ):
                state = Status("reuse", reason=f"as seed {seeds[step.key]} makes it")
            steps.append(_entry(step, priced[step], state))
        if scale.is_set and not scaled:
            scaled = {"scale": at_scale(plan, priced, shapes, lengths, scale, teacher_lengths)}
    largest = max(steps, key=lambda step: step["memory"])
    return {
        "recipe": recipe.name,
        "out": str(out),
        "steps": steps,
        "totals": {
            "steps": len(steps),
            "actions": dict(Counter(step["action"] for step in steps)),
            "memory": largest["memory"],
            "memory_step": largest["name"],
            "disk": sum(step["disk"] for step in steps),
            "checkpoints": max(step["checkpoints"] for step in steps),
        },
        **scaled,
    }


def _entry(step: Step, cost: Cost, state: Status | None) -> dict[str, Any]:
    """The entry of a step; without a status, its key and what is on disk are not looked up."""
    known, state = state is not None, state or Status("run")
    return {
        "name": step.name,
        **step.describe(),
        "after": [other.name for other in step.after],
        "inputs": [one.name for one in step.inputs],
        **{name: getattr(cost, name) for name in ("memory", "disk", "checkpoints", "rows", "tokens", "exact")},
        "launch": str(launcher) if (launcher := launcher_of(step.context.recipe.launch, step.kind)) else None,
        "key": step.key if known else None,
        "action": state.action,
        "reason": state.reason,
        "changes": [_change(change) for change in state.changes],
    }


def _change(change: Difference) -> dict[str, Any]:
    """Both values in JSON's terms; a key that one of the requests lacks is left out."""
    sides = {"was": change.before, "is": change.after}
    json_types = (str, int, float, bool, list, dict, type(None))
    return {"path": change.path, **{name: value for name, value in sides.items() if isinstance(value, json_types)}}


def _tokenizer(plan: Plan) -> "PreTrainedTokenizerBase":
    """The student's tokenizer. One that `init` has yet to make is made here in the same way, and not kept."""
    init = plan.context.tokenizer.made_by
    if not isinstance(init, Init) or status(init).action == "reuse":
        return plan.context.tokenizer.tokenizer
    return synthetic.build_tokenizer() if isinstance(init.source, Language) else init.build_tokenizer()


def _shapes(
    plan: Plan, tokenizer: "PreTrainedTokenizerBase | None", teacher_tokenizer: "PreTrainedTokenizerBase | None"
) -> "dict[str, PreTrainedModel]":
    """The models of a plan without their weights, by role. Without tokenizers, models from scratch have the vocabulary
    that the recipe asks for."""
    recipe = plan.context.recipe
    trust = recipe.model.trust_remote_code
    shapes = {}
    inits = {role: step for step in plan.steps if isinstance(step, Init) for role in step.roles}
    for role in ("teacher", "teacher_reference", "student"):
        if name := recipe.model.name_of(role):
            shapes[role] = empty_model(name, trust_remote_code=trust)
            if role == "student" and recipe.model.student_layers is not None:
                shapes |= {WHOLE: shapes[role], role: pruned(shapes[role], recipe.model.student_layers)}
        elif role in inits:
            assert recipe.model.scratch is not None
            vocabulary = (teacher_tokenizer if role == "teacher" else tokenizer) or recipe.model.scratch.vocab_size
            with torch.device("meta"):
                shapes[role] = random_model(vocabulary, inits[role].scratch[role], seed=0)
    section = recipe.reward_model
    if section is not None and section.name:
        shapes["reward_model"] = empty_model(section.name, reward=True, trust_remote_code=trust)
    elif section is not None and section.start:
        shapes["reward_model"] = empty_classifier(section.start, trust_remote_code=trust)
    elif section is not None:
        with torch.device("meta"):
            vocabulary = tokenizer or vocabulary_rows(shapes["student"])
            shapes["reward_model"] = random_model(vocabulary, section.shape, seed=0, reward=True)
    return shapes


def _lengths(plan: Plan, reader: Tokenizer, tokenizer: "PreTrainedTokenizerBase") -> dict[Input, Lengths]:
    """The lengths of the user's data sets that steps read with a tokenizer of the plan, which is here as `tokenizer`.

    Pairs whose tokens are counted are encoded as in a run.
    """
    if plan.user_data is None:
        return {}
    data = {one for step in plan.steps if step.reads_with is reader for one in step.inputs if isinstance(one, Rows)}
    return {rows: _length(rows, plan, tokenizer) for rows in data}


def _length(data: Rows, plan: Plan, tokenizer: "PreTrainedTokenizerBase") -> Lengths:
    rows: Dataset = data.rows
    responses: tuple[str, ...] = SIDES
    if "completion" in rows.column_names and SIDES[0] not in rows.column_names:
        responses = ("completion",)
    encoded, _ = encode_pairs(rows, tokenizer, plan.context.truncation, responses=responses)
    counts = [[*map(len, encoded[f"{part}_ids"])] for part in ("prompt", *responses)]
    by_row = [*zip(*counts, strict=True)]
    return Lengths(
        len(encoded),
        sum(map(sum, counts[1:])),
        sum(counts[0]),
        responses=len(responses),
        longest=max(map(sum, by_row), default=0),
        longest_text=max((prompt + max(of) for prompt, *of in by_row), default=0),
    )


# -- for a reader ------------------------------------------------------------------------------------------------------

COLUMNS = ("step", "kind", "action", "rows", "tokens", "memory", "disk", "reads")
LEFT = {place for place, name in enumerate(COLUMNS) if name not in ("rows", "tokens", "memory", "disk")}


def as_text(plan: dict[str, Any]) -> str:
    """Return a plan as a table, with the reasons of what is not reused below it, and totals."""
    steps = plan["steps"]
    several = len({step["seed"] for step in steps}) > 1
    lines = table([COLUMNS, *(_cells(step, several) for step in steps)], LEFT).splitlines()
    reasons = [f"{_name(step, several)}: {step['action']}: {step['reason']}" for step in steps if step["reason"]]
    totals = plan["totals"]
    counts = ", ".join(f"{count} to {action}" for action, count in totals["actions"].items())
    summary = [
        f"{totals['steps']} steps: {counts}",
        f"memory: at least {size(totals['memory'])} ({totals['memory_step']}), activations on top",
        *(f"launch: {kind} on {launcher}" for kind, launcher in _launchers(steps).items()),
        f"disk: up to {size(totals['disk'])} in {plan['out']}, and up to {size(totals['checkpoints'])} for checkpoints",
    ]
    bounds = (
        [] if all(step["exact"] for step in steps) else ["< marks upper bounds, for data that a step has yet to make"]
    )
    blocks = ["\n".join(map(printable, block)) for block in (lines, reasons, [*summary, *bounds]) if block]
    return "\n\n".join([*blocks, *([scale_text(plan["scale"])] if "scale" in plan else [])])


def _name(step: dict[str, Any], several: bool) -> str:
    return f"seed-{step['seed']}/{step['name']}" if several else str(step["name"])


def _launchers(steps: list[dict[str, Any]]) -> dict[str, str]:
    """What starts the processes of the kinds of steps that run on several."""
    return {step["kind"]: step["launch"] for step in steps if step["launch"]}


def _cells(step: dict[str, Any], several: bool) -> tuple[str, ...]:
    bound = "" if step["exact"] else "<"
    return (
        _name(step, several),
        step["kind"],
        step["action"],
        "" if step["rows"] is None else f"{step['rows']:,}",
        "" if step["tokens"] is None else f"{bound}{step['tokens']:,}",
        size(step["memory"]) if step["memory"] else "",
        size(step["disk"]) if step["disk"] else "",
        ", ".join(step["inputs"]),
    )
