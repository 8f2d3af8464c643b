"""Join the pairs of a student with stored signals, of its own tokens or of a teacher with other tokens."""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np

from prefdistill.core.errors import UserError
from prefdistill.core.progress import say_once
from prefdistill.data.encode import encode_pairs
from prefdistill.data.truncation import NO_SIGNALS, Dropped, Truncation
from prefdistill.signals.aligned import EncodedTexts, align
from prefdistill.signals.ids import Ids, check_ids
from prefdistill.signals.kinds import make_kinds
from prefdistill.signals.needs import TEACHERS, Need
from prefdistill.signals.projected import ProjectedSignals, token_map
from prefdistill.signals.projection import in_words
from prefdistill.signals.store import Signals, SignalSet

if TYPE_CHECKING:
    from datasets import Dataset
    from transformers import PreTrainedTokenizerBase

ONE_VOCABULARY = "token distributions can be compared over one vocabulary only"
OWN_TOKENS = (
    "its numbers are of the model's own tokens: if they may be held or summed where tokens differ, let the kind say so "
    "(`Column.across`)"
)
ACROSS = "across=first_token (vanillakd, dckd, distillm2)"
INSTEAD = (
    f"map the teacher's tokens to the student's with {ACROSS}, or use a method on numbers of whole texts: tvkd, dadpo, "
    "dpkd (level: sequence), seqkd"
)


@dataclass(frozen=True)
class Joined:
    """The pairs of a student with its signals.

    Args:
        signals: all stores, each in the student's states, for the rows of `encoded`.
        encoded: the pairs that are encoded and have all signals.
        dropped: the others.
        truncation: of the pairs.
        across: of a teacher with other tokens: "shared", the share of the student's states at which it has one too, and
            what its distributions lose, see `ProjectedSignals.shares`. Empty if there is none.
    """

    signals: SignalSet
    encoded: Dataset
    dropped: Dropped
    truncation: Truncation
    across: Mapping[str, float] = field(default_factory=dict)


def join(
    stores: Sequence[Signals],
    data: Dataset,
    tokenizer: PreTrainedTokenizerBase,
    truncation: Truncation | None = None,
    *,
    responses: tuple[str, ...],
    needs: Sequence[Need] = (),
) -> Joined:
    """Encode the pairs of a student and join them with stores, after checking that these belong to them.

    Args:
        stores: signals for these pairs. Those of a teacher may be of another tokenizer: they are aligned.
        data: the pairs.
        tokenizer: the student's.
        truncation: default: that of the signals, of the student's tokens if there are such.
        responses: columns of the data to encode.
        needs: what the signals are read for.

    Raises:
        UserError: if a store is of other data, tokens or truncation, no row has all signals, or a need is of a teacher
            with other tokens and of a kind that only means something to the same tokens.
    """
    for store in stores:
        SignalSet.of([store], data)  # which checks that it is of these data
    in_student_tokens = [store for store in stores if store.is_read_with(tokenizer)]
    in_other_tokens = [store for store in stores if store not in in_student_tokens]
    for store in in_other_tokens:
        if store.role not in TEACHERS:
            store.check_tokenizer(tokenizer)
        _check_needs(needs, store)
    if in_other_tokens and not in_student_tokens and truncation is None:
        truncation = Truncation(**in_other_tokens[0].manifest["truncation"])
    truncation = _shared_truncation(in_student_tokens, truncation)
    encoded, dropped = encode_pairs(data, tokenizer, truncation, responses=responses)
    reasons: dict[int, str] = {}
    aligned: list[Signals] = []
    across: dict[str, float] = {}
    texts_of = functools.cache(lambda responses: EncodedTexts.of(data, tokenizer, truncation, responses))
    for store in in_other_tokens:
        projected = any(need.across for need in needs if (need.role, need.kind) == (store.role, "topk"))
        tokens = token_map(store, tokenizer, plain=isinstance(data[0]["prompt"], str)) if projected else None
        in_student_states, unserved = align(store, texts_of(store.responses), tokenizer, truncation, tokens)
        if (shared := in_student_states.manifest["aligned"]["shared"]) is not None:
            across["shared"] = shared
        if isinstance(in_student_states, ProjectedSignals):
            across |= in_student_states.shares
        aligned.append(in_student_states)
        reasons = unserved | reasons
        say_once(_about(in_student_states))
    signals = SignalSet.of([*in_student_tokens, *aligned], data)
    ids = Ids.of(encoded, responses) if in_student_tokens else None
    for store in in_student_tokens:
        check_ids(store, encoded, tokenizer, ids)
    rows = np.asarray(encoded["row"][:])
    has_signals = np.isin(rows, signals.rows)
    if not has_signals.any():
        raise UserError("no row of the data has all the signals")
    if not has_signals.all():
        dropped = dropped.with_rows({int(row): reasons.get(int(row), NO_SIGNALS) for row in rows[~has_signals]})
        encoded = encoded.select(np.flatnonzero(has_signals))
    return Joined(signals.at(rows[has_signals]), encoded, dropped, truncation, across)


def _check_needs(needs: Sequence[Need], store: Signals) -> None:
    """Refuse to read a teacher of other tokens for a kind that is of its tokens."""
    for need in needs:
        if need.role == store.role and need.kind in store.kinds:
            (kind,) = make_kinds([need.kind], store.settings)
            if kind.needs_same_tokens and not need.across:
                why = f"{ONE_VOCABULARY}: {INSTEAD}" if need.kind == "topk" else OWN_TOKENS
                raise UserError(
                    f"the {store.role} signals ({store.place}) are of {_tokens_of(store)}, the method needs {need}, "
                    f"and {why}. If the two have the same vocabulary, extract these signals again with "
                    "`--tokenizer STUDENT`"
                )


def _shared_truncation(stores: Sequence[Signals], truncation: Truncation | None) -> Truncation:
    """Return the truncation of the first of the signals, or the requested one if there are none; refuse if the two
    differ. `SignalSet.of` compares the signals with each other."""
    if not stores:
        return truncation or Truncation()
    stored = Truncation(**stores[0].manifest["truncation"])
    if truncation not in (None, stored):
        raise UserError(
            f"the {stores[0].role} signals were made with {stored}, training asks for {truncation}; leave "
            "the lengths out, or extract the signals again with these"
        )
    return stored


def _about(store: Signals) -> str:
    share = store.manifest["aligned"]["shared"]
    shared = "" if share is None else f", which share {share:.0%} of the student's states"
    losses = f". Its distributions: {in_words(store.shares)}" if isinstance(store, ProjectedSignals) else ""
    return f"signals: the {store.role} signals ({store.place}) are of {_tokens_of(store)}{shared}{losses}"


def _tokens_of(store: Signals) -> str:
    name = store.manifest.get("aligned", store.manifest)["tokenizer"]["name"]
    return f"other tokens than the student's ({name or 'a tokenizer in memory'})"
