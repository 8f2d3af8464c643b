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
GROUPS_KEPT = 32
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


def memory_shard(columns: ShardColumns, notes: dict[str, Any]) -> "Shard":
    """Return a shard that is in memory, with the bytes that its file would have."""
    sink = pa.BufferOutputStream()
    _write_table(sink, columns, notes)
    return Shard(sink.getvalue())


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


class Shard:
    """One file of a store, or a buffer. Only the row groups that were read last stay in memory."""

    def __init__(self, source: Path | pa.Buffer) -> None:
        self.source = source
        self._groups: OrderedDict[tuple[int, tuple[str, ...]], pa.Table] = OrderedDict()

    def __reduce__(self) -> tuple[Any, ...]:  # to another process, without open files and row groups
        return Shard, (self.source,)

    @cached_property
    def file(self) -> pq.ParquetFile:
        return pq.ParquetFile(self.source, memory_map=isinstance(self.source, Path))

    @cached_property
    def starts(self) -> np.ndarray:
        """The first row of each row group, and the number of rows."""
        groups = range(self.file.num_row_groups)
        return np.cumsum([0, *(self.file.metadata.row_group(n).num_rows for n in groups)])

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
            slices.append(self._group(group, columns).slice(place - self.starts[group], 1))
        return pa.concat_tables(slices)

    def _group(self, number: int, columns: tuple[str, ...]) -> pa.Table:
        key = (number, columns)
        if key not in self._groups:
            while len(self._groups) >= GROUPS_KEPT:
                self._groups.popitem(last=False)
            self._groups[key] = self.file.read_row_group(number, columns=list(columns)).combine_chunks()
        self._groups.move_to_end(key)
        return self._groups[key]
