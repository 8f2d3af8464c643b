"""Fingerprints of data sets: SHA-256 of what the rows say, the same for every file format."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from typing import TYPE_CHECKING
from weakref import WeakKeyDictionary

from prefdistill.data.columns import (
    SCORES,
    SIDES,
    TEMPLATE_COLUMNS,
    check_column,
    ended_column,
    ids_column,
    with_response,
)
from prefdistill.data.messages import normal_messages
from prefdistill.data.prompts import template_inputs

if TYPE_CHECKING:
    from datasets import Dataset

# Fingerprints of the data sets in memory, by object. `datasets` counts up `_fingerprint` where it changes one in place.
_COMPUTED: WeakKeyDictionary[Dataset, dict[tuple[str, ...], str]] = WeakKeyDictionary()


def data_fingerprint(dataset: Dataset, responses: Sequence[str] = SIDES) -> str:
    """Return the SHA-256 of the prompt, its template's other inputs, the responses and their scores of every row, in
    order.

    Columns that say whether a response has ended, and its sampled ids, count if they exist. Scores count if
    `responses` holds both sides of a pair. Computed once for each data set object.
    """
    computed, key = _COMPUTED.setdefault(dataset, {}), (str(dataset._fingerprint), *responses)
    if key not in computed:
        computed[key] = _digest(dataset, responses)
    return computed[key]


def demonstrations_fingerprint(demonstrations: Dataset) -> str:
    """Return the `data_fingerprint` of what `load_messages` returns."""
    computed, key = _COMPUTED.setdefault(demonstrations, {}), (str(demonstrations._fingerprint), "completion")
    if key not in computed:
        computed[key] = _digest(with_response(demonstrations, "completion", "chosen"), SIDES)
    return computed[key]


def _digest(dataset: Dataset, responses: Sequence[str]) -> str:
    digest = hashlib.sha256()
    columns = ("prompt", *responses)
    flags = [ended_column(name) for name in responses if ended_column(name) in dataset.column_names]
    scores = SCORES if set(SIDES) <= set(responses) else ()
    sampled = [f(name) for name in responses for f in (ids_column, check_column) if f(name) in dataset.column_names]
    for row in dataset.select_columns(
        [n for n in (*columns, *flags, *scores, *sampled, *TEMPLATE_COLUMNS) if n in dataset.column_names]
    ):
        texts = [normal_messages(row.get(name)) for name in columns]
        numbers = [None if row.get(name) is None else float(row[name]) for name in (*scores, *flags)]
        ids = [row[name] for name in sampled]
        inputs = [inputs] if (inputs := template_inputs(row)) else []
        digest.update(json.dumps(texts + numbers + ids + inputs, sort_keys=True).encode() + b"\n")
    return digest.hexdigest()
