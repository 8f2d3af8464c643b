"""Which signals the methods of a run need, and of which responses they are read."""

from collections.abc import Iterable

from prefdistill.data.columns import SIDES
from prefdistill.experiment.recipe import Recipe
from prefdistill.methods import Method
from prefdistill.signals import Need
from prefdistill.signals.kinds import make_kinds
from prefdistill.signals.needs import TEACHERS

TRAIN = "train"
STUDENT_RESPONSE = "student_response"


def reference_bf16(recipe: Recipe, methods: dict[str, Method]) -> set[bool]:
    """Return whether the trainings autocast to bfloat16, of the methods that need the reference."""
    return {
        recipe.methods[name].training.autocast
        for name, method in methods.items()
        if any(need.role == "reference" for need in method.needs)
    }


def columns_of(methods: Iterable[Method]) -> set[str]:
    """Return the numeric columns of the data that methods read, besides the scores."""
    return {column for method in methods for column in method.columns}


def held_out(methods: Iterable[Method], teacher_reference: bool) -> dict[str, set[str]]:
    """Return the kinds of signals to read of the held-out pairs, by role.

    Args:
        methods: of the run.
        teacher_reference: whether there is a model that the teacher's DPO started from.
    """
    needs = [need for method in methods for need in method.needs]
    kinds = {n.kind for n in needs if n.role == "teacher" and set(n.responses) <= set(SIDES)} - {"topk"}
    wanted = {"reference": {"logps"}}  # every student is compared with its start
    if any(n.role == "teacher" for n in needs):
        wanted["teacher"] = kinds | {"values", "logps", "q"}
        if teacher_reference:
            wanted["teacher_reference"] = {"logps"}
    return wanted


def reads_teacher(method: Method) -> bool:
    """Return whether a method learns from signals or responses of the teacher."""
    return "teacher_response" in method.responses or any(need.role in TEACHERS for need in method.needs)


def learns_from_pairs(method: Method) -> bool:
    """Return whether a method learns from the teacher's signals of the pairs."""
    return any(need.role in TEACHERS and set(need.responses) <= set(SIDES) for need in method.needs)


def of_own_tokens(method: Method) -> list[Need]:
    """Return the needs of a method that a teacher with other tokens than the student's cannot serve."""
    needs = (need for need in method.needs if need.role in TEACHERS and need.across is None)
    return [need for need in needs if make_kinds([need.kind])[0].needs_same_tokens]


def split_needs(needs: Iterable[Need]) -> list[Need]:
    """Split the needs of signals by where the responses come from: the pairs, or samples of teacher or student."""
    return [
        Need(need.role, need.kind, part)
        for need in needs
        if need.role != "data"
        for part in (tuple(r for r in need.responses if r in SIDES), *((r,) for r in need.responses if r not in SIDES))
        if part
    ]


def source(need: Need) -> str:
    """Return "train" for responses of the pairs, else the column of the sampled responses."""
    return TRAIN if need.responses[0] in SIDES else need.responses[0]


def union(several: Iterable[tuple[str, ...]]) -> tuple[str, ...]:
    return tuple(sorted({response for responses in several for response in responses}))
