"""Values of prompt and response columns: text, or a list of messages with a role and content."""

import json
import re
import reprlib
from collections.abc import Iterable, Iterator
from itertools import takewhile
from typing import Any, Literal

from prefdistill.core.errors import UserError
from prefdistill.data.columns import SIDES

Form = Literal["plain", "conversational"]
# Where the assistant's turn begins in text: the last such place in the shared start of two texts ends the prompt.
ASSISTANT_TURN = re.compile(
    r"(?im)^(?:assistant|ai|bot|model|gpt|response|answer|#{2,} ?(?:assistant|response|answer)):\n*"
    r"|<\|assistant\|>\n*|<\|im_start\|>assistant\n|<start_of_turn>model\n|\[/INST\]"
    r"|<\|start_header_id\|>assistant<\|end_header_id\|>\n*"
)
# Where the user's turn begins in text.
USER_TURN = re.compile(
    r"(?im)^(?:human|user|#{2,} ?(?:human|user|instruction)):"
    r"|<\|user\|>|<\|im_start\|>user\n|<start_of_turn>user\n|\[INST\]|<\|start_header_id\|>user<\|end_header_id\|>"
)
# Names of the speakers in ShareGPT's messages {"from": ..., "value": ...}.
SPEAKERS = {
    **dict.fromkeys(("human", "user"), "user"),
    **dict.fromkeys(("gpt", "assistant", "chatgpt", "bot", "model", "function_call"), "assistant"),
    **dict.fromkeys(("observation", "tool", "tool_response", "function_response"), "tool"),
    "system": "system",
}
SENTENCE_END = "\u3002\uff01\uff1f"  # of scripts that write no spaces


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
    return (
        isinstance(value, dict)
        and isinstance(value.get("role"), str)
        and (isinstance(value.get("content"), str) or (value.get("content") is None and bool(value.get("tool_calls"))))
    )


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
    """Return a value without the null keys that Arrow adds, at any depth, where rows differ in their keys."""
    if isinstance(value, dict):
        return {key: without_nulls(item) for key, item in value.items() if item is not None}
    return [without_nulls(item) for item in value] if isinstance(value, list) else value


def normal_messages(value: Any) -> Any:
    """Return messages in the form that is rendered and fingerprinted, the same for every file format; text as it is.

    No key is null, at any depth. The content of a message that only calls tools is the empty text.
    """
    if not isinstance(value, list):
        return value
    messages = without_nulls(value)
    return [
        {**m, "content": ""} if isinstance(m, dict) and m.get("tool_calls") and "content" not in m else m
        for m in messages
    ]


def as_messages(value: Any) -> Any:
    """Return a value as messages with role and content, in normal form, if it is anything like it; else as it is.

    One message stands for a list of it, ShareGPT's `from` and `value` for role and content, and parts of text for their
    text.
    """
    if isinstance(value, dict):
        value = [value]
    if not is_conversation(value):
        return value
    return normal_messages([_message(message) for message in value])


def _message(message: dict[str, Any]) -> dict[str, Any]:
    if message.get("role") is None and message.get("from") in SPEAKERS and "value" in message:
        others = {key: item for key, item in message.items() if key not in ("from", "value", "role", "content")}
        calls = _tool_calls(message["value"]) if message["from"] == "function_call" else []
        others |= {"tool_calls": calls} if calls else {}
        message = {"role": SPEAKERS[message["from"]], "content": "" if calls else message["value"], **others}
    content = message.get("content")
    if isinstance(content, list) and content and all(_is_text_part(part) for part in content):
        message = {**message, "content": "".join(part["text"] for part in content)}
    return message


def _tool_calls(value: Any) -> list[dict[str, Any]]:
    """Return the calls in ShareGPT's JSON text, `{"name": ..., "arguments": ...}` or a list; none of other text."""
    try:
        decoded: Any = json.loads(value) if isinstance(value, str) else None
    except ValueError:
        return []
    calls: list[Any] = decoded if isinstance(decoded, list) else [decoded]
    if not (is_conversation(calls) and all(isinstance(call.get("name"), str) for call in calls)):
        return []
    return [{"type": "function", "function": call} for call in calls]


def _is_text_part(part: Any) -> bool:
    return isinstance(part, dict) and part.get("type", "text") == "text" and isinstance(part.get("text"), str)


def is_conversation(value: Any) -> bool:
    """Return whether a value is a list of objects, such as messages."""
    return isinstance(value, list) and bool(value) and all(isinstance(message, dict) for message in value)


def split_shared_prompt(row: dict[str, Any], index: int, source: str) -> dict[str, Any]:
    """Return a pair whose `prompt` is the shared start of `chosen` and `rejected`.

    The prompt of two conversations ends before the assistant messages at the end of what they share. The prompt of two
    texts ends after the last turn marker that they share, such as "Assistant:", else at the last space before they
    differ; never inside a word, and never so that a response is empty.

    Raises:
        UserError: if there is no such start.
    """
    where = f"{source}, row {index}"
    chosen, rejected = (normal_messages(row.get(side)) for side in SIDES)
    forms = {form_of(value, f"{where}: '{side}'") for side, value in zip(SIDES, (chosen, rejected), strict=True)}
    if len(forms) == 2:
        raise UserError(f"{where}: one of 'chosen' and 'rejected' is text, the other a list of messages. Use one form.")
    end = _end_of_shared_text(chosen, rejected) if forms == {"plain"} else _end_of_shared_turns(chosen, rejected)
    if not end:
        how = ", up to the end of a turn or a word" if chosen and chosen[:1] == rejected[:1] else ""
        raise UserError(f"{where}: 'chosen' and 'rejected' do not start alike{how}. Add a `prompt` column.")
    return {"prompt": chosen[:end], "chosen": chosen[end:], "rejected": rejected[end:]}


def _end_of_shared_turns(chosen: list[Any], rejected: list[Any]) -> int:
    """Return how many messages the prompt has; 0 if there is no prompt that leaves both a response."""
    shared = sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], zip(chosen, rejected, strict=False)))
    end = min(shared, len(chosen) - 1, len(rejected) - 1)
    while end and chosen[end - 1]["role"] == "assistant":
        end -= 1
    return end


def _end_of_shared_text(chosen: str, rejected: str) -> int:
    """Return how many characters the prompt has; 0 if there is no boundary that leaves both a response."""
    shared = chosen[: sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], zip(chosen, rejected, strict=False)))]
    turns = [turn.end() for turn in ASSISTANT_TURN.finditer(shared) if turn.end() < min(len(chosen), len(rejected))]
    if turns:
        return turns[-1]
    if shared in (chosen, rejected):  # all of a response may be part of the other: nothing says where it begins
        return 0
    end = len(shared)
    if not (chosen[end].isspace() and rejected[end].isspace()):
        while end and not (shared[end - 1].isspace() or shared[end - 1] in SENTENCE_END):
            end -= 1
    end -= shared[:end].endswith(" ")  # the space before a response is part of it, as in TRL
    return end if shared[:end].strip() else 0


def split_last_turn(row: dict[str, Any], index: int, source: str) -> dict[str, Any]:
    """Return `messages` as `prompt` and `completion`, the assistant messages at the end.

    Raises:
        UserError: if there is no assistant message at the end, or nothing before it.
    """
    where, messages = f"{source}, row {index}", normal_messages(row["messages"])
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
                yield from (message["content"] or "" for message in value)
