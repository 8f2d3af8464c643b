"""The rows of a data set as far as they can be read, and a finding for each kind of row that cannot."""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from prefdistill.core.errors import UserError
from prefdistill.core.text import surrogate
from prefdistill.data.columns import SIDES
from prefdistill.data.load import load_pairs
from prefdistill.data.messages import check_roles, form_of, prompt_text, split_shared_prompt
from prefdistill.data.sources import read_rows
from prefdistill.experiment.doctor.findings import Finding, found
from prefdistill.experiment.doctor.text import around

if TYPE_CHECKING:
    from prefdistill.experiment.doctor.tokens import Tokens

FORMS = ("conversational", "plain")
COLUMNS = ("prompt", *SIDES)
# What keeps a row from being a pair, by check, and what to do about it.
NO_PAIR = {
    "data.json": ("not a JSON object", "Fix or remove these lines."),
    "data.prompt": ("there is no prompt, and the responses do not start alike", "Give every row a `prompt`."),
    "data.values": (
        "a prompt or response is neither text nor messages",
        "Give every row a prompt and both responses, as text or as messages with a text role and content.",
    ),
    "data.surrogate": (
        "a text has half a surrogate pair, which no file in UTF-8 can hold",
        "Write the data again from the source: an emoji or rare character was cut in two.",
    ),
    "data.roles": (
        "a message has the wrong role for its place",
        "The prompt ends with the turn to answer; a response holds assistant messages alone.",
    ),
    "data.mixed": (
        "plain text and messages are mixed",
        "Use one form in all rows and columns. The other checks see the rows of the commoner form only.",
    ),
}


@dataclass
class Pair:
    """A row that is a preference pair, under its number in the data."""

    row: int
    columns: dict[str, Any]
    tokens: Tokens | None = None  # where there is a tokenizer, and it can tell prompt and response apart
    texts: dict[str, str] = field(init=False)  # what is said in each column, roles left out

    def __post_init__(self) -> None:
        self.texts = {name: said(self.columns[name]) for name in COLUMNS}

    @property
    def messages(self) -> list[dict[str, Any]]:
        """Of the prompt and both responses; none where the data are plain text."""
        return [m for name in COLUMNS for m in (self.columns[name] if isinstance(self.columns[name], list) else ())]

    def key(self, name: str) -> str:
        """What makes two values of a column the same: roles and texts."""
        return prompt_text(self.columns[name])


@dataclass
class PairSet:
    name: str  # train or test
    source: str
    pairs: list[Pair]
    rows: int  # in the data, the unreadable ones included

    @property
    def where(self) -> tuple[str, int]:
        return self.name, self.rows

    @property
    def conversational(self) -> bool:
        return bool(self.pairs) and isinstance(self.pairs[0].columns["prompt"], list)


def said(value: str | list[dict[str, Any]]) -> str:
    return value if isinstance(value, str) else "\n".join(message["content"] for message in value)


def read_pairs(source: str, name: str, limit: int | None = None) -> tuple[PairSet, list[Finding]]:
    """The pairs of a source, and what keeps other rows of it from being pairs. Rows are counted from 0, broken or not.

    Args:
        source: as for `load_pairs`.
        name: train or test.
        limit: the first rows only.
    """
    try:
        rows = list(read_rows(source))[:limit]
    except UserError as error:
        unread = Finding("data.file", "error", str(error), "Give data that can be read.", data=name)
        return PairSet(name, source, [], 0), [unread]
    there = {key for row in rows if isinstance(row, dict) for key in row}
    wanted = COLUMNS if "prompt" in there else SIDES
    missing = [column for column in wanted if column not in there]
    hits: dict[str, list[tuple[int, str]]] = defaultdict(list)
    pairs: list[Pair] = []
    if not rows:
        empty = Finding("data.empty-file", "error", f"{source} has no rows", "Give at least one pair.", data=name)
        return PairSet(name, source, [], 0), [empty]
    for number, row in enumerate(rows):
        if isinstance(row, UserError):
            hits["data.json"].append((number, str(row).removeprefix(f"{source}, ")))
        elif not missing:
            try:
                pairs.append(_pair(number, row, "prompt" in there))
            except _NoPair as problem:
                hits[problem.check].append((number, str(problem)))
    pairs, others = _of_one_form(pairs)
    hits["data.mixed"] = sorted(hits["data.mixed"] + others)
    findings = [
        finding
        for check, (message, fix) in NO_PAIR.items()
        for finding in found(check, "error", (name, len(rows)), hits[check], message, fix)
    ]
    if missing and any(isinstance(row, dict) for row in rows):
        columns, have = ", ".join(missing), ", ".join(sorted(there)) or "none"
        findings.append(
            Finding(
                "data.columns",
                "error",
                f"{source} has no column {columns}; it has {have}",
                "A pair has `prompt`, `chosen`, `rejected`; the prompt may be the start of both others.",
                data=name,
            )
        )
    return PairSet(name, source, pairs, len(rows)), findings


def refused(data: PairSet) -> Iterator[Finding]:
    """What the loader still has against data in which no check sees an error: the other columns are read too."""
    try:
        load_pairs(data.source)
    except UserError as error:
        yield Finding("data.refused", "error", str(error), "Repair that column or leave it out.", data=data.name)


class _NoPair(Exception):
    def __init__(self, check: str, why: object) -> None:
        super().__init__(str(why).removeprefix("here: "))
        self.check = check


@contextmanager
def _as(check: str) -> Iterator[None]:
    try:
        yield
    except UserError as error:
        raise _NoPair(check, error) from error


def _pair(number: int, row: dict[str, Any], has_prompt: bool) -> Pair:
    with _as("data.values"):
        forms = {form_of(row.get(name), f"'{name}'") for name in (COLUMNS if has_prompt else SIDES)}
    if len(forms) > 1:
        raise _NoPair("data.mixed", "its columns are of both forms")
    if not has_prompt:
        with _as("data.prompt"):
            row = {**row, **split_shared_prompt(row, number, "here")}
    with _as("data.roles"):
        for name in COLUMNS if forms == {"conversational"} else ():
            check_roles(row[name], name, "here")
    pair = Pair(number, row)
    for name, text in pair.texts.items():
        if (place := surrogate(text)) is not None:
            raise _NoPair("data.surrogate", f"{name}: {around(text, place)}")
    whole = json.dumps(row, ensure_ascii=False, default=str)  # roles, names and other columns too
    if (place := surrogate(whole)) is not None:
        raise _NoPair("data.surrogate", around(whole, place))
    return pair


def _of_one_form(pairs: list[Pair]) -> tuple[list[Pair], list[tuple[int, str]]]:
    """The pairs of the commoner form, and those of the other."""
    forms = {form: [pair for pair in pairs if form_of(pair.columns["prompt"], "") == form] for form in FORMS}
    most = max(FORMS, key=lambda form: len(forms[form]))
    others = [pair for form in FORMS if form != most for pair in forms[form]]
    return forms[most], [(pair.row, f"{said(pair.columns['prompt'])}") for pair in others]
