"""Prompts with all that the chat template reads of a row: the messages, tools, documents and the template's variables.

prompt = prompt_of({"prompt": [{"role": "user", "content": "2 + 3?"}], "tools": [...]})
Encoder(tokenizer).text(prompt)
"""

from __future__ import annotations

import json
import reprlib
from collections.abc import Collection, Iterator, Mapping
from typing import TYPE_CHECKING, Any

from prefdistill.core.errors import UserError
from prefdistill.data.columns import TEMPLATE_COLUMNS
from prefdistill.data.messages import normal_messages, without_nulls
from prefdistill.models.form import RESERVED

if TYPE_CHECKING:
    from datasets import Dataset

VARIABLES = "chat_template_kwargs"


class Conversation(list[dict[str, Any]]):
    """The messages of a prompt, and `inputs`, the other arguments with which the chat template renders them."""

    def __init__(self, messages: list[dict[str, Any]], inputs: Mapping[str, Any]) -> None:
        super().__init__(messages)
        self.inputs = dict(inputs)


def prompt_of(row: Mapping[str, Any]) -> Any:
    """Return the prompt of a row: text, messages, or a `Conversation` if the template gets more than messages.

    Raises:
        UserError: if a column for the template cannot be read.
    """
    prompt, inputs = row["prompt"], template_inputs(row)
    return Conversation(prompt, inputs) if inputs and isinstance(prompt, list) else prompt


def prompts_of(dataset: Dataset) -> list[Any]:
    """Return the prompt of every row, as `prompt_of` does."""
    columns = prompt_columns(dataset.column_names)
    return [prompt_of(row) for row in dataset.select_columns(columns)] if columns[1:] else dataset["prompt"][:]


def prompt_columns(columns: Collection[str]) -> list[str]:
    """Return those of these columns that `prompt_of` reads."""
    return [name for name in ("prompt", *TEMPLATE_COLUMNS) if name in columns]


def inputs_of(prompt: Any) -> dict[str, Any]:
    """Return what the chat template gets beside the messages of a prompt."""
    return getattr(prompt, "inputs", {})


def prompt_text(prompt: Any) -> str:
    """Return a prompt as one text by which prompts are compared: the text itself, or as JSON all that is rendered."""
    if isinstance(prompt, str):
        return prompt
    messages, inputs = normal_messages(list(prompt)), inputs_of(prompt)
    return json.dumps([messages, inputs] if inputs else messages, sort_keys=True, ensure_ascii=False)


def template_inputs(row: Mapping[str, Any]) -> dict[str, Any]:
    """Return the arguments of the chat template that the columns `TEMPLATE_COLUMNS` of a row hold, none of them empty.

    Lists, objects and JSON text of them are the same; no key is null, at any depth, see `without_nulls`.

    Raises:
        UserError: about a value that is none of these.
    """
    return {name: value for column in TEMPLATE_COLUMNS for name, value in _inputs(row.get(column), column)}


def _inputs(value: Any, column: str) -> Iterator[tuple[str, Any]]:
    value = _decoded(value)
    if column != VARIABLES:
        items = [_decoded(item) for item in (value if isinstance(value, list) else [value] if value else [])]
        if wrong := [item for item in items if not isinstance(item, dict)]:
            raise UserError(f"'{column}' must be a list of objects, or JSON text of one, not {reprlib.repr(wrong[0])}")
        if items:
            yield column, without_nulls(items)
    elif value:
        if not isinstance(value, dict):
            raise UserError(f"'{column}' must be an object, or JSON text of one, not {reprlib.repr(value)}")
        if taken := sorted(RESERVED & {*value}):
            raise UserError(f"'{column}' sets '{taken[0]}', which is no variable of a chat template; leave it out")
        yield from without_nulls(value).items()


def _decoded(value: Any) -> Any:
    """Return JSON text as the value that it writes, and anything else as it is."""
    try:
        return json.loads(value) if isinstance(value, str) and value.strip() else value
    except ValueError:
        return value
