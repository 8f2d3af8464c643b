"""File formats of data sets: a registry from file suffix to reader.

A reader is a function of a path that returns a `datasets.Dataset`, or yields rows as dictionaries. To add a format,
register its reader under the suffix without the dot, or declare an entry point of the group `prefdistill.formats`:

    def read_tsv(path):
        with path.open(newline="", encoding="utf-8") as file:
            yield from csv.DictReader(file, delimiter="\t")

    FORMATS.register("tsv", read_tsv)
"""

from __future__ import annotations

import csv
import gzip
import json
import reprlib
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from prefdistill.core.errors import UserError
from prefdistill.core.files import disk_full
from prefdistill.core.registry import Registry
from prefdistill.core.text import surrogate
from prefdistill.data.columns import SCORES

if TYPE_CHECKING:
    from datasets import Dataset

Rows = Iterable[dict[str, Any] | UserError]


def read_jsonl(path: Path) -> Iterator[dict[str, Any] | UserError]:
    """Yield the objects of a JSON Lines file, and a UserError in place of a line that holds none.

    Not through `datasets`, whose errors name neither the line nor the column.
    """
    with (
        reading(f"{path}: cannot be read. Write it again"),
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


def read_json(path: Path) -> Iterator[dict[str, Any] | UserError]:
    """Yield the objects of a JSON array, or of JSON Lines under the name .json."""
    with reading(f"{path}: cannot be read. Write it again"):
        text = path.read_text(encoding="utf-8-sig")
    if not text.lstrip().startswith("["):
        yield from read_jsonl(path)
        return
    try:
        rows = json.loads(text)
    except json.JSONDecodeError as error:
        raise UserError(
            f"{path}, line {error.lineno}: not valid JSON (column {error.colno}: {error.msg}). Fix the file."
        ) from None
    for index, row in enumerate(rows):
        is_object = isinstance(row, dict)
        yield row if is_object else UserError(f"{path}, row {index}: must be a JSON object, not {reprlib.repr(row)}.")


def read_csv(path: Path) -> Iterator[dict[str, Any] | UserError]:
    """Yield the rows of a CSV file with a header: text, but for numbers in score columns, true and false in columns
    `NAME_ended`, and messages, which are JSON.
    """
    csv.field_size_limit(2**31 - 1)
    with (
        reading(f"{path}: cannot be read. Write it again"),
        path.open(newline="", encoding="utf-8-sig") as file,
    ):
        for index, row in enumerate(csv.DictReader(file, restkey="")):
            if "" in row or None in row.values():
                yield UserError(f"{path}, row {index}: has more or fewer values than the header. Quote its commas.")
                continue
            try:
                yield {name: _csv_value(name, text) for name, text in row.items()}
            except ValueError as error:
                yield UserError(f"{path}, row {index}: {error}.")


def _csv_value(name: str, text: str) -> Any:
    if name in SCORES:
        return float(text) if text.strip() else None
    if name.endswith("_ended"):
        return {"true": True, "false": False, "": None}.get(text.strip().lower(), text)
    if text.startswith(("[{'", "{'")):
        raise ValueError(f"'{name}' holds messages as Python prints them; write them as JSON")
    if text.startswith(("[{", "{")):
        try:
            value = json.loads(text)
        except ValueError:
            return text
        messages = value if isinstance(value, list) else [value]
        return value if all(isinstance(m, dict) and {"role", "from"} & m.keys() for m in messages) else text
    return text


def read_parquet(path: Path) -> Dataset:
    """Read a Parquet file.

    Not through `Dataset.from_parquet`, whose cache goes by name and time: a file from an archive or a copy, with the
    name and time of an older one, would give the rows of the older one.
    """
    from datasets import Dataset
    from pyarrow.parquet import ParquetFile

    with reading(f"{path}: not a readable Parquet file. Write it again"), ParquetFile(path) as file:
        names = file.schema_arrow.names
        if duplicates := [name for name in names if names.count(name) > 1]:
            raise UserError(f"{path}: there are two columns '{duplicates[0]}'. Rename or drop one of them.")
        return Dataset(file.read())


FORMATS = Registry(
    "data format",
    "formats",
    {"jsonl": read_jsonl, "jsonl.gz": read_jsonl, "parquet": read_parquet, "csv": read_csv, "json": read_json},
)


def suffixes() -> tuple[str, ...]:
    """Return the file suffixes that can be read, such as ".jsonl"."""
    return tuple(f".{name}" for name in FORMATS)


def read_file(path: Path) -> Dataset:
    """Return the data set in a file, by the reader of its suffix.

    Raises:
        UserError: if the suffix is unknown or the file cannot be read.
    """
    from datasets import Dataset

    rows = file_rows(path)
    return rows if isinstance(rows, Dataset) else _dataset_of(rows, path)


def file_rows(path: Path) -> Dataset | Rows:
    """Return the rows of a file as its reader gives them; a row that cannot be read may be a UserError."""
    names = [name for name in FORMATS if path.name.endswith(f".{name}")]
    if not names:
        raise UserError(f"{path}: unknown file type. Give a {', '.join(suffixes())} file.")
    with reading(f"{path}: cannot be read. Write it again"):
        return FORMATS[max(names, key=len)](path)


def _dataset_of(rows: Rows, path: Path) -> Dataset:
    from datasets import Dataset

    table: list[dict[str, Any]] = []
    with reading(f"{path}: cannot be read. Write it again"):
        for row in rows:
            if isinstance(row, UserError):
                raise row
            table.append(row)
    names = dict.fromkeys(name for row in table for name in row)
    with reading(f"{path}: holds a value that Arrow cannot store. Fix or remove it"):
        try:
            # Columns of mixed types become JSON: the checks refuse them where they matter, with row numbers.
            columns = {name: [row.get(name) for row in table] for name in names}
            return Dataset.from_dict(columns, on_mixed_types="use_json")
        except UnicodeEncodeError:
            texts = (json.dumps(row, ensure_ascii=False) for row in table)
            number = next(number for number, text in enumerate(texts) if surrogate(text) is not None)
            raise UserError(
                f"{path}, row {number}: it holds an unpaired surrogate (\\ud800 to \\udfff). Fix or remove it."
            ) from None


@contextmanager
def reading(message: str) -> Iterator[None]:
    """Turn whatever a reader raises into a UserError; readers share no narrower base class than Exception."""
    try:
        yield
    except UserError:
        raise
    except Exception as error:
        if disk_full(error):  # of temporary files
            raise
        reason = next(iter(str(error).splitlines()), "")[:200]
        raise UserError(f"{message} ({type(error).__name__}: {reason}).") from error
