"""Values of prompt and response columns: text, or a list of messages with a role and content."""

import json
import reprlib
from collections.abc import Iterable, Iterator
from itertools import takewhile
from typing import Any, Literal

from prefdistill.core.errors import UserError
from prefdistill.data.columns import SIDES

Form = Literal["plain", "conversational"]


def form_of(value: Any, name: str) -> Form:
    """Return whether a value is text or a list of messages.

    Raises:
        UserError: about `name` if it is neither.
    """
    if isinstance(value, str):
        return "plain"
    if isinstance(value, list) and value and all(_is_message(message) for message in value):
        return "conversational"
    raise UserError(
        f"{name} must be text or a list of messages with a text `role` and `content`, not {reprlib.repr(value)}."
    )


def _is_message(value: Any) -> bool:
    return isinstance(value, dict) and all(isinstance(value.get(key), str) for key in ("role", "content"))


def check_roles(messages: list[dict[str, Any]], column: str, where: str) -> None:
    """Check that a prompt ends before an assistant message, and that a response holds assistant messages only.

    Raises:
        UserError: about the row `where`.
    """
    roles = [message["role"] for message in messages]
    if column == "prompt" and roles[-1] == "assistant":
        raise UserError(f"{where}: the prompt ends with an assistant message. End it with the turn to answer.")
    if column != "prompt" and (others := sorted({*roles} - {"assistant"})):
        fix = "Keep assistant messages only; what comes before them belongs to the prompt."
        raise UserError(f"{where}: '{column}' has a message with the role '{others[0]}'. {fix}")


def without_nulls(value: Any) -> Any:
    """Return messages without the null keys that Arrow adds where the messages of a column differ in their keys."""
    if not isinstance(value, list):
        return value
    return [{key: item for key, item in message.items() if item is not None} for message in value]


def prompt_text(prompt: Any) -> str:
    """Return a prompt as one text by which prompts are compared: the text itself, or its messages as JSON."""
    return prompt if isinstance(prompt, str) else json.dumps(without_nulls(prompt), sort_keys=True, ensure_ascii=False)


def split_shared_prompt(row: dict[str, Any], index: int, source: str) -> dict[str, Any]:
    """Return a pair whose `prompt` is the shared start of `chosen` and `rejected`.

    Raises:
        UserError: if they do not start alike.
    """
    from trl import extract_prompt

    where = f"{source}, row {index}"
    for side in SIDES:
        form_of(row[side], f"{where}: '{side}'")
    if not row["chosen"] or row["chosen"][:1] != row["rejected"][:1]:  # TRL's function assumes a shared start
        raise UserError(f"{where}: 'chosen' and 'rejected' do not start alike. Add a `prompt` column.")
    return extract_prompt(row)


def split_last_turn(row: dict[str, Any], index: int, source: str) -> dict[str, Any]:
    """Return `messages` as `prompt` and `completion`, the assistant messages at the end.

    Raises:
        UserError: if there is no assistant message at the end, or nothing before it.
    """
    where, messages = f"{source}, row {index}", row["messages"]
    if form_of(messages, f"{where}: 'messages'") == "plain":
        raise UserError(f"{where}: 'messages' must be a list of messages, not {reprlib.repr(messages)}.")
    completion = list(takewhile(lambda message: message["role"] == "assistant", reversed(messages)))
    if not completion or len(completion) == len(messages):
        raise UserError(f"{where}: 'messages' must be a prompt and then an assistant message. Fix or remove the row.")
    return {"prompt": messages[: -len(completion)], "completion": messages[-len(completion) :]}


def pair_texts(rows: Iterable[dict[str, Any]]) -> Iterator[str]:
    """Yield every text of preference pairs, such as to train a tokenizer on."""
    for row in rows:
        for column in ("prompt", *SIDES):
            value = row.get(column)
            if isinstance(value, str):
                yield value
            elif value:
                yield from (message["content"] for message in value)
