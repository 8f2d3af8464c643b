"""The files of a signal store: Parquet, written whole, each with a checksum beside it, read a few rows at a time."""

import json
from collections import OrderedDict
from collections.abc import Iterable, Mapping, Sequence
from functools import cached_property
from hashlib import sha256
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from prefdistill.core.files import atomic_path, file_digest
from prefdistill.core.parts import read_checksum, write_checksum
from prefdistill.data.spans import Spans
from prefdistill.signals.kinds import Column

if TYPE_CHECKING:
    from datasets import Dataset

# Bytes of a row group, the least that is read at once: small enough to pick single pairs out of a file of many.
GROUP_BYTES = 2**18
# Of the shards of a store together. An open file holds what it says of its row groups, up to about 2 MB.
BYTES_KEPT = 2**26  # of row groups
FILES_KEPT = 64
LARGE = 2**22  # bytes of a row group that threads read faster
NOTES = b"prefdistill"
# The columns of every store, beside those of its kinds.
ROW = Column("int64", encoding="DELTA_BINARY_PACKED")
TOKENS = Column("int32", encoding="DELTA_BINARY_PACKED")
CHECK = Column("uint32")
ENDED = Column("bool")
OFFSETS = Column("int32", ragged=True, encoding="DELTA_BINARY_PACKED")
IDS_CHECK = "ids_crc32"  # of a response: the CRC-32 of the token ids of prompt and response
ShardColumns = Mapping[str, tuple[Column, Sequence[Any] | np.ndarray]]


def response_columns(
    name: str, encoded: "Dataset", lengths: np.ndarray, checks: np.ndarray, spans: Spans, *, offsets: bool
) -> dict[str, tuple[Column, Sequence[Any] | np.ndarray]]:
    """Return the columns of a response that every store has, from encoded rows.

    Args:
        name: of the response.
        encoded: what `encode_pairs` returns.
        lengths, checks: the numbers of tokens, and the CRC-32 of the ids.
        spans: where its text stands, see `data.spans`.
        offsets: whether the ends of its tokens are stored.
    """
    return {
        f"{name}_tokens": (TOKENS, lengths),
        f"{name}_{IDS_CHECK}": (CHECK, checks),
        f"{name}_ended": (ENDED, encoded[f"{name}_ended"][:]),
        **({f"{name}_offsets": (OFFSETS, encoded[f"{name}_offsets"][:])} if offsets else {}),
        f"{name}_text_start": (TOKENS, spans.start),
        f"{name}_text_end": (TOKENS, spans.end),
    }


def write_shard(path: Path, columns: ShardColumns, notes: dict[str, Any]) -> None:
    """Write columns of rows, and notes on them, into a file that is whole or not there.

    Its checksum is written first, as sha256sum would: a file that does not fit it is damaged.
    """
    with atomic_path(path) as temporary:
        _write_table(temporary, columns, notes)
        write_checksum(path, file_digest(temporary))


def memory_shard(columns: ShardColumns, notes: dict[str, Any], recent: "Recent | None" = None) -> "Shard":
    """Return a shard that is in memory, with the bytes that its file would have."""
    sink = pa.BufferOutputStream()
    _write_table(sink, columns, notes)
    return Shard(sink.getvalue(), recent)


def open_shards(paths: Iterable[Path]) -> list["Shard"]:
    """Return the shards of one store, which share what they keep open and in memory."""
    recent = Recent()
    return [Shard(path, recent) for path in paths]


def _write_table(where: Any, columns: ShardColumns, notes: dict[str, Any]) -> None:
    arrays = {name: pa.array(values, column.type) for name, (column, values) in columns.items()}
    leaves = {name: f"{name}.list.element" if column.ragged else name for name, (column, _) in columns.items()}
    encodings = {leaves[name]: column.encoding for name, (column, _) in columns.items() if column.encoding}
    dictionaries = [leaf for leaf, encoding in encodings.items() if encoding == "DICTIONARY"]
    table = pa.table(arrays).replace_schema_metadata({NOTES: json.dumps(notes).encode()})
    pq.write_table(
        table,
        where,
        compression="zstd",
        row_group_size=max(1, round(GROUP_BYTES * table.num_rows / max(1, table.nbytes))),
        use_dictionary=dictionaries,
        column_encoding={leaf: encoding for leaf, encoding in encodings.items() if leaf not in dictionaries},
        write_statistics=False,  # nobody searches these files by value
    )


class Recent:
    """The files and row groups that were read last. The others are closed and forgotten, so that a store may have any
    number of shards of any size.

    It is not for several threads at once.
    """

    def __init__(self) -> None:
        self._files: OrderedDict[object, pq.ParquetFile] = OrderedDict()
        self._groups: OrderedDict[tuple[object, int, tuple[str, ...]], pa.Table] = OrderedDict()
        self._bytes = 0

    def __reduce__(self) -> tuple[Any, ...]:  # to another process, empty
        return Recent, ()

    def file(self, key: object, source: Path | pa.Buffer) -> pq.ParquetFile:
        """Return an open file."""
        if key not in self._files:
            while len(self._files) >= FILES_KEPT:
                self._files.popitem(last=False)  # closed as soon as nobody reads it
            self._files[key] = pq.ParquetFile(source, memory_map=isinstance(source, Path))
        self._files.move_to_end(key)
        return self._files[key]

    def group(self, key: object, source: Path | pa.Buffer, number: int, columns: tuple[str, ...]) -> pa.Table:
        """Return these columns of a row group."""
        place = key, number, columns
        if place not in self._groups:
            file = self.file(key, source)
            large = file.metadata.row_group(number).total_byte_size > LARGE  # else threads take longer to start
            group = file.read_row_group(number, columns=list(columns), use_threads=large).combine_chunks()
            self._bytes += group.get_total_buffer_size()
            while self._groups and self._bytes > BYTES_KEPT:
                self._bytes -= self._groups.popitem(last=False)[1].get_total_buffer_size()
            self._groups[place] = group
        self._groups.move_to_end(place)
        return self._groups[place]


class Shard:
    """One file of a store, or a buffer.

    Args:
        source: the file, or the buffer.
        recent: what the shards of its store keep open and in memory; by default it keeps its own.
    """

    def __init__(self, source: Path | pa.Buffer, recent: Recent | None = None) -> None:
        self.source, self.recent = source, recent or Recent()
        self._key = object()  # not the shard itself: it holds `recent`, and would not be freed at once

    def __reduce__(self) -> tuple[Any, ...]:  # to another process, without open files and row groups
        return Shard, (self.source, self.recent)

    @property
    def file(self) -> pq.ParquetFile:
        return self.recent.file(self._key, self.source)

    @cached_property
    def starts(self) -> np.ndarray:
        """The first row of each row group, and the number of rows."""
        metadata = self.file.metadata
        return np.cumsum([0, *(metadata.row_group(n).num_rows for n in range(metadata.num_row_groups))])

    @cached_property
    def names(self) -> list[str]:
        return list(self.file.schema_arrow.names)

    @property
    def name(self) -> str:
        return self.source.name if isinstance(self.source, Path) else "memory"

    @property
    def digest(self) -> str | None:
        """The checksum noted when the file was written, or of the buffer."""
        return read_checksum(self.source) if isinstance(self.source, Path) else sha256(self.source).hexdigest()

    @property
    def notes(self) -> dict[str, Any]:
        return json.loads(self.file.schema_arrow.metadata[NOTES])

    def column(self, name: str) -> pa.ChunkedArray:
        return self.file.read(columns=[name]).column(name)

    def rows(self, places: Iterable[int], columns: tuple[str, ...]) -> pa.Table:
        """Return these columns of some rows, in the order of `places`."""
        slices = []
        for place in places:
            group = int(np.searchsorted(self.starts, place, side="right")) - 1
            table = self.recent.group(self._key, self.source, group, columns)
            slices.append(table.slice(place - self.starts[group], 1))
        return pa.concat_tables(slices)
