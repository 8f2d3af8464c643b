"""How the tokens of a teacher and of a student fit on some data, before any model is read."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from prefdistill.data.columns import SIDES
from prefdistill.data.truncation import NO_SIGNALS, Dropped
from prefdistill.models.identity import tokenizer_identity
from prefdistill.signals.aligned import EncodedTexts, align, unserved
from prefdistill.signals.ids import Ids
from prefdistill.signals.shards import ROW, memory_shard, response_columns
from prefdistill.signals.store import Signals

if TYPE_CHECKING:
    from datasets import Dataset
    from transformers import PreTrainedTokenizerBase

    from prefdistill.data.truncation import Truncation


@dataclass(frozen=True)
class Overlap:
    """The rows that a teacher with its own tokens can serve a student with, and the states that both share there.

    Args:
        rows: of the data.
        dropped: the rows that a training drops, with the student's own.
        unserved: rows that both read and whose places do not fit: row -> the reason and the response.
        shared: the share of the student's states at which the teacher has one too; None if no row is left.
    """

    rows: int
    dropped: Dropped
    unserved: Mapping[int, tuple[str, str]]
    shared: float | None

    @property
    def kept(self) -> int:
        """How many rows are left."""
        return self.rows - len(self.dropped)

    @classmethod
    def of(
        cls,
        data: Dataset,
        student: PreTrainedTokenizerBase,
        teacher: PreTrainedTokenizerBase,
        truncation: Truncation,
        responses: tuple[str, ...] = SIDES,
    ) -> Overlap:
        """Tokenise the pairs with both tokenizers, and align them as stored signals are.

        Raises:
            UserError: if one of the two can encode no row.
        """
        texts = EncodedTexts.of(data, student, truncation, responses)
        store = unscored(data, teacher, truncation, responses)
        reasons = unserved(store, texts)
        rows = texts.encoded["row"][:]
        lost = {row: reasons.get(row, (NO_SIGNALS, ""))[0] for row in sorted({*rows} - {*store.rows} | {*reasons})}
        left = len(rows) - len(lost)
        shared = align(store, texts, student, truncation)[0].manifest["aligned"]["shared"] if left else None
        return cls(len(data), texts.dropped.with_rows(lost), reasons, shared)


def unscored(
    data: Dataset, tokenizer: PreTrainedTokenizerBase, truncation: Truncation, responses: tuple[str, ...]
) -> Signals:
    """Return a teacher's store, in memory, with the places of its tokens and no signals."""
    texts = EncodedTexts.of(data, tokenizer, truncation, responses)
    ids = Ids.of(texts.encoded, responses)
    columns: dict[str, Any] = {"row": (ROW, ids.rows)}
    for name in responses:
        columns |= response_columns(
            name, texts.encoded, ids.lengths[name], ids.checks[name], texts.spans[name], offsets=True
        )
    manifest = {
        "role": "teacher",
        "kinds": [],
        "responses": list(responses),
        "tokenizer": tokenizer_identity(tokenizer),
        "data": {"rows": len(data)},
        "dropped": {"reasons": texts.dropped.counts, "rows": sorted({*range(len(data))} - {*ids.rows.tolist()})},
    }
    return Signals(manifest, [memory_shard(columns, {})])
