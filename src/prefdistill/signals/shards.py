"""The files of a signal store: Parquet, written whole, each with a checksum beside it, read a few rows at a time."""

import json
from collections import OrderedDict
from collections.abc import Iterable, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from prefdistill.core.files import atomic_path, file_digest, write_text

# Bytes of a row group, the least that is read at once: small enough to pick single pairs out of a file of many.
GROUP_BYTES = 2**18
GROUPS_KEPT = 32
NOTES = b"prefdistill"
# How columns are stored, by the end of their names: type, and Parquet's encoding where the default is not the best.
TYPES: dict[str, tuple[pa.DataType, str | None]] = {
    "row": (pa.int64(), "DELTA_BINARY_PACKED"),
    "tokens": (pa.int32(), "DELTA_BINARY_PACKED"),
    "ended": (pa.bool_(), None),
    "offsets": (pa.list_(pa.int32()), "DELTA_BINARY_PACKED"),
    "gauge": (pa.list_(pa.float32()), None),
    "logps": (pa.float32(), None),
    "q": (pa.float32(), None),
    "start_value": (pa.float32(), None),
    "end_value": (pa.float32(), None),
    "values": (pa.list_(pa.float32()), "BYTE_STREAM_SPLIT"),
    "logprob_values": (pa.list_(pa.float32()), "BYTE_STREAM_SPLIT"),
    "topk_counts": (pa.list_(pa.int32()), None),
    "topk_ids": (pa.list_(pa.int32()), "DELTA_BINARY_PACKED"),
    "topk_logps": (pa.list_(pa.float32()), "BYTE_STREAM_SPLIT"),
    "topk_rest": (pa.list_(pa.float32()), "BYTE_STREAM_SPLIT"),
    "topk_levels": (pa.binary(), None),
    "topk_gap": (pa.list_(pa.float16()), "BYTE_STREAM_SPLIT"),
    "topk_span": (pa.list_(pa.float16()), "BYTE_STREAM_SPLIT"),
    "topk_odds": (pa.list_(pa.float16()), "BYTE_STREAM_SPLIT"),
}


def write_shard(path: Path, columns: dict[str, Sequence[Any]], notes: dict[str, Any]) -> None:
    """Write columns of rows, and some notes on how they were made, into a file that is whole or not there.

    Its checksum is written first, as sha256sum would: a file that does not fit it is not what was written. The type of
    a column goes by the end of its name (`TYPES`), where it is not an Arrow array already.
    """
    arrays: dict[str, pa.Array] = {}
    encodings: dict[str, str] = {}
    dictionaries: list[str] = []
    for name, values in columns.items():
        type_, encoding = TYPES[next(end for end in sorted(TYPES, key=len, reverse=True) if name.endswith(end))]
        array = arrays[name] = values if isinstance(values, pa.Array) else pa.array(values, type_)
        leaf = f"{name}.list.element" if pa.types.is_list(array.type) else name
        if name.endswith("topk_counts"):  # often the same number throughout
            dictionaries.append(leaf)
        elif encoding is not None and not pa.types.is_binary(array.type):
            encodings[leaf] = encoding
    table = pa.table(arrays).replace_schema_metadata({NOTES: json.dumps(notes).encode()})
    rows = max(1, round(GROUP_BYTES * table.num_rows / max(1, table.nbytes)))
    with atomic_path(path) as temporary:
        pq.write_table(
            table,
            temporary,
            compression="zstd",
            row_group_size=rows,
            use_dictionary=dictionaries,
            column_encoding=encodings,
            write_statistics=False,  # nobody searches these files by value
        )
        write_checksum(path, file_digest(temporary))


def checksum_file(shard: Path) -> Path:
    return shard.parent.parent / "checksums" / f"{shard.stem}.sha256"


def write_checksum(shard: Path, digest: str) -> None:
    write_text(checksum_file(shard), f"{digest}  {shard.parent.name}/{shard.name}\n")


def read_checksum(shard: Path) -> str | None:
    """What was noted when a shard was written; None where there is no such note that can be read."""
    try:
        line = checksum_file(shard).read_text(encoding="ascii")
    except (OSError, UnicodeDecodeError):
        return None
    digest = line.removesuffix(f"  {shard.parent.name}/{shard.name}\n")
    return digest if len(digest) == 64 and digest != line else None


def is_whole(shard: Path, digest: str | None = None) -> bool:
    """Whether a shard is there, with the checksum it should have: by default the one that was noted beside it."""
    digest = digest or read_checksum(shard)
    return digest is not None and shard.is_file() and file_digest(shard) == digest


class Shard:
    """One file of a store. Nothing of it stays in memory but the row groups that were read last."""

    def __init__(self, source: Path | pa.Buffer) -> None:
        self.source = source
        self._groups: OrderedDict[tuple[int, tuple[str, ...]], pa.Table] = OrderedDict()

    def __reduce__(self) -> tuple[Any, ...]:  # to another process: what is open or read stays here
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
    def notes(self) -> dict[str, Any]:
        return json.loads(self.file.schema_arrow.metadata[NOTES])

    def column(self, name: str) -> pa.ChunkedArray:
        return self.file.read(columns=[name]).column(name)

    def rows(self, places: Iterable[int], columns: tuple[str, ...]) -> pa.Table:
        """These columns of some rows, in the order asked for."""
        found = []
        for place in places:
            group = int(np.searchsorted(self.starts, place, side="right")) - 1
            found.append(self._group(group, columns).slice(place - self.starts[group], 1))
        return pa.concat_tables(found)

    def _group(self, number: int, columns: tuple[str, ...]) -> pa.Table:
        key = (number, columns)
        if key not in self._groups:
            while len(self._groups) >= GROUPS_KEPT:
                self._groups.popitem(last=False)
            self._groups[key] = self.file.read_row_group(number, columns=list(columns)).combine_chunks()
        self._groups.move_to_end(key)
        return self._groups[key]
