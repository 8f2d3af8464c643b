"""A teacher's signals in the states of a student with another tokenizer.

    signals = align(store, encoded, data, tokenizer)

What is a number of a whole response stays as it is. What is a number of a state holds from one state that both
tokenisations share to the next, so psi, a difference of values, has the same sum. What is a number of a token is summed
over the tokens between two shared states. `Column.across` says which it is.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from prefdistill.core.errors import UserError
from prefdistill.data.encode import encode_pairs
from prefdistill.data.spans import REASONS, Spans, read_spans, response_text
from prefdistill.data.truncation import Dropped
from prefdistill.models.identity import tokenizer_identity
from prefdistill.signals.alignment import Alignment, States
from prefdistill.signals.ids import Ids
from prefdistill.signals.kinds import Kind, make_kinds
from prefdistill.signals.projected import STATE, TOPK_STATE, ProjectedSignals, taught_states
from prefdistill.signals.shards import ROW, Recent, Shard, memory_shard, response_columns
from prefdistill.signals.store import Signals

if TYPE_CHECKING:
    from datasets import Dataset
    from transformers import PreTrainedTokenizerBase

    from prefdistill.data.truncation import Truncation
    from prefdistill.models.token_map import TokenMap

CUT_ELSEWHERE = "the teacher's tokens and the student's truncate a response at different characters"
EMPTY = "a response has no tokens before its end for the student, and some for the teacher"
ENDS_DIFFER = "a response has its end token for one of teacher and student only"


@dataclass(frozen=True)
class EncodedTexts:
    """Encoded pairs, with the places of their texts.

    Args:
        encoded, dropped: what `encode_pairs` returns.
        data: the rows that it counts.
        spans: of each response, see `data.spans.read_spans`.
    """

    encoded: Dataset
    dropped: Dropped
    data: Dataset
    spans: Mapping[str, Spans]

    @classmethod
    def of(
        cls, data: Dataset, tokenizer: PreTrainedTokenizerBase, truncation: Truncation, responses: tuple[str, ...]
    ) -> EncodedTexts:
        """Encode the responses of pairs, and find the places of their texts."""
        encoded, dropped = encode_pairs(data, tokenizer, truncation, responses=responses)
        return cls(encoded, dropped, data, read_spans(encoded, data, tokenizer, responses))

    def spans_at(self, name: str, places: np.ndarray) -> Spans:
        """Return the spans of one response of some encoded rows."""
        return Spans(self.spans[name].start[places], self.spans[name].end[places])


def align(
    store: Signals,
    texts: EncodedTexts,
    tokenizer: PreTrainedTokenizerBase,
    truncation: Truncation,
    tokens: TokenMap | None = None,
) -> tuple[Signals, dict[int, str]]:
    """Return a teacher's store in the states of a student's tokens, in memory, and why it cannot serve other rows.

    Kinds of one tokenizer only are left out: "topk", unless `tokens` says where its tokens go.

    Args:
        store: extracted with another tokenizer or chat template.
        texts: the student's pairs.
        tokenizer, truncation: those of the student's pairs.
        tokens: where the teacher's tokens go in the student's vocabulary.

    Raises:
        UserError: if the store has no places in the text, or no row is left.
    """
    if not {f"{name}_text_end" for name in store.responses} <= set(store.columns):
        raise UserError(
            f"the {store.role} signals ({store.place}) are of another tokenizer than the student's, and of an older "
            "version, without places in the text: delete them and extract them again with `prefdistill signals`"
        )
    kinds = [kind for kind in make_kinds(store.kinds, store.settings) if not kind.needs_same_tokens]
    rows, same = np.asarray(texts.encoded["row"][:]), store.has_tokens_of(tokenizer)
    reasons = {row: reason for row, (reason, _) in unserved(store, texts).items()}
    fits = ~np.isin(rows, [*reasons])
    shards: list[Shard] = []
    shared, recent = np.zeros(2), Recent()
    for shard in store.shards:
        part = Signals(store.manifest, [shard], store.place)
        places = np.flatnonzero(fits & np.isin(rows, part.rows))
        if len(places):
            columns, counts = _aligned_columns(part, texts, places, kinds, same_tokenizer=same, topk=tokens is not None)
            shards.append(memory_shard(columns, {}, recent))
            shared += counts
    dropped = Dropped({}, {}).with_rows(reasons)
    if not shards:
        raise UserError(f"no row of the {store.role} signals ({store.place}) fits the student's tokens: {dropped}")
    served = {row for shard in shards for row in shard.column("row").to_pylist()}
    manifest = {
        **store.manifest,
        "kinds": [*(kind.name for kind in kinds), *(["topk"] if tokens else [])],
        "tokenizer": tokenizer_identity(tokenizer),
        "truncation": {"max_length": truncation.max_length, "max_prompt_length": truncation.max_prompt_length},
        "dropped": {
            "reasons": {**store.manifest["dropped"]["reasons"], **dropped.counts},
            "rows": sorted({*range(len(store))} - served),
        },
        "aligned": {
            "tokenizer": store.manifest["tokenizer"],
            "shared": float(shared[0] / shared[1]) if shared[1] else None,
        },
        "shards": [{"file": shard.name, "rows": shard.starts[-1].item(), "sha256": shard.digest} for shard in shards],
    }
    if tokens is not None:
        return ProjectedSignals(manifest, shards, store, tokens), reasons
    return Signals(manifest, shards, store.place), reasons


def unserved(store: Signals, texts: EncodedTexts) -> dict[int, tuple[str, str]]:
    """Return why rows that a store and the student both have cannot be served: row -> the reason and the response."""
    import pyarrow.compute as pc

    rows = np.asarray(texts.encoded["row"][:])
    places = np.flatnonzero(np.isin(rows, store.rows))
    rows = rows[places]
    reasons: dict[int, tuple[str, str]] = {}
    for name in store.responses:
        of_store, of_student = _spans(store, name, rows), texts.spans_at(name, places)
        for at in np.flatnonzero((of_store.end < 0) | (of_student.end < 0)):
            reasons.setdefault(int(rows[at]), (REASONS[min(of_store.end[at], of_student.end[at])], name))
        lengths = _length(of_store), _length(of_student)
        read = np.minimum(*lengths)
        for at in np.flatnonzero((lengths[0] != lengths[1]) | (read == 0)):
            text = response_text(texts.data[int(rows[at])][name]) or ""
            if text[read[at] :].strip():  # else one template strips the text
                reasons.setdefault(int(rows[at]), (CUT_ELSEWHERE, name))
        ended = np.array(texts.encoded[f"{name}_ended"][:], dtype=bool)[places]
        for at in np.flatnonzero(store.scalar(f"{name}_ended", rows) != ended):
            reasons.setdefault(int(rows[at]), (ENDS_DIFFER, name))
        tokens = texts.encoded.select_columns(f"{name}_ids").with_format("arrow")[places][f"{name}_ids"]
        empty = pc.list_value_length(tokens).to_numpy() == ended
        for at in np.flatnonzero(empty & (store.scalar(f"{name}_tokens", rows) > ended)):
            reasons.setdefault(int(rows[at]), (EMPTY, name))
    return reasons


def _aligned_columns(
    store: Signals, texts: EncodedTexts, places: np.ndarray, kinds: list[Kind], *, same_tokenizer: bool, topk: bool
) -> tuple[dict[str, Any], tuple[int, int]]:
    """Return the columns of the student's rows at `places`, with the store's signals; of the states how many are
    shared, and all.
    """
    encoded = texts.encoded.select(places)
    ids = Ids.of(encoded, store.responses)
    columns: dict[str, Any] = {"row": (ROW, ids.rows)}
    shared = states = 0
    for name in store.responses:
        spans = texts.spans_at(name, places)
        every_state = f"{name}_offsets" in store.columns
        columns |= response_columns(name, encoded, ids.lengths[name], ids.checks[name], spans, offsets=every_state)
        alignment: Alignment | None = None
        if every_state:
            student, teacher = states_of(store, name, encoded, spans, ids.rows)
            alignment = Alignment.of(student, teacher, same_tokenizer=same_tokenizer)
            shared, states = shared + int(alignment.shared.sum()), states + len(alignment.shared)
            if topk:
                columns[f"{name}_{TOPK_STATE}"] = (STATE, taught_states(student, teacher, alignment))
        for kind in kinds:
            for column, spec in kind.columns.items():
                stored = kind.column_name(column, name)
                if spec.across == "same":
                    read = store.ragged if spec.ragged else store.scalar
                    columns[stored] = (spec, read(stored, ids.rows))
                else:
                    assert alignment is not None
                    map_numbers = _held if spec.across == "hold" else _summed
                    numbers = store.ragged(stored, ids.rows)
                    columns[stored] = (spec, map_numbers(numbers, alignment, student, teacher))
    return columns, (shared, states)


def states_of(store: Signals, name: str, encoded: Dataset, spans: Spans, rows: np.ndarray) -> tuple[States, States]:
    """Return the states of the student and of the store, of one response of these rows."""
    of_store = _spans(store, name, rows)
    lengths = np.minimum(_length(spans), _length(of_store))
    offsets = [np.array(ends, dtype=np.int64) for ends in encoded[f"{name}_offsets"][:]]
    return (
        States.of(offsets, spans, np.array(encoded[f"{name}_ended"][:], dtype=bool), lengths),
        States.of(store.ragged(f"{name}_offsets", rows), of_store, store.scalar(f"{name}_ended", rows), lengths),
    )


def _held(numbers: list[np.ndarray], alignment: Alignment, student: States, teacher: States) -> list[np.ndarray]:
    """Return for each of the student's states the number of the teacher's state that it last shared.

    The numbers are of s_0 .. s_T, or of s_0 .. s_{T-1}.
    """
    final = len(numbers[0]) > teacher.lengths[0]
    flat = np.concatenate(numbers if final else [np.append(part, part[-1:]) for part in numbers])[alignment.index]
    split = np.split(flat, student.starts[1:])
    return split if final else [part[:-1] for part in split]


def _summed(numbers: list[np.ndarray], alignment: Alignment, student: States, teacher: States) -> list[np.ndarray]:
    """Return for each of the student's tokens the sum over the teacher's tokens between the states it lies between."""
    after_token = np.ones(len(teacher.places), dtype=bool)
    after_token[teacher.starts] = False
    reached = np.searchsorted(alignment.index, np.flatnonzero(after_token))  # the student's state after each token
    sums = np.bincount(reached, np.concatenate(numbers), minlength=len(student.places))
    return [part[1:] for part in np.split(sums, student.starts[1:])]


def _spans(store: Signals, name: str, rows: np.ndarray) -> Spans:
    return Spans(store.scalar(f"{name}_text_start", rows), store.scalar(f"{name}_text_end", rows))


def _length(spans: Spans) -> np.ndarray:
    """Return how many characters of the text were read."""
    return np.maximum(spans.end.astype(np.int64) - spans.start, 0)
