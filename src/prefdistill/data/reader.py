"""Read the rows of a source as prompt, chosen and rejected, whatever its columns are named and hold.

    reader = RowReader.of(rows, columns, "pairs.jsonl")
    reader.read(row, index)["prompt"]

docs/data.md has the table of shapes.
"""

from __future__ import annotations

import difflib
from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import Any, Self

from prefdistill.core.errors import UserError
from prefdistill.data.columns import SCORES, SIDES, TEMPLATE_COLUMNS
from prefdistill.data.messages import as_messages, is_conversation, split_shared_prompt
from prefdistill.data.prompts import VARIABLES, template_inputs
from prefdistill.data.shapes import PAIR, SHAPES, LeftOut, Row, Shape, shape_of

VALUES = (*PAIR, "completion", "messages")


class RowReader:
    """Reads the rows of one source. What their values mean is decided by the first row; `notes` says what is done.

    Args:
        columns: of the source.
        first: the first row.
        source: its name, for messages.
        names: own names of columns, such as `{"chosen": "response_j"}`; null leaves a column out.
        responses: columns that hold responses.
        variables: of the chat template, for rows that do not set them: `data.chat_template_kwargs` of a recipe.
        has_system: whether any row has a system message in the column `system`.

    Raises:
        UserError: if a column of `names` is not there.
    """

    def __init__(
        self,
        columns: Collection[str],
        first: Row,
        source: str,
        names: Mapping[str, str | None] | None = None,
        responses: Sequence[str] = SIDES,
        has_system: bool = False,
        variables: Mapping[str, Any] | None = None,
    ) -> None:
        self.variables = template_inputs({VARIABLES: dict(variables or {})})
        self.source, self.names, self.notes = source, dict(names or {}), list[str]()
        self.responses = tuple(dict.fromkeys((*SIDES, "completion", *responses)))
        if unknown := [own for own in self.names.values() if own is not None and own not in columns]:
            have = ", ".join(f"'{name}'" for name in columns)
            raise UserError(f"{source}: data.columns names '{unknown[0]}', but the columns are {have}.")
        known = {*VALUES, "system", *self.responses, *SCORES, *TEMPLATE_COLUMNS, *(n for s in SHAPES for n in s.needs)}
        for name in (name for name, own in self.names.items() if own is not None and name not in known):
            if close := difflib.get_close_matches(name, sorted(known), n=1, cutoff=0.75):
                raise UserError(
                    f"{source}: data.columns sets '{name}', which nothing reads; did you mean '{close[0]}'?"
                )
        first = self._with_names(first)
        self.columns = {*self._with_names(dict.fromkeys(columns))}
        self.shape: Shape | None = shape_of(self.columns, first)
        if self.shape:
            used = ", ".join(f"`{name}`" for name in self.shape.needs)
            self.notes.append(f"read as {self.shape.name}: the pair is taken from {used}")
            self.columns |= {*self.shape.gives}
        values = {**self._values(self._shaped(first, 0), 0)}
        has_prompt = bool({"prompt", "messages"} & self.columns)
        self.starts = ("prompt", "messages") if has_prompt else SIDES  # what may start with a system message
        self.system = has_system and "system" in self.columns and (has_prompt or is_conversation(values.get("chosen")))
        if self.system:
            self.notes.append("the column `system` becomes the first message of the prompt")
        elif has_system and "system" in self.columns:
            self.notes.append("the column `system` is not read: two texts without a `prompt` have no place for it")
        prompt, side = values.get("prompt"), next((values[n] for n in self.responses if values.get(n)), None)
        roles = {message.get("role") for message in side} if isinstance(side, list) and is_conversation(side) else set()
        self.whole = "prompt" in values and bool(roles - {"assistant"}) and {*SIDES} <= self.columns
        self.wraps = self.system or (isinstance(prompt, str) != isinstance(side, str) and side is not None)
        if self.whole:
            self.notes.append("the responses are whole conversations: `prompt` is what they share")
        elif self.wraps and not self.system and prompt is not None:
            self.notes.append("text beside messages becomes a message")

    @classmethod
    def of(cls, rows: Iterable[Row], columns: Collection[str], source: str, **options: Any) -> Self:
        """Return a reader by the first of the rows that holds a pair; arguments and errors are those of the class."""
        reason: object = "there are no rows in it"
        for first in rows:
            try:
                return cls(columns, first, source, **options)
            except LeftOut as left_out:
                reason = left_out
        raise UserError(f"{source}: no row holds a preference pair: {reason}.")

    @property
    def drops(self) -> set[str]:
        """The columns that were read into others, or that `names` leaves out."""
        of_shape = {*self.shape.needs} - {*PAIR} if self.shape else set()
        return of_shape | {own for own in self.names.values() if own} | {n for n, own in self.names.items() if not own}

    @property
    def changes(self) -> bool:
        """Whether `read` does more than bring messages into normal form."""
        return bool(self.names or self.notes)

    def read(self, row: Row, index: int) -> Row:
        """Return a row with the columns of a pair, or of a demonstration, where it has them, in normal form.

        Raises:
            LeftOut: if the row holds no pair, though it is of the shape.
            UserError: about the row.
        """
        row = self._values(self._shaped(self._with_names(row), index), index)
        where = f"{self.source}, row {index}"
        if self.whole:
            row = self._split_whole(row, index, where)
        elif self.wraps and "prompt" in row:
            if isinstance(row["prompt"], str):
                row["prompt"] = [{"role": "user", "content": row["prompt"]}]
            for name in self.responses:
                if isinstance(row.get(name), str):
                    row[name] = [{"role": "assistant", "content": row[name]}]
        if self.system:
            for name in self.starts:
                if is_conversation(row.get(name)):
                    row[name] = _with_system(row[name], row.get("system"), where)
        return row | self._inputs(row, where)

    def _inputs(self, row: Row, where: str) -> Row:
        """Return the columns for the chat template, in normal form."""
        if not self.variables and self.columns.isdisjoint(TEMPLATE_COLUMNS):
            return {}
        try:
            own = template_inputs(row)
        except UserError as error:
            raise UserError(f"{where}: {error}. Fix it, or leave the column out with data.columns.") from error
        inputs = {**self.variables, **own}
        texts = [name for name in (*VALUES, *self.responses) if isinstance(row.get(name), str)]
        if inputs and texts:
            column = next(name for name in TEMPLATE_COLUMNS if row.get(name)) if own else f"data.{VARIABLES}"
            fix = f"data.columns: {{{column}: null}}" if own else f"no data.{VARIABLES}"
            raise UserError(
                f"{where}: '{column}' is for a chat template, and '{texts[0]}' is text, which goes through none. Write "
                f"messages, or leave it out: {fix}."
            )
        tools, documents = inputs.pop("tools", None), inputs.pop("documents", None)
        return {"tools": tools, "documents": documents, VARIABLES: inputs or None}

    def _with_names(self, row: Row) -> Row:
        taken = {*self.names, *(own for own in self.names.values() if own)}
        own = {name: row.get(column) for name, column in self.names.items() if column}
        return {name: value for name, value in row.items() if name not in taken} | own

    def _shaped(self, row: Row, index: int) -> Row:
        if not self.shape:
            return row
        try:
            return row | self.shape.read({name: row.get(name) for name in self.shape.needs})
        except UserError as error:
            raise UserError(f"{self.source}, row {index}: {error}.") from error

    def _values(self, row: Row, index: int) -> Row:
        names = dict.fromkeys((*VALUES, *self.responses))
        return row | {name: as_messages(row[name]) for name in names if name in row}

    def _split_whole(self, row: Row, index: int, where: str) -> Row:
        prompt = row.get("prompt")
        if isinstance(prompt, list):
            size = len(prompt)
            sides: dict[str, Any] = {name: row.get(name) for name in SIDES}
            if all(isinstance(v, list) and v[:size] == prompt and len(v) > size for v in sides.values()):
                return row | {name: value[size:] for name, value in sides.items()}
            return row
        split = row | split_shared_prompt(row, index, self.source)
        contents = [m.get("content") for m in split["prompt"]]
        if prompt and not any(isinstance(c, str) and str(prompt).strip() in c for c in contents):
            raise UserError(
                f"{where}: 'prompt' is not in the conversations of 'chosen' and 'rejected'. Leave it out with "
                "data.columns: {prompt: null}, or put it into their first message."
            )
        return split


def _with_system(messages: list[Row], system: Any, where: str) -> list[Row]:
    if system is None or system == "":
        return messages
    if not isinstance(system, str):
        raise UserError(
            f"{where}: 'system' must be text, not {system!r}. Leave it out: data.columns: {{system: null}}."
        )
    first = messages[0]
    if first.get("role") in ("system", "developer"):
        if first.get("content") == system:
            return messages
        raise UserError(
            f"{where}: the prompt has a system message already, and 'system' another. Leave the column out: "
            "data.columns: {system: null}."
        )
    return [{"role": "system", "content": system}, *messages]
