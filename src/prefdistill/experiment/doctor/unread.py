"""Checks of what the chat template does not read: keys of messages, tools, documents, and its own variables."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterator
from typing import Any

from prefdistill.data.columns import SIDES
from prefdistill.data.encoder import Encoder
from prefdistill.data.prompts import Conversation, inputs_of, prompt_of
from prefdistill.experiment.doctor.findings import Finding
from prefdistill.experiment.doctor.pairs import Pair, PairSet
from prefdistill.experiment.doctor.tokens import Encoding, encoded

PROBES = 20  # rows with a key or an input that are rendered without it
SPOKEN = {"thinking", "reasoning_content", "reasoning", "tool_calls"}  # keys that hold what a model says


def unread_keys(data: PairSet, encoding: Encoding) -> Iterator[Finding]:
    """Report keys of messages without which the template writes the same text."""
    rows = _rows_by_name(data, lambda pair: {key for message in pair.messages for key in message})
    unread = [key for key in sorted(rows.keys() - {"role", "content"}) if not _changes(encoding, rows[key], key)]
    for spoken in (True, False):
        keys = [key for key in unread if (key in SPOKEN) == spoken]
        hits = {pair.row: ", ".join(keys) for key in keys for pair in rows[key]}
        yield from data.finding(
            "template.unread-keys",
            "warning" if spoken else "note",
            sorted(hits.items()),
            f"keys of messages that never change the rendered text: {', '.join(keys)}",
            "Use a template that writes them, or write what they say into the content."
            if spoken
            else "Nothing to do, if that is meant.",
        )


def unread_inputs(data: PairSet, encoding: Encoding) -> Iterator[Finding]:
    """Report tools and documents that change no text, and variables that the template does not mention."""
    rows = _rows_by_name(data, lambda pair: {*inputs_of(prompt_of(pair.columns))})
    for name, pairs in rows.items():
        hits = [(pair.row, pair.texts["prompt"]) for pair in pairs]
        if name in ("tools", "documents"):
            if not _changes(encoding, pairs, name):
                yield from data.finding(
                    "template.unread-input",
                    "warning",
                    hits,
                    f"the column `{name}` never changes the rendered text: the chat template does not read it",
                    f"Use a template that does, or leave it out: --columns {name}=null (data.columns in a recipe).",
                )
        elif not re.search(rf"\b{re.escape(name)}\b", str(encoding.tokenizer.chat_template)):
            yield from data.finding(
                "template.unread-variable",
                "warning",
                hits,
                f"chat_template_kwargs sets {name!r}, which the chat template does not mention",
                "Correct the name, or leave it out.",
            )


def _rows_by_name(data: PairSet, names_of: Any) -> dict[str, list[Pair]]:
    """Return the pairs that training would not drop by each name that they have."""
    rows: dict[str, list[Pair]] = defaultdict(list)
    for pair, _ in encoded(data) if data.conversational else ():
        for name in names_of(pair):
            rows[name].append(pair)
    return rows


def _changes(encoding: Encoding, pairs: list[Pair], name: str) -> bool:
    """Return whether any of the first pairs is rendered differently without a key of messages, or an input."""
    encoder = Encoder(encoding.tokenizer)
    for pair in pairs[:PROBES]:
        prompt, *sides = values = [prompt_of(pair.columns), *(pair.columns[side] for side in SIDES)]
        inputs = {key: value for key, value in inputs_of(prompt).items() if key != name}
        bare, *bare_sides = ([{k: v for k, v in m.items() if k != name} for m in value] for value in values)
        if encoder.texts(prompt, *sides) != encoder.texts(Conversation(bare, inputs), *bare_sides):
            return True
    return False


UNREAD_CHECKS = (unread_keys, unread_inputs)
