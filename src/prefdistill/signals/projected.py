"""A teacher's "topk" signals for a student with other tokens, projected as they are read."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property
from typing import TYPE_CHECKING, Any

import numpy as np

from prefdistill.core.errors import UserError
from prefdistill.data.template import template_ending
from prefdistill.models.token_map import TokenMap, first_tokens
from prefdistill.models.vocabulary import stored_tokenizer
from prefdistill.signals.alignment import Alignment, States
from prefdistill.signals.kinds import Column
from prefdistill.signals.projection import at_states, mass_shares, project
from prefdistill.signals.shards import Shard
from prefdistill.signals.store import Signals
from prefdistill.signals.topk import TopK

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

TOPK_STATE = "topk_state"
STATE = Column("int32", ragged=True)
MEASURED = 64  # rows of which the mass is measured


class ProjectedSignals(Signals):
    """A teacher's signals in the student's states, with its "topk" in the student's tokens.

    Args:
        manifest, shards: as of `Signals`; the shards have `RESPONSE_topk_state`, see `taught_states`.
        source: the teacher's store.
        tokens: where its tokens go.
    """

    def __init__(self, manifest: dict[str, Any], shards: Sequence[Shard], source: Signals, tokens: TokenMap) -> None:
        super().__init__(manifest, shards, source.place)
        self.source, self.tokens = source, tokens

    def topk(self, response: str, rows: np.ndarray, ids_from: Signals | None = None) -> TopK:
        return project(self._of_source(response, rows), self.tokens.ids)

    def _of_source(self, response: str, rows: np.ndarray) -> TopK:
        """Return the teacher's distributions over its own tokens, at the student's states."""
        lengths = self.source.scalar(f"{response}_tokens", rows).astype(np.int64)
        starts = np.repeat(np.cumsum(lengths) - lengths, self.scalar(f"{response}_tokens", rows))
        states = self.flat(f"{response}_{TOPK_STATE}", rows)
        return at_states(self.source.topk(response, rows), np.where(states >= 0, states + starts, -1))

    @cached_property
    def shares(self) -> dict[str, float]:
        """The share of the student's states that is taught, and there the `mass_shares` of the first rows.

        Raises:
            UserError: if none is.
        """
        taught = np.concatenate([self.flat(f"{name}_{TOPK_STATE}", self.rows) for name in self.responses]) >= 0
        if not taught.any():
            raise UserError(
                f"the {self.role} signals ({self.place}) teach no state of the student's: the two split the texts at "
                "no common place; leave `across` out, and use a method on numbers of whole texts"
            )
        mass = [mass_shares(self._of_source(name, self.rows[:MEASURED]), self.tokens) for name in self.responses]
        means = {name: np.concatenate([part[name] for part in mass]) for name in mass[0]}
        return {"taught": float(taught.mean())} | {name: float(x.sum() / max(1, len(x))) for name, x in means.items()}


def taught_states(student: States, teacher: States, alignment: Alignment) -> list[np.ndarray]:
    """Return for s_0 .. s_{T-1} of each of the student's responses the teacher's state to learn from, counted from the
    start of its response; -1 where there is none.

    That is the state both share, if the student's next token ends within the teacher's. Else the teacher's mass would
    stand on the start of the token that the student writes.

    Example:
        >>> import numpy as np
        >>> from prefdistill.data.spans import Spans
        >>> from prefdistill.signals.alignment import Alignment, States
        >>> spans = Spans(np.array([0]), np.array([6]))
        >>> student, teacher = (States.of([np.array(ends)], spans, np.array([True]), np.array([6])) for ends in
        ...                     ([2, 3, 6, 9], [3, 5, 6, 9]))             # at 3 the student's token is longer
        >>> taught_states(student, teacher, Alignment.of(student, teacher))
        [array([ 0, -1, -1,  3])]
    """
    response = np.repeat(np.arange(len(student.lengths)), student.lengths + 1)
    teacher_state = alignment.index - teacher.starts[response]
    place, following, teacher_following = student.places, _next(student.places), _next(teacher.places)[alignment.index]
    # of tokens that end at one place the last one reaches it, those before end inside a character
    reaches, teacher_reaches = _next(student.boundaries()), _next(teacher.boundaries())[alignment.index]
    within = (following < teacher_following) | ((following == teacher_following) & (teacher_reaches | ~reaches))
    # a token without text, such as one that a template writes before the response, goes with one of the same kind
    within &= (following > place) | (teacher_following == place)
    taught = np.where(alignment.shared & within, teacher_state, -1)
    return [part[:-1] for part in np.split(taught, student.starts[1:])]


def _next(per_state: np.ndarray) -> np.ndarray:
    """Return for each state what the next one has; for the last of all what it has itself."""
    return np.append(per_state[1:], per_state[-1:])


def token_map(store: Signals, student: PreTrainedTokenizerBase, *, plain: bool) -> TokenMap:
    """Return where the tokens of a teacher's store go in the student's vocabulary.

    Args:
        store: of the teacher.
        student: the student's tokenizer.
        plain: whether the data are text, whose responses end with EOS, or conversations.

    Raises:
        UserError: if the store's tokenizer cannot be loaded or has changed, or there is no such map.
    """
    teacher = store.tokenizer or _stored_tokenizer(store)

    def end_of(tokenizer: PreTrainedTokenizerBase) -> int | None:
        token = None if plain else template_ending(tokenizer).token
        return tokenizer.eos_token_id if token is None else token

    return first_tokens(teacher, student, {end_of(teacher): end_of(student)})


def _stored_tokenizer(store: Signals) -> PreTrainedTokenizerBase:
    """Load the tokenizer that a store names, in the store's form."""
    stored = store.manifest["tokenizer"]
    of = f"the tokenizer of the {store.role} signals ({store.place})"
    if not stored["name"]:
        raise UserError(f"{of} was in memory; its tokens are to be mapped: save it, and extract the signals with that")
    tokenizer = stored_tokenizer(stored)
    if not store.has_tokens_of(tokenizer):
        raise UserError(f"{of}, {stored['name']}, has changed since they were extracted; extract them again")
    return tokenizer
