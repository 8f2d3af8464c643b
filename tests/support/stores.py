"""Signal stores in memory, from rows."""

from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from prefdistill.data.encode import encode_pairs
from prefdistill.data.fingerprint import data_fingerprint
from prefdistill.data.spans import read_spans
from prefdistill.data.truncation import Truncation
from prefdistill.models.identity import tokenizer_identity
from prefdistill.signals import Signals
from prefdistill.signals.ids import Ids
from prefdistill.signals.kinds import Settings, make_kinds
from prefdistill.signals.request import finished_manifest, shard_columns
from prefdistill.signals.shards import Shard, memory_shard
from prefdistill.signals.store import SCHEMA

if TYPE_CHECKING:
    from datasets import Dataset
    from transformers import PreTrainedTokenizerBase


def store_by_hand(manifest: dict[str, Any], rows: list[dict[str, Any]]) -> Signals:
    file = pa.BufferOutputStream()
    pq.write_table(pa.Table.from_pylist(rows), file)
    return Signals({"positions": "all", **manifest}, [Shard(file.getvalue())])


def random_store(
    data: "Dataset",
    tokenizer: "PreTrainedTokenizerBase",
    kinds: tuple[str, ...] = ("values", "logps", "token_logps"),
    *,
    role: str = "teacher",
    responses: tuple[str, ...] = ("chosen", "rejected"),
    truncation: Truncation | None = None,
    shard_rows: int = 1_000,
    seed: int = 0,
    **settings: Any,
) -> Signals:
    """A store as `extract_signals` writes it, with random numbers in place of a model's."""
    truncation, random = truncation or Truncation(None), np.random.default_rng(seed)
    chosen_kinds = make_kinds(kinds, Settings(**settings))
    shards = []
    for start in range(0, len(data), shard_rows):
        part = range(start, min(start + shard_rows, len(data)))
        rows, dropped = encode_pairs(data, tokenizer, truncation, responses=responses, rows=part)
        scores = {}
        for name in responses:
            for kind in chosen_kinds:
                for column in kind.collected:
                    final = kind.has_final_state
                    ragged = kind.columns[column].ragged
                    scores[f"{name}_{column}"] = [
                        random.normal(size=len(ids) + final).astype(np.float32)
                        if ragged
                        else np.float32(random.normal())
                        for ids in rows[f"{name}_ids"][:]
                    ]
        ids, spans = Ids.of(rows, responses), read_spans(rows, data, tokenizer, responses)
        columns, _ = shard_columns(rows, ids, spans, scores, chosen_kinds)
        notes = {
            "kept": len(rows),
            "truncated": {},
            "rows": sorted(set(part).difference(rows["row"][:])),
            "dropped": dropped.counts,
            "first_rows": dropped.first_rows,
            "ids_sha256": ids.sha256,
            "kl_error": {"sum": 0, "max": 0, "states": 0},
        }
        shards.append(memory_shard(columns, notes))
    request = {
        "schema": SCHEMA,
        "role": role,
        "kinds": sorted(kinds),
        "responses": [*responses],
        **({"positions": "all", "value_dtype": "float32", "value_temperature": 1.0, "topk": {}} | settings),
        "model": {"bf16": False},
        "tokenizer": tokenizer_identity(tokenizer),
        "data": {"name": "random", "rows": len(data), "fingerprint": data_fingerprint(data, responses)},
        "truncation": vars(truncation),
        "batch_tokens": 1_024,
    }
    return Signals(finished_manifest(request, shards)[0], shards)
