"""The tokens of a teacher with another tokenizer over the responses on the token view, from its stored offsets."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from prefdistill.data.columns import SIDES
from prefdistill.data.spans import response_text
from prefdistill.methods.tvkd import VALUES
from prefdistill.signals.aligned import EncodedTexts, states_of
from prefdistill.signals.alignment import Alignment

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from prefdistill.data.truncation import Truncation
    from prefdistill.report.packed import Pieces
    from prefdistill.signals.store import Signals, SignalSet

NO_ID = -1  # of a piece: a store has no ids of its tokens


@dataclass(frozen=True)
class OwnTokens:
    """A teacher's tokens, with the states that it shares with the student, by response and row.

    Args:
        tokenizer: its name.
        kind: of the values, None if the store has none of every state.
        pieces: of each token, as the page's table numbers them.
        shared: whether the student has the state after each token too.
        student_shared: whether the teacher has the state after each of the student's tokens too.
        values: V(s_0) .. V(s_T) as the teacher has them, before they are aligned.
    """

    tokenizer: str
    kind: str | None
    pieces: dict[str, list[np.ndarray]]
    shared: dict[str, list[np.ndarray]]
    student_shared: dict[str, list[np.ndarray]]
    values: dict[str, list[np.ndarray]]

    @classmethod
    def of(
        cls, store: Signals, shown: SignalSet, tokenizer: PreTrainedTokenizerBase, truncation: Truncation, table: Pieces
    ) -> OwnTokens:
        """Align a teacher's store with the rows on the page.

        Args:
            store: of the teacher, as it was extracted, with the offsets of its tokens.
            shown: the rows of the page.
            tokenizer, truncation: the student's.
            table: gets the pieces.
        """
        texts = EncodedTexts.of(shown.data, tokenizer, truncation, SIDES)
        at = np.flatnonzero(np.isin(texts.encoded["row"][:], shown.rows))
        encoded, rows = texts.encoded.select(at), shown.data.select(shown.rows)
        kind = next((kind for kind in VALUES.values() if kind in store.kinds), None)
        name = store.manifest["tokenizer"]["name"] or "in memory"
        own = cls(name, kind, _by_side(), _by_side(), _by_side(), _by_side())
        same = store.has_tokens_of(tokenizer)
        for side in SIDES:
            student, teacher = states_of(store, side, encoded, texts.spans_at(side, at), shown.rows)
            alignment = Alignment.of(student, teacher, same_tokenizer=same)
            shared = np.zeros(len(teacher.places), dtype=bool)
            shared[alignment.index[alignment.shared]] = True
            own.shared[side] += _after_tokens(shared, teacher.starts)
            own.student_shared[side] += _after_tokens(alignment.shared, student.starts)
            for response, places in zip(rows[side], np.split(teacher.places, teacher.starts[1:]), strict=True):
                ends = places[1:].tolist()
                own.pieces[side].append(table.number([NO_ID] * len(ends), response_text(response) or "", ends))
            if kind:
                own.values[side] += [np.asarray(v, np.float64) for v in store.ragged(f"{side}_{kind}", shown.rows)]
        return own

    def lengths(self, at: int) -> list[int]:
        """Return how many tokens each response of a row has."""
        return [len(self.pieces[side][at]) for side in SIDES]

    def about(self) -> dict[str, Any]:
        """Return what the page says of them."""
        flags = np.concatenate([part for side in SIDES for part in self.student_shared[side]])
        return {"tokenizer": self.tokenizer, "kind": self.kind, "shared": float(flags.mean())}


def _by_side() -> dict[str, list[np.ndarray]]:
    return {side: [] for side in SIDES}


def store_with_own_tokens(stores: Sequence[Signals], tokenizer: PreTrainedTokenizerBase) -> Signals | None:
    """Return the teacher's store whose tokens can be shown beside the student's, one with values if there is one."""
    able = [
        store
        for store in stores
        if store.role == "teacher"
        and not store.is_read_with(tokenizer)
        and all(f"{side}_offsets" in store.columns for side in SIDES)
    ]
    return max(able, key=lambda store: not set(store.kinds).isdisjoint(VALUES.values()), default=None)


def _after_tokens(per_state: np.ndarray, starts: np.ndarray) -> list[np.ndarray]:
    """Return what belongs to the states after the tokens of each response."""
    return [part[1:] for part in np.split(per_state, starts[1:])]
