"""Read the rows of a data set that are preference pairs, with a finding for each kind of row that is not."""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Collection, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import TYPE_CHECKING, Any

import numpy as np

from prefdistill.core.errors import UserError
from prefdistill.core.text import surrogate
from prefdistill.data.columns import MEANINGFUL, SIDES, unread_columns, unread_message
from prefdistill.data.load import load_messages, load_pairs
from prefdistill.data.messages import check_roles, form_of, split_shared_prompt
from prefdistill.data.prompts import prompt_of, prompt_text
from prefdistill.data.reader import RowReader
from prefdistill.data.shapes import LeftOut, pair_hint
from prefdistill.data.sources import read_rows
from prefdistill.experiment.doctor.characters import around
from prefdistill.experiment.doctor.findings import Finding, Severity, finding_for_rows

if TYPE_CHECKING:
    import numpy as np
    from datasets import Dataset

FORMS = ("conversational", "plain")
COLUMNS = ("prompt", *SIDES)
# Why a row is not a preference pair, and how to fix it, by check.
NOT_A_PAIR = {
    "data.json": ("not a JSON object", "Fix or remove these lines."),
    "data.prompt": ("there is no prompt, and the responses do not start alike", "Give every row a `prompt`."),
    "data.values": (
        "a prompt or response is neither text nor messages",
        "Give every row a prompt and both responses, as text or as messages with a text role and content.",
    ),
    "data.surrogate": (
        "a text has half a surrogate pair, which UTF-8 cannot encode",
        "Write the data again from the source: an emoji or rare character was cut in two.",
    ),
    "data.roles": (
        "a message has the wrong role for its place",
        "The prompt ends with the turn to answer; a response holds assistant messages alone.",
    ),
    "data.mixed": (
        "plain text and messages are mixed",
        "Use one form in all rows and columns. The other checks use the rows of the more frequent form only.",
    ),
}


@dataclass(frozen=True)
class Tokens:
    """A pair before truncation: the tokens of the prompt and of each response, or why training would drop it."""

    dropped: str
    ids: dict[str, np.ndarray]  # int32, by column
    ended: dict[str, bool]
    changed: tuple[str, str]  # a message that the template changes: how, and its start


@dataclass
class Pair:
    """A row that is a preference pair, with its number in the data."""

    row: int
    columns: dict[str, Any]
    tokens: Tokens | None = None  # if there is a tokenizer that can encode the data
    texts: dict[str, str] = field(init=False)  # the content of each column, without roles

    def __post_init__(self) -> None:
        self.texts = {name: content_text(self.columns[name]) for name in COLUMNS}

    @property
    def messages(self) -> list[dict[str, Any]]:
        """The messages of the prompt and both responses; none if the data are plain text."""
        return [m for name in COLUMNS for m in (self.columns[name] if isinstance(self.columns[name], list) else ())]

    def key(self, name: str) -> str:
        """Return a column's roles and texts as one text, to compare values by."""
        return prompt_text(prompt_of(self.columns) if name == "prompt" else self.columns[name])


@dataclass
class PairSet:
    """The readable pairs of a data set."""

    name: str  # train or test
    source: str
    pairs: list[Pair]
    rows: int  # in the data, the unreadable ones included
    options: dict[str, Any] = field(default_factory=dict)  # of `Columns`

    def finding(
        self, check: str, severity: Severity, hits: Iterable[tuple[int, str]], message: str, fix: str
    ) -> Iterator[Finding]:
        """Yield one finding for all the rows that a check hits, or none, see `finding_for_rows`."""
        return finding_for_rows(check, severity, (self.name, self.rows), hits, message, fix)

    @cached_property
    def dataset(self) -> Dataset:
        """The pairs as a run loads them.

        Raises:
            UserError: if the loader refuses them.
        """
        return load_pairs(self.source, **self.options).select(range(len(self.pairs)))

    def unread(self) -> PairSet:
        """Return the same pairs without tokens, for another tokenizer."""
        return replace(self, pairs=[Pair(pair.row, pair.columns) for pair in self.pairs])

    @property
    def conversational(self) -> bool:
        return bool(self.pairs) and isinstance(self.pairs[0].columns["prompt"], list)


def content_text(value: str | list[dict[str, Any]]) -> str:
    """Return the text of a value, or the contents of its messages, one per line."""
    return value if isinstance(value, str) else "\n".join(message["content"] or "" for message in value)


def read_pairs(
    source: str,
    name: str,
    limit: int | None = None,
    options: dict[str, Any] | None = None,
    reads: Collection[str] = (),
) -> tuple[PairSet, list[Finding]]:
    """Return the pairs of a source, and findings about its other rows. Rows count from 0, unreadable ones included.

    Args:
        source: as for `load_pairs`.
        name: train or test.
        limit: read the first rows only.
        options: of `Columns`.
        reads: other columns that the recipe's methods read.
    """
    options = options or {}
    try:
        rows = list(read_rows(source))[:limit]
    except UserError as error:
        unreadable = Finding("data.file", "error", str(error), "Give data that can be read.", data=name)
        return PairSet(name, source, [], 0), [unreadable]
    columns = {key for row in rows if isinstance(row, dict) for key in row}
    reader, shape_findings = None, []
    if objects := [row for row in rows if isinstance(row, dict)]:
        try:
            reader = RowReader.of(
                objects,
                columns,
                source,
                names=options.get("columns"),
                has_system=any(row.get("system") for row in objects),
                variables=options.get("chat_template_kwargs"),
            )
            columns = reader.columns
            unread = unread_columns(sorted(columns - reader.drops - set(reads)))
            shape_findings = [
                Finding("data.shape", "note", note, "Nothing to do, if that is meant.", data=name)
                for note in reader.notes
            ]
        except UserError as error:
            return PairSet(name, source, [], len(rows)), [
                Finding("data.columns", "error", str(error), "Change the names or the data.", data=name)
            ]
        if unread:
            lost = unread[0] in MEANINGFUL
            shape_findings.append(
                Finding(
                    "data.unread",
                    "warning" if lost else "note",
                    unread_message(unread),
                    "Write what they say into the messages, name a weight or a margin in the method's options "
                    "(weight=COLUMN, margin=COLUMN), or drop them."
                    if lost
                    else "Nothing to do.",
                    data=name,
                )
            )
    required = COLUMNS if "prompt" in columns else SIDES
    missing = [column for column in required if column not in columns]
    hits: dict[str, list[tuple[int, str]]] = defaultdict(list)
    left_out: list[tuple[int, str]] = []
    pairs: list[Pair] = []
    if not rows:
        empty = Finding("data.empty-file", "error", f"{source} has no rows", "Give at least one pair.", data=name)
        return PairSet(name, source, [], 0), [empty]
    for number, row in enumerate(rows):
        if isinstance(row, UserError):
            hits["data.json"].append((number, str(row).removeprefix(f"{source}, ")))
        elif not missing and reader:
            try:
                with _failing("data.values"):
                    row = reader.read(row, number)
                pairs.append(_pair(number, row, "prompt" in columns))
            except _NotAPair as problem:
                hits[problem.check].append((number, str(problem)))
            except LeftOut as reason:
                left_out.append((number, str(reason)))
    pairs, others = _more_frequent_form(pairs)
    hits["data.mixed"] = sorted(hits["data.mixed"] + others)
    findings = [
        finding
        for check, (message, fix) in NOT_A_PAIR.items()
        for finding in finding_for_rows(check, "error", (name, len(rows)), hits[check], message, fix)
    ]
    findings += finding_for_rows(
        "data.left-out", "note", (name, len(rows)), left_out, "the row holds no pair and is left out", "Nothing to do."
    )
    if missing and objects:
        lacking, present = ", ".join(missing), ", ".join(sorted(columns)) or "none"
        findings.append(
            Finding(
                "data.columns",
                "error",
                f"{source} has no column {lacking}; it has {present}",
                pair_hint(columns),
                data=name,
            )
        )
    return PairSet(name, source, pairs, len(rows), options), shape_findings + findings


def loader_refusal(data: PairSet) -> Iterator[Finding]:
    """Yield what the loader refuses in data without other errors, such as a value in another column."""
    try:
        _ = data.dataset
    except UserError as error:
        yield Finding("data.refused", "error", str(error), "Fix or drop that column.", data=data.name)


def check_demonstrations(source: str, options: dict[str, Any]) -> Iterator[Finding]:
    """Yield what the loader refuses in demonstrations; it names their unread columns on stderr."""
    try:
        load_messages(source, **options)
    except UserError as error:
        yield Finding("data.refused", "error", str(error), "Give demonstrations that can be read.", data="sft")


class _NotAPair(Exception):
    def __init__(self, check: str, why: object) -> None:
        super().__init__(str(why).removeprefix("here: "))
        self.check = check


@contextmanager
def _failing(check: str) -> Iterator[None]:
    """Attribute a UserError to a check."""
    try:
        yield
    except UserError as error:
        raise _NotAPair(check, error) from error


def _pair(number: int, row: dict[str, Any], has_prompt: bool) -> Pair:
    with _failing("data.values"):
        forms = {form_of(row.get(name), f"'{name}'") for name in (COLUMNS if has_prompt else SIDES)}
    if len(forms) > 1:
        raise _NotAPair("data.mixed", "its columns mix text and messages")
    if not has_prompt:
        with _failing("data.prompt"):
            row = {**row, **split_shared_prompt(row, number, "here")}
    with _failing("data.roles"):
        for name in COLUMNS if forms == {"conversational"} else ():
            check_roles(row[name], name, "here")
    pair = Pair(number, row)
    for name, text in pair.texts.items():
        if (place := surrogate(text)) is not None:
            raise _NotAPair("data.surrogate", f"{name}: {around(text, place)}")
    whole = json.dumps(row, ensure_ascii=False, default=str)  # roles, names and other columns too
    if (place := surrogate(whole)) is not None:
        raise _NotAPair("data.surrogate", around(whole, place))
    return pair


def _more_frequent_form(pairs: list[Pair]) -> tuple[list[Pair], list[tuple[int, str]]]:
    """Return the pairs of the more frequent form, and hits for the others."""
    forms = {form: [pair for pair in pairs if form_of(pair.columns["prompt"], "") == form] for form in FORMS}
    most = max(FORMS, key=lambda form: len(forms[form]))
    others = [pair for form in FORMS if form != most for pair in forms[form]]
    return forms[most], [(pair.row, f"{content_text(pair.columns['prompt'])}") for pair in others]
