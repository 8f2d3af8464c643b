"""Preference pairs and demonstrations: load and check them. `encode.py` makes tokens of them.

    dataset = load_pairs("pairs.jsonl")                                      # or a directory, or org/name#split

Rows are counted from 0, here and in every message.
"""

from __future__ import annotations

import gzip
import hashlib
import json
import re
import reprlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from itertools import takewhile
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

from prefdistill.core.errors import UserError
from prefdistill.core.files import disk_full
from prefdistill.core.text import surrogate
from prefdistill.data.columns import SCORES, SIDES, ended_column

if TYPE_CHECKING:
    from datasets import Dataset

FILE_TYPES = (".jsonl", ".jsonl.gz", ".parquet")
HUB_NAME = re.compile(r"\w[\w.-]*/\w[\w.-]*")
# Never write next to the user's data, and never reuse what an older version of a function wrote.
NO_CACHE = {"keep_in_memory": True, "load_from_cache_file": False}


# ---- Loading ----------------------------------------


def load_pairs(source: str, *, split: str = "train", responses: Sequence[str] = SIDES) -> Dataset:
    """Preference pairs with the columns `prompt`, `chosen`, `rejected` and whatever else the source has.

    The three are all text, or all lists of messages. Without a `prompt` column, the shared start of `chosen` and
    `rejected` becomes the prompt.

    Args:
        responses: the responses a row must have; what `sample` has written, such as `student_response`, is one too.
        source: a .jsonl, .jsonl.gz or .parquet file; a directory that holds such files or that `save_to_disk` wrote;
            or a Hub name. `org/name#test` and `directory#test` name a split.
        split: the split to take where `source` has several and names none.

    Raises:
        UserError: the source cannot be read, or a row is not a preference pair.
    """
    dataset = _read(source, split)
    if "prompt" not in dataset.column_names:
        _require(dataset, source, SIDES)
        dataset = _split_off_prompt(dataset, source)
    check_pairs(dataset, source, responses)
    return dataset


def first_rows(dataset: Dataset, limit: int | None) -> Dataset:
    """The first rows of a data set, all of them if there are fewer or there is no limit."""
    return dataset.select(range(min(limit, len(dataset)))) if limit else dataset


def load_messages(source: str, *, split: str = "train") -> Dataset:
    """Examples for supervised fine-tuning, with the columns `prompt` and `completion` and no others.

    Taken from `messages` (the completion is the last assistant turn), or `prompt` and `completion`, or the chosen side
    of preference pairs. Arguments and errors are those of `load_pairs`.
    """
    dataset = _read(source, split)
    columns = dataset.column_names
    if "messages" in columns:
        dataset = dataset.select_columns("messages").map(
            _split_off_answer, with_indices=True, fn_kwargs={"source": source}, remove_columns="messages", **NO_CACHE
        )
    elif "completion" not in columns and "chosen" in columns:
        if "prompt" not in columns and "rejected" in columns:
            dataset = _split_off_prompt(dataset, source)
        dataset = dataset.rename_column("chosen", "completion")
    _require(dataset, source, ("prompt", "completion"), "SFT data has `messages`, or `prompt` and `completion`.")
    _check_rows(dataset, source, ("prompt", "completion"))
    return dataset.select_columns(["prompt", "completion"])


def load_prompts(source: str | Dataset, *, split: str = "train") -> Dataset:
    """Prompts to answer, with the column `prompt` and whatever else the source has.

    Without a `prompt` column, the shared start of `chosen` and `rejected` becomes the prompt, or `messages` is split
    into `prompt` and `completion`, its last assistant turn. Arguments and errors are those of `load_pairs`; a data set
    in memory is taken as it is.
    """
    dataset, name = (_read(source, split), source) if isinstance(source, str) else (source, "The data set")
    columns = dataset.column_names
    if "prompt" not in columns and {*SIDES} <= {*columns}:
        dataset = _split_off_prompt(dataset, name)
    elif "prompt" not in columns and "messages" in columns:
        dataset = dataset.map(
            _split_off_answer, with_indices=True, fn_kwargs={"source": name}, remove_columns="messages", **NO_CACHE
        )
    _require(dataset, name, ("prompt",), "Prompts are `prompt`, or the start of `messages` or of preference pairs.")
    _check_rows(dataset, name, ("prompt",))
    return dataset


def demonstrations_fingerprint(demonstrations: Dataset) -> str:
    """`data_fingerprint` of what `load_messages` gives."""
    return data_fingerprint(demonstrations.rename_column("completion", "chosen"))


def data_fingerprint(dataset: Dataset, responses: Sequence[str] = SIDES) -> str:
    """SHA-256 over the prompt, some responses and the scores of every row, in order; the same for JSONL, Parquet, Hub.

    Columns that say whether a response has ended count where they are there. The scores are those of a pair.
    """
    digest = hashlib.sha256()
    columns = ("prompt", *responses)
    flags = [ended_column(name) for name in responses if ended_column(name) in dataset.column_names]
    scores = SCORES if set(SIDES) <= set(responses) else ()
    for row in dataset.select_columns([n for n in (*columns, *flags, *scores) if n in dataset.column_names]):
        texts = [without_nulls(row.get(name)) for name in columns]
        numbers = [None if row.get(name) is None else float(row[name]) for name in (*scores, *flags)]
        digest.update(json.dumps(texts + numbers, sort_keys=True).encode() + b"\n")
    return digest.hexdigest()


def prompt_text(prompt: Any) -> str:
    """A prompt as one text, to tell prompts apart: the text itself, or its messages as JSON."""
    return prompt if isinstance(prompt, str) else json.dumps(without_nulls(prompt), sort_keys=True, ensure_ascii=False)


def read_rows(source: str, *, split: str = "train") -> Iterator[dict[str, Any] | UserError]:
    """The rows of a source as they stand, before any check; in place of a line that holds no row, what is wrong there.

    Arguments and errors are those of `load_pairs`.
    """
    _, path, suffix = _place(source)
    file = _split_file(path, suffix or split) if path.is_dir() else path
    if file and file.is_file() and file.name.endswith((".jsonl", ".jsonl.gz")) and (path.is_dir() or not suffix):
        yield from _lines(file)
    else:
        yield from _read(source, split)


def _place(source: str) -> tuple[str, Path, str]:
    """Name, path and split of a source."""
    name, suffix = source, ""
    if not source.strip():
        raise UserError("the name of the data is empty. Give a file, a directory, or a Hub name such as org/name.")
    if not Path(source).expanduser().exists():  # a path may itself contain '#'
        name, _, suffix = source.partition("#")
    return name, Path(name).expanduser(), suffix


def _read(source: str, split: str) -> Dataset:
    name, path, suffix = _place(source)
    if path.is_dir():
        dataset = _read_directory(path, suffix or split)
    elif path.is_file():
        if suffix:
            raise UserError(f"{name}: a file has no splits. Leave out '#{suffix}'.")
        dataset = _read_file(path)
    elif HUB_NAME.fullmatch(name) and not name.endswith(FILE_TYPES):
        from datasets import load_dataset

        with _explain(f"{source}: no such file or directory, and loading it from the Hub failed. Check the name"):
            dataset = load_dataset(name, split=suffix or split)
    else:
        raise UserError(
            f"{source}: no such file or directory. Give a {', '.join(FILE_TYPES)} file, a directory, "
            "or a Hub name such as org/name."
        )
    return dataset


def _read_directory(path: Path, split: str) -> Dataset:
    from datasets import DatasetDict, load_dataset, load_from_disk

    if file := _split_file(path, split):
        return _read_file(file)
    if not any((path / name).is_file() for name in ("dataset_dict.json", "state.json")):
        # A cache of its own: the common one goes by names and times, and would give the rows of older files.
        with (
            _explain(f"{path}: no split '{split}' could be loaded from this directory. Check its files"),
            TemporaryDirectory() as cache,
        ):
            return load_dataset(str(path), split=split, cache_dir=cache, keep_in_memory=True)
    with _explain(f"{path}: the saved data set cannot be read. Save it again"):
        # In memory: a later `map` would take its results from files beside the data, which goes by an old fingerprint.
        saved = load_from_disk(str(path), keep_in_memory=True)
    if not isinstance(saved, DatasetDict):
        return saved
    if split not in saved:
        raise UserError(f"{path}: no split '{split}'. Name one of its splits after '#': {', '.join(saved)}.")
    return saved[split]


def _split_file(directory: Path, split: str) -> Path | None:
    files = (directory / f"{split}{suffix}" for suffix in FILE_TYPES)
    return next((file for file in files if file.is_file()), None)


def _read_file(path: Path) -> Dataset:
    from datasets import Dataset

    if path.name.endswith(".parquet"):
        return _read_parquet(path)
    if not path.name.endswith(FILE_TYPES):
        raise UserError(f"{path}: unknown file type. Give a {', '.join(FILE_TYPES)} file.")
    rows: list[dict[str, Any]] = []
    for row in _lines(path):
        if isinstance(row, UserError):
            raise row
        rows.append(row)
    columns = dict.fromkeys(name for row in rows for name in row)
    with _explain(f"{path}: holds a value that Arrow cannot store. Fix or remove it"):
        # Columns of mixed types are kept as JSON: ours are refused by the checks, with row numbers; others may stay.
        table = {name: [row.get(name) for row in rows] for name in columns}
        try:
            return Dataset.from_dict(table, on_mixed_types="use_json")
        except UnicodeEncodeError:
            texts = (json.dumps(row, ensure_ascii=False) for row in rows)
            number = next(number for number, text in enumerate(texts) if surrogate(text) is not None)
            raise UserError(
                f"{path}, row {number}: there is half a character in it (\\ud800 to \\udfff). Fix or remove it."
            ) from None


def _read_parquet(path: Path) -> Dataset:
    """Not through `Dataset.from_parquet`, which keeps a copy by name and time: another file of the same ones, from an
    archive or a copy, would be read as the old one."""
    from datasets import Dataset
    from pyarrow.parquet import ParquetFile

    with _explain(f"{path}: not a readable Parquet file. Write it again"), ParquetFile(path) as file:
        names = file.schema_arrow.names
        if twice := [name for name in names if names.count(name) > 1]:
            raise UserError(f"{path}: there are two columns '{twice[0]}'. Rename or drop one of them.")
        return Dataset(file.read())


def _lines(path: Path) -> Iterator[dict[str, Any] | UserError]:
    """The objects of a JSON Lines file, and in place of a line that holds none what is wrong with it. Not through
    `datasets`, whose errors name neither the line nor the column."""
    with (
        _explain(f"{path}: cannot be read. Write it again"),
        gzip.open(path) if path.name.endswith(".gz") else path.open("rb") as file,
    ):
        for number, line in enumerate(file, 1):
            if not line.strip():
                continue
            try:
                row = json.loads(line)
            except ValueError as error:  # not JSON, or not UTF-8
                reason = f"column {error.colno}: {error.msg}" if isinstance(error, json.JSONDecodeError) else error
                yield UserError(f"{path}, line {number}: not valid JSON ({reason}). Fix or remove the line.")
                continue
            if isinstance(row, dict):
                yield row
            else:
                yield UserError(f"{path}, line {number}: a line must be a JSON object, not {reprlib.repr(row)}.")


@contextmanager
def _explain(what: str) -> Iterator[None]:
    """Turn whatever a reader raises into a UserError; readers share no base class of errors narrower than Exception."""
    try:
        yield
    except UserError:
        raise
    except Exception as error:
        if disk_full(error):  # the one for temporary files
            raise
        reason = next(iter(str(error).splitlines()), "")[:200]
        raise UserError(f"{what} ({type(error).__name__}: {reason}).") from error


# ---- Checking ----------------------------------------


def check_pairs(dataset: Dataset, source: str, responses: Sequence[str] = SIDES) -> None:
    made = [name for name in responses if name not in SIDES]
    hint = f"`prefdistill sample --column {made[0]}` makes such a column." if made else ""
    _require(dataset, source, ("prompt", *responses), hint)
    for name in responses:
        dtype = _dtype(dataset, ended_column(name))
        if dtype not in ("bool", "null"):
            raise UserError(f"{source}: column '{ended_column(name)}' must hold true or false, it holds {dtype}.")
    for name in SCORES:
        dtype = _dtype(dataset, name)
        if not dtype.startswith(("float", "int", "uint", "null")):
            raise UserError(f"{source}: column '{name}' must hold numbers, it holds {dtype}. Convert or rename it.")
    _check_rows(dataset, source, ("prompt", *responses))


def _dtype(dataset: Dataset, column: str) -> str:
    """What a column holds; `null` also where there is none, and a word for values that are no single ones."""
    if column not in dataset.features:
        return "null"
    return str(getattr(dataset.features[column], "dtype", "values of several types"))


def _require(dataset: Dataset, source: str, columns: Sequence[str], expected: str = "") -> None:
    if len(dataset) == 0:
        raise UserError(f"{source}: there are no rows in it. Give data with at least one row.")
    missing = [name for name in columns if name not in dataset.column_names]
    if missing:
        expected = expected or "A pair has `prompt`, `chosen`, `rejected`; the prompt may be the start of both others."
        raise UserError(f"{source}: no column {_listed(missing)}; it has {_listed(dataset.column_names)}. {expected}")


def _check_rows(dataset: Dataset, source: str, columns: Sequence[str]) -> None:
    """Every value is text or a list of messages, the same throughout; prompts and responses hold the right roles."""
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


def form_of(value: Any, what: str) -> str:
    """`plain` or `conversational`; a UserError about `what` if it is neither."""
    if isinstance(value, str):
        return "plain"
    if isinstance(value, list) and value and all(_is_message(message) for message in value):
        return "conversational"
    raise UserError(
        f"{what} must be text or a list of messages with a text `role` and `content`, not {reprlib.repr(value)}."
    )


def _is_message(value: Any) -> bool:
    return isinstance(value, dict) and all(isinstance(value.get(key), str) for key in ("role", "content"))


def check_roles(messages: list[dict[str, Any]], name: str, where: str) -> None:
    roles = [message["role"] for message in messages]
    if name == "prompt" and roles[-1] == "assistant":
        raise UserError(f"{where}: the prompt ends with an assistant message. End it with the turn to answer.")
    if name != "prompt" and (others := sorted({*roles} - {"assistant"})):
        fix = "Keep assistant messages only; what comes before them belongs to the prompt."
        raise UserError(f"{where}: '{name}' has a message with the role '{others[0]}'. {fix}")


def _split_off_prompt(dataset: Dataset, source: str) -> Dataset:
    """Move the shared start of `chosen` and `rejected` into `prompt`."""
    return dataset.map(split_off_start, with_indices=True, fn_kwargs={"source": source}, **NO_CACHE)


def split_off_start(row: dict[str, Any], index: int, source: str) -> dict[str, Any]:
    from trl import extract_prompt

    where = f"{source}, row {index}"
    for name in SIDES:
        form_of(row[name], f"{where}: '{name}'")
    if not row["chosen"] or row["chosen"][:1] != row["rejected"][:1]:  # TRL's function takes a shared start for granted
        raise UserError(f"{where}: 'chosen' and 'rejected' do not start alike. Add a `prompt` column.")
    return extract_prompt(row)


def _split_off_answer(row: dict[str, Any], index: int, source: str) -> dict[str, Any]:
    where, messages = f"{source}, row {index}", row["messages"]
    if form_of(messages, f"{where}: 'messages'") == "plain":
        raise UserError(f"{where}: 'messages' must be a list of messages, not {reprlib.repr(messages)}.")
    answer = list(takewhile(lambda message: message["role"] == "assistant", reversed(messages)))
    if not answer or len(answer) == len(messages):
        raise UserError(f"{where}: 'messages' must be a prompt and then an assistant message. Fix or remove the row.")
    return {"prompt": messages[: -len(answer)], "completion": messages[-len(answer) :]}


def without_nulls(value: Any) -> Any:
    """Messages without the empty keys that Arrow adds where the messages of a column do not all have the same keys."""
    if not isinstance(value, list):
        return value
    return [{key: item for key, item in message.items() if item is not None} for message in value]


def _listed(names: Sequence[str]) -> str:
    return ", ".join(f"'{name}'" for name in names)
