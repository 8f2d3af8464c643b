"""Load preference pairs, demonstrations and prompts, and check them. `encode.py` turns pairs into tokens.

    dataset = load_pairs("pairs.jsonl")                                      # or a directory, or org/name#split

Rows are counted from 0, here and in every message.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from prefdistill.core.errors import UserError
from prefdistill.core.progress import say_once
from prefdistill.data.columns import (
    SCORES,
    SIDES,
    TEMPLATE_COLUMNS,
    check_column,
    ended_column,
    ids_column,
    sample_columns,
    unread_columns,
    unread_message,
    with_response,
)
from prefdistill.data.messages import USER_TURN, check_roles, form_of, split_last_turn, split_shared_prompt
from prefdistill.data.prompts import prompt_columns
from prefdistill.data.reader import VALUES, RowReader
from prefdistill.data.shapes import LeftOut, pair_hint
from prefdistill.data.sources import NO_CACHE, read_source
from prefdistill.data.truncation import Dropped

if TYPE_CHECKING:
    from datasets import Dataset

Names = Mapping[str, str | None]

# ---- Loading ----------------------------------------


def load_pairs(
    source: str,
    *,
    split: str = "train",
    responses: Sequence[str] = SIDES,
    columns: Names | None = None,
    chat_template_kwargs: Mapping[str, Any] | None = None,
    reads: Sequence[str] = (),
) -> Dataset:
    """Return preference pairs with the columns `prompt`, `chosen`, `rejected` and whatever else the source has.

    The three are all text, or all lists of messages. Without a `prompt` column, the shared start of `chosen` and
    `rejected` becomes the prompt.

    Args:
        source: a file of a known format (`data.formats`: .jsonl, .jsonl.gz, .parquet); a directory that holds such
            files or that `save_to_disk` wrote; or a Hub name. `org/name#test` and `directory#test` name a split.
        split: the split to read if `source` has several and names none.
        responses: the responses a row must have; a sampled one, such as `student_response`, is a response too.
        columns: the source's names of columns, such as `{"chosen": "response_j"}`; null leaves a column out.
        chat_template_kwargs: variables of the chat template, for rows that do not set them themselves.
        reads: other columns that the caller reads, not to be named as unread.

    Raises:
        UserError: if the source cannot be read, or a row is not a preference pair.
    """
    dataset = _read(source, split, responses, columns, chat_template_kwargs)
    if "prompt" not in dataset.column_names:
        _require_columns(dataset, source, SIDES)
        dataset = _with_shared_prompt(dataset, source)
    check_pairs(dataset, source, responses)
    say_unread(source, unread_columns([name for name in dataset.column_names if name not in reads], responses))
    return dataset


def load_messages(
    source: str,
    *,
    split: str = "train",
    columns: Names | None = None,
    chat_template_kwargs: Mapping[str, Any] | None = None,
) -> Dataset:
    """Return examples for supervised fine-tuning: `prompt`, `completion`, and what else is read of them.

    That is what the chat template reads, and the columns of a sampled completion. Examples come from `messages` (the
    completion is the last assistant turn), or `prompt` and `completion`, or the chosen side of preference pairs.
    Arguments and errors are those of `load_pairs`.
    """
    dataset = _read(source, split, columns=columns, variables=chat_template_kwargs)
    names = dataset.column_names
    unread = unread_columns(names)
    if "messages" in names or "completion" in names:
        read = {"messages"} if "messages" in names else {"prompt", "completion", *sample_columns("completion")}
        unread = [name for name in names if name not in read | {"system", *TEMPLATE_COLUMNS}]
    if "messages" in names:
        dataset = _with_last_turn(
            dataset.select_columns([name for name in ("messages", *TEMPLATE_COLUMNS) if name in names]), source
        )
    elif "completion" not in names and "chosen" in names:
        if "prompt" not in names and "rejected" in names:
            dataset = _with_shared_prompt(dataset, source)
        dataset = with_response(dataset, "chosen", "completion")
    hint = "SFT data has `messages`, or `prompt` and `completion`."
    _require_columns(dataset, source, ("prompt", "completion"), hint)
    _check_rows(dataset, source, ("prompt", "completion"))
    say_unread(source, unread)
    return demonstrations_of(dataset, "completion")


def load_prompts(
    source: str | Dataset,
    *,
    split: str = "train",
    columns: Names | None = None,
    chat_template_kwargs: Mapping[str, Any] | None = None,
) -> Dataset:
    """Return prompts to respond to, with the column `prompt` and whatever else the source has.

    Without a `prompt` column, the shared start of `chosen` and `rejected` becomes the prompt, or `messages` is split
    into `prompt` and `completion`, its last assistant turn. Arguments and errors are those of `load_pairs`; a data set
    in memory is used as it is.
    """
    if isinstance(source, str):
        dataset, name = _read(source, split, columns=columns, variables=chat_template_kwargs), source
    else:
        dataset, name = source, "The data set"
    names = dataset.column_names
    if "prompt" not in names and {*SIDES} <= {*names}:
        dataset = _with_shared_prompt(dataset, name)
    elif "prompt" not in names and "messages" in names:
        dataset = _with_last_turn(dataset, name)
    hint = "Prompts are `prompt`, or the start of `messages` or of preference pairs."
    _require_columns(dataset, name, ("prompt",), hint)
    _check_rows(dataset, name, ("prompt",))
    return dataset


def say_unread(source: str, unread: Sequence[str]) -> None:
    """Name the columns of a source that are not read, once."""
    if unread:
        say_once(f"{source}: {unread_message(unread)}")


def demonstrations_of(dataset: Dataset, response: str) -> Dataset:
    """Return a response of each row as a demonstration: `prompt`, `completion` and what else is read of them."""
    beside = [name for name in sample_columns(response) if name in dataset.column_names]
    columns = [*prompt_columns(dataset.column_names), response, *beside]
    return with_response(dataset.select_columns(columns), response, "completion")


def first_rows(dataset: Dataset, limit: int | None) -> Dataset:
    """Return the first rows of a data set, all of them if there are fewer or there is no limit."""
    return dataset.select(range(limit)) if limit and limit < len(dataset) else dataset


def _read(
    source: str,
    split: str,
    responses: Sequence[str] = SIDES,
    columns: Names | None = None,
    variables: Mapping[str, Any] | None = None,
) -> Dataset:
    """Return the data set of a source: its columns by their usual names, its messages in normal form."""
    dataset = read_source(source, split)
    if len(dataset) == 0:
        return dataset
    has_system = "system" in dataset.features and any(dataset["system"])
    reader = RowReader.of(
        dataset,
        dataset.column_names,
        source,
        names=columns,
        responses=responses,
        has_system=has_system,
        variables=variables,
    )
    for note in reader.notes:
        say_once(f"{source}: {note}")
    names = [*dict.fromkeys((*VALUES, *reader.responses))]
    if not reader.changes:
        names = [n for n in names if n in dataset.features and not _is_normal(dataset, n)]
    if variables or not reader.columns.isdisjoint(TEMPLATE_COLUMNS):
        names += TEMPLATE_COLUMNS
    values: dict[str, list[Any]] = {}
    if names:
        rows, reasons = [], []
        for index, row in enumerate(dataset):
            try:
                rows.append(reader.read(row, index))
                reasons.append("")
            except LeftOut as left_out:
                reasons.append(str(left_out))
        if dropped := Dropped.from_reasons(reasons):
            say_once(f"{source}: {dropped}; the other rows are counted from 0")
            dataset = dataset.select([index for index, reason in enumerate(reasons) if not reason])
        values = {name: [row.get(name) for row in rows] for name in names if any(name in row for row in rows)}
    empty = [name for name in TEMPLATE_COLUMNS if name in values and not any(values[name])]
    values = {name: column for name, column in values.items() if name not in empty}
    unused = [name for name in dataset.column_names if name in reader.drops.union(empty) - {*values}]
    return with_columns(dataset.remove_columns(unused), values) if unused or values else dataset


def _is_normal(dataset: Dataset, name: str) -> bool:
    return _dtype(dataset, name) == "string" or _plain_messages(dataset.features[name])


def _plain_messages(feature: Any) -> bool:
    """Return whether a column holds messages of role and content alone, which are in normal form."""
    messages = getattr(feature, "feature", None)
    if not isinstance(messages, dict) or {*messages} != {"role", "content"}:
        return False
    return all(getattr(feature, "dtype", "") == "string" for feature in messages.values())


def with_columns(dataset: Dataset, columns: dict[str, list[Any]]) -> Dataset:
    """Return a data set with columns replaced or added; messages and structures keep their own keys, without nulls."""
    from datasets import Dataset, Features, Json, List, concatenate_datasets

    if not columns:
        return dataset
    types: dict[str, Any] = {}
    for name, values in columns.items():
        first = next((value for value in values if value is not None), None)
        if isinstance(first, list) and all(_messages_or_none(value) for value in values):
            types[name] = List(Json())
        elif isinstance(first, dict) and all(isinstance(value, dict | None) for value in values):
            types[name] = Json()
    changed = [Dataset.from_dict({n: columns[n] for n in types}, features=Features(types))] if types else []
    if others := {name: values for name, values in columns.items() if name not in types}:
        changed.append(Dataset.from_dict(others, on_mixed_types="use_json"))
    unchanged = dataset.remove_columns([name for name in columns if name in dataset.column_names])
    return concatenate_datasets([*([unchanged] if unchanged.column_names else []), *changed], axis=1)


def _messages_or_none(value: Any) -> bool:
    return value is None or (isinstance(value, list) and all(isinstance(item, dict) for item in value))


def _with_shared_prompt(dataset: Dataset, source: str) -> Dataset:
    pairs = [
        split_shared_prompt({"chosen": chosen, "rejected": rejected}, index, source)
        for index, (chosen, rejected) in enumerate(zip(dataset["chosen"], dataset["rejected"], strict=True))
    ]
    texts = [(index, pair) for index, pair in enumerate(pairs) if isinstance(pair["prompt"], str)]
    if going_on := [index for index, pair in texts if any(USER_TURN.search(pair[side]) for side in SIDES)]:
        say_once(
            f"warning: {source}: in {len(going_on):,} rows, the first is row {going_on[0]}, a response goes on with a "
            "user's turn, and all of it is learnt; give such rows a `prompt` column, or remove them"
        )
    return with_columns(dataset, {name: [pair[name] for pair in pairs] for name in ("prompt", *SIDES)})


def _with_last_turn(dataset: Dataset, source: str) -> Dataset:
    return dataset.map(
        split_last_turn, with_indices=True, fn_kwargs={"source": source}, remove_columns="messages", **NO_CACHE
    )


# ---- Checking ----------------------------------------


def check_pairs(dataset: Dataset, source: str, responses: Sequence[str] = SIDES) -> None:
    """Check that every row has a prompt and these responses, and that flags and scores have the right types.

    Raises:
        UserError: naming the source, and the row or column.
    """
    sampled = [name for name in responses if name not in SIDES]
    hint = f"`prefdistill sample --column {sampled[0]}` makes such a column." if sampled else ""
    _require_columns(dataset, source, ("prompt", *responses), hint)
    for name in responses:
        dtype = _dtype(dataset, ended_column(name))
        if dtype not in ("bool", "null"):
            raise UserError(f"{source}: column '{ended_column(name)}' must hold true or false, it holds {dtype}.")
        if not _holds_ids(dataset, ids_column(name), check_column(name)):
            raise UserError(
                f"{source}: columns '{ids_column(name)}' and '{check_column(name)}' must hold lists of token ids and a "
                "number, as `prefdistill sample` writes them. Rename or remove them."
            )
    for name in SCORES:
        dtype = _dtype(dataset, name)
        if not dtype.startswith(("float", "int", "uint", "null")):
            raise UserError(f"{source}: column '{name}' must hold numbers, it holds {dtype}. Convert or rename it.")
    _check_rows(dataset, source, ("prompt", *responses))


def _dtype(dataset: Dataset, column: str) -> str:
    """Return the type of a column: "null" if there is no such column, and a phrase for lists and structures."""
    if column not in dataset.features:
        return "null"
    return str(getattr(dataset.features[column], "dtype", "values of several types"))


def _holds_ids(dataset: Dataset, ids: str, check: str) -> bool:
    """Return whether columns of sampled ids have their types; ids without a check are somebody else's."""
    if not {ids, check} <= {*dataset.features}:
        return True
    items = getattr(getattr(dataset.features[ids], "feature", None), "dtype", "")
    return _dtype(dataset, check).startswith(("int", "uint", "null")) and items.startswith(("int", "uint"))


def _require_columns(dataset: Dataset, source: str, columns: Sequence[str], hint: str = "") -> None:
    if len(dataset) == 0:
        raise UserError(f"{source}: there are no rows in it. Give data with at least one row.")
    missing = [name for name in columns if name not in dataset.column_names]
    if missing:
        hint = hint or pair_hint(dataset.column_names)
        raise UserError(f"{source}: no column {_quoted(missing)}; it has {_quoted(dataset.column_names)}. {hint}")


def _check_rows(dataset: Dataset, source: str, columns: Sequence[str]) -> None:
    """Check that all values are text or all are messages, and that prompts and responses hold the right roles."""
    first: dict[str, str] = {}
    for index, row in enumerate(dataset.select_columns(list(columns))):
        where = f"{source}, row {index}"
        for name in columns:
            first.setdefault(form_of(row[name], f"{where}: '{name}'"), f"row {index} ('{name}')")
        if len(first) == 2:
            raise UserError(
                f"{source}: {first['plain']} is plain text and {first['conversational']} is a list of messages. "
                "Use one form in all rows and columns."
            )
        if "conversational" in first:
            for name in columns:
                check_roles(row[name], name, where)


def _quoted(names: Sequence[str]) -> str:
    return ", ".join(f"'{name}'" for name in names)
