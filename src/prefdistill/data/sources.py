"""Read a data source: a file, a directory of files, a saved data set, or a data set on the Hub."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

from prefdistill.core.errors import UserError
from prefdistill.data.formats import file_rows, read_file, reading, suffixes

if TYPE_CHECKING:
    from datasets import Dataset

# For `Dataset.map`: never write next to the user's data, never reuse what an older version of a function wrote.
NO_CACHE = {"keep_in_memory": True, "load_from_cache_file": False}
HUB_NAME = re.compile(r"\w[\w.-]*/\w[\w.-]*")


def read_source(source: str, split: str) -> Dataset:
    """Return the data set of a source, as it is.

    Args:
        source: a file of a known format; a directory that holds one for each split, or that `save_to_disk` wrote; or a
            Hub name. `org/name#test` and `directory#test` name a split.
        split: the split to read if `source` names none.

    Raises:
        UserError: if there is no such source, or it cannot be read.
    """
    name, path, named_split = _parse(source)
    if path.is_dir():
        return _read_directory(path, named_split or split)
    if path.is_file():
        if named_split:
            raise UserError(f"{name}: a file has no splits. Leave out '#{named_split}'.")
        return read_file(path)
    if HUB_NAME.fullmatch(name) and not name.endswith(suffixes()):
        from datasets import load_dataset

        with reading(f"{source}: no such file or directory, and loading it from the Hub failed. Check the name"):
            return load_dataset(name, split=named_split or split)
    raise UserError(
        f"{source}: no such file or directory. Give a {', '.join(suffixes())} file, a directory, "
        "or a Hub name such as org/name."
    )


def read_rows(source: str, *, split: str = "train") -> Iterator[dict[str, Any] | UserError]:
    """Yield the rows of a source before any check, and a UserError in place of a line that holds no row.

    Arguments and errors are those of `read_source`.
    """
    _, path, named_split = _parse(source)
    file = _split_file(path, named_split or split) if path.is_dir() else path
    if file and file.is_file() and (path.is_dir() or not named_split):
        with reading(f"{file}: cannot be read. Write it again"):
            yield from file_rows(file)
    else:
        yield from read_source(source, split)


def _parse(source: str) -> tuple[str, Path, str]:
    """Return name, path and split of a source."""
    name, split = source, ""
    if not source.strip():
        raise UserError("the name of the data is empty. Give a file, a directory, or a Hub name such as org/name.")
    if not Path(source).expanduser().exists():  # a path may itself contain '#'
        name, _, split = source.partition("#")
    return name, Path(name).expanduser(), split


def _read_directory(path: Path, split: str) -> Dataset:
    from datasets import DatasetDict, load_dataset, load_from_disk

    if file := _split_file(path, split):
        return read_file(file)
    if not any((path / name).is_file() for name in ("dataset_dict.json", "state.json")):
        # The shared cache goes by names and times, and could give the rows of older files: use an empty one.
        with (
            reading(f"{path}: no split '{split}' could be loaded from this directory. Check its files"),
            TemporaryDirectory() as cache,
        ):
            return load_dataset(str(path), split=split, cache_dir=cache, keep_in_memory=True)
    with reading(f"{path}: the saved data set cannot be read. Save it again"):
        # In memory: `map` on a data set from disk reuses cache files beside it, and may find those of older rows.
        saved = load_from_disk(str(path), keep_in_memory=True)
    if not isinstance(saved, DatasetDict):
        return saved
    if split not in saved:
        raise UserError(f"{path}: no split '{split}'. Name one of its splits after '#': {', '.join(saved)}.")
    return saved[split]


def _split_file(directory: Path, split: str) -> Path | None:
    files = (directory / f"{split}{suffix}" for suffix in suffixes())
    return next((file for file in files if file.is_file()), None)
