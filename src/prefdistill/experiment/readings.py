"""What a run has read: its data, its chat template, and the rows and tokens of every stage, for results.json."""

from collections import defaultdict
from collections.abc import Iterator
from typing import Any

from prefdistill.data.columns import unread_columns
from prefdistill.experiment.plan import Plan
from prefdistill.experiment.step import Tokenizer
from prefdistill.experiment.user_data import UserData
from prefdistill.models.identity import tokenizer_identity

TEMPLATE_START = 300  # characters
IN_THIS_RUN = "made in this run"


def read_of(plan: Plan) -> dict[str, Any]:
    """Return the data sets of a plan with the columns that nothing reads, the tokenizers with their chat templates, and
    the truncation."""
    context, names = plan.context, plan.context.recipe.model
    teacher, truncation = names.teacher_tokenizer or names.teacher, context.truncation
    read: dict[str, Any] = {
        "data": list(_data_of(plan.user_data)) if plan.user_data else [],
        "template": _template(context.tokenizer, names.name_of("student") or (names.teacher and teacher)),
        "max_length": truncation.max_length,
        "max_prompt_length": truncation.max_prompt_length,
    }
    if context.two_tokenizers:
        tokenizer = context.teacher_tokenizer
        read["teacher_tokenizer"] = {
            "tokenizer": teacher or IN_THIS_RUN,
            "tokens": len(tokenizer.tokenizer),
            "same_tokens": not context.two_vocabularies,
            "form": getattr(tokenizer.tokenizer, "form", None),
            "template": _template(tokenizer, teacher),
        }
    return read


def _template(tokenizer: Tokenizer, name: str | None) -> dict[str, Any] | None:
    template = tokenizer.tokenizer.chat_template
    if not isinstance(template, str):
        return None
    return {
        "tokenizer": name or IN_THIS_RUN,
        "sha256": tokenizer_identity(tokenizer.tokenizer)["template_sha256"],
        "start": template[:TEMPLATE_START],
    }


def _data_of(data: UserData) -> Iterator[dict[str, Any]]:
    options, reads = data.recipe.data, data.sources.reads
    sets = {"train": (options.train, data.train)}
    if data.splits_prompts:
        sets["reward model"] = (options.train, data.reward_pairs)
    if options.test is not None:
        sets["test"] = (options.test, data.test)
    for name, (source, rows) in sets.items():
        unread = [column for column in unread_columns(rows.column_names) if column not in reads]
        yield {"name": name, "source": source, "rows": len(rows), "unread": unread}
    if options.sft is not None:
        yield {"name": "demonstrations", "source": options.sft, "rows": len(data.demonstrations), "unread": []}


def unlike(stages: list[dict[str, Any]]) -> list[str]:
    """Return a warning for each data set of which stages with one tokenizer have read other rows or tokens of the same
    responses."""
    by_rows: dict[Any, dict[str, list[str]]] = defaultdict(lambda: defaultdict(list))
    for stage in stages:
        read = stage["read"]
        if "ids" in read:
            same = stage["seed"], read["data"], tuple(read["responses"]), read.get("tokenizer")
            by_rows[same][read["ids"]].append(stage["name"])
    return [
        f"stages have encoded {data} into different rows or tokens: " + ", unlike ".join(map(", ".join, parts))
        for (_, data, *_), digests in by_rows.items()
        if len(parts := list(digests.values())) > 1
    ]


def warnings_of_trainings(stages: list[dict[str, Any]]) -> list[str]:
    """Return what the trainings of the methods have warned of before they began, once for each method."""
    return [f"{stage['method']}: {warning}" for stage in stages for warning in stage["read"].get("warnings", [])]
