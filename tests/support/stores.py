"""Signal stores in memory, from rows."""

from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from prefdistill.signals import Signals
from prefdistill.signals.shards import Shard


def store_by_hand(manifest: dict[str, Any], rows: list[dict[str, Any]]) -> Signals:
    file = pa.BufferOutputStream()
    pq.write_table(pa.Table.from_pylist(rows), file)
    return Signals({"positions": "all", **manifest}, [Shard(file.getvalue())])
