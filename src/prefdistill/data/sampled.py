"""Responses in the tokens that a model has sampled.

The text of a response need not have the tokens that it was sampled in: other tokens may have the same text, and a chat
template may write a response otherwise than it was generated. So `sample` writes the ids into `NAME_ids`, and into
`NAME_check` what they belong to: the prompt's text, the tokens that the ids stand for, and the response's text. The ids
are used with that very prompt and text, and any tokenizer that has these tokens at these ids. Else the response is
rendered. Where the tokenizer reads the ids as that text, the chat template must leave the text and its tokens as they
are; a text of another tokenizer need only stand in what is rendered, see `data.spans`. Other rows are dropped.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

from prefdistill.data.columns import check_column, ended_column, ids_column
from prefdistill.data.prompts import prompt_of
from prefdistill.data.spans import NO_TEXT, locate
from prefdistill.data.truncation import TEMPLATE_FAILED, TEXT_CHANGED

if TYPE_CHECKING:
    from prefdistill.data.encoder import Encoder


class RowTexts(NamedTuple):
    """The texts of a row.

    Args:
        texts: of the prompt, and of the prompt with each response up to its end; None if the template refuses.
        sampled: for each response its ids if they are used as they were sampled, else None.
        expected: for each response the ids that its text must be tokenized to, or None.
        refused: why the row is dropped; "" if it is not.
    """

    texts: tuple[str, ...] | None
    sampled: tuple[list[int] | None, ...]
    expected: tuple[list[int] | None, ...]
    refused: str = ""


def row_texts(encoder: Encoder, row: dict[str, Any], responses: Sequence[str]) -> RowTexts:
    """Return the texts that become tokens; that of sampled ids is what they are decoded to."""
    prompt = prompt_of(row)
    recorded = [_recorded(row, name) for name in responses]
    start = encoder.texts(prompt) if any(recorded) else None
    sampled = tuple(
        one.ids if one and start and encoder.check(start[0], one.ids, one.text) == one.check else None
        for one in recorded
    )
    expected = tuple(
        one.ids if one and ids is None and encoder.decode(one.ids, special=False) == one.text else None
        for one, ids in zip(recorded, sampled, strict=True)
    )
    to_render = [name for name, ids in zip(responses, sampled, strict=True) if ids is None]
    cut = [row.get(ended_column(name)) is False for name in to_render]
    texts = encoder.ended_texts(prompt, *(row[name] for name in to_render), cut=cut)
    if texts is None:
        return RowTexts(None, sampled, expected, TEMPLATE_FAILED)
    prompt_text, *others = texts
    rendered = iter(others)
    full = [next(rendered) if ids is None else prompt_text + encoder.decode(ids) for ids in sampled]
    plain = isinstance(prompt, str)
    end, ends = encoder.eos if plain else encoder.ending.before, encoder.ends_of_text(plain=plain)

    def is_changed(one: _Recorded, tokens: list[int] | None, rendered: str) -> bool:
        if tokens is not None:
            return rendered != one.text + (end if one.ended else "")
        return locate(one.text, rendered, ends)[1] == NO_TEXT

    changed = any(
        one and ids is None and text.startswith(prompt_text) and is_changed(one, tokens, text[len(prompt_text) :])
        for one, ids, tokens, text in zip(recorded, sampled, expected, full, strict=True)
    )
    return RowTexts((prompt_text, *full), sampled, expected, TEXT_CHANGED if changed else "")


class _Recorded(NamedTuple):
    """What a row has of a sampled response."""

    ids: list[int]
    check: int
    text: str
    ended: bool


def _recorded(row: dict[str, Any], name: str) -> _Recorded | None:
    ids, check, response = row.get(ids_column(name)), row.get(check_column(name)), row[name]
    if not ids or check is None:
        return None
    text = response if isinstance(response, str) else response[-1]["content"]
    return _Recorded(ids, check, text, row.get(ended_column(name)) is not False)
