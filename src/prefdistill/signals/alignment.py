"""Which states of one tokenisation of a text mean the same as states of another.

A state is the text up to it. Two tokenisations of one response share the start of the response, every place between two
characters where both have a token boundary, the end of the text, and the state after the end token.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from prefdistill.data.spans import Spans


@dataclass(frozen=True)
class States:
    """The states s_0 .. s_T of n responses, one response after another, by their places in the text.

    Args:
        places: of each state, in characters of the response's text, [sum(T + 1)]: 0 at the start; the last state before
            the end token is one further than the text is long, the one after it two.
        lengths: T of each response, [n].
        ended: whether the response has its end token, [n].
    """

    places: np.ndarray
    lengths: np.ndarray
    ended: np.ndarray

    @classmethod
    def of(cls, offsets: Sequence[np.ndarray], spans: Spans, ended: np.ndarray, text_lengths: np.ndarray) -> States:
        """Return the states of tokens that end at `offsets`.

        Args:
            offsets: for each response where its tokens end, as `encode_pairs` has them.
            spans: where the texts of the responses stand in the same characters.
            ended: whether the responses have their end tokens, [n].
            text_lengths: characters of each text that are compared, [n].
        """
        lengths = np.array([len(ends) for ends in offsets], dtype=np.int64)
        ended = np.asarray(ended, dtype=bool)
        starts = np.cumsum(lengths + 1) - (lengths + 1)
        reached = np.zeros(int((lengths + 1).sum()), dtype=np.int64)
        after_token = np.ones(len(reached), dtype=bool)
        after_token[starts] = False
        reached[after_token] = np.concatenate(offsets) if len(offsets) else np.zeros(0)
        reached -= np.repeat(spans.start.astype(np.int64), lengths + 1)
        text_end = np.repeat(text_lengths, lengths + 1)
        last = np.repeat(reached[starts + lengths - ended], lengths + 1)
        # spaces after the text that the other's template strips, and what a template writes there, have no place
        places = np.where((reached > text_end) | (reached >= last), text_end + 1, np.maximum(reached, 0))
        places[(starts + lengths)[ended]] = text_lengths[ended] + 2
        places[starts] = 0  # also where nothing stands before the end token
        return cls(places, lengths, ended)

    @property
    def starts(self) -> np.ndarray:
        """The index of s_0 of each response in `places`, [n]."""
        return np.cumsum(self.lengths + 1) - (self.lengths + 1)

    def keys(self, width: int) -> np.ndarray:
        """Return numbers of the places that grow over all responses, given that no place reaches `width`."""
        return self.places + width * np.repeat(np.arange(len(self.lengths)), self.lengths + 1)

    def boundaries(self) -> np.ndarray:
        """Return whether each state is the one of its place, [states].

        Of several tokens that end at one place, the last reaches it: those before it end inside a character, or have
        no text. At the start it is s_0.
        """
        is_one = np.append(np.diff(self.places) != 0, True) & (self.places > 0)
        is_one[self.starts] = True
        return is_one


@dataclass(frozen=True)
class Alignment:
    """For each state of the student, [states]: the state of the teacher that it shares or last shared.

    Args:
        index: of that state among all states of the teacher's responses.
        shared: whether the two are at the same place.
    """

    index: np.ndarray
    shared: np.ndarray

    @classmethod
    def of(cls, student: States, teacher: States, *, same_tokenizer: bool = False) -> Alignment:
        """Align the states of the same responses.

        Args:
            student, teacher: the states of both.
            same_tokenizer: whether tokens that end at the same places are the same; then each state is its own. Other
                tokenizers may split a character, whose parts have no places, at other bytes.

        Example:
            >>> import numpy as np
            >>> from prefdistill.data.spans import Spans
            >>> spans = Spans(np.array([0]), np.array([5]))
            >>> states = [States.of([np.array(ends)], spans, np.array([True]), np.array([5])) for ends in
            ...           ([2, 3, 5, 8], [3, 4, 5, 8])]
            >>> Alignment.of(*states).index.tolist(), Alignment.of(*states).shared.tolist()
            ([0, 0, 1, 3, 4], [True, False, True, True, True])
        """
        width = int(max(student.places.max(initial=0), teacher.places.max(initial=0))) + 1
        student_keys, teacher_keys = student.keys(width), teacher.keys(width)
        boundaries, teacher_boundaries = student.boundaries(), np.flatnonzero(teacher.boundaries())
        common, _, which = np.intersect1d(
            student_keys[boundaries], teacher_keys[teacher_boundaries], assume_unique=True, return_indices=True
        )
        last = np.searchsorted(common, student_keys, side="right") - 1
        index, shared = teacher_boundaries[which[last]], boundaries & (common[last] == student_keys)
        if same_tokenizer and len(index):
            same = student.lengths == teacher.lengths
            of_student, of_teacher = (np.repeat(same, states.lengths + 1) for states in (student, teacher))
            differs = np.zeros(len(index), dtype=bool)
            differs[of_student] = student.places[of_student] != teacher.places[of_teacher]
            same &= ~np.logical_or.reduceat(differs, student.starts)
            of_student, of_teacher = (np.repeat(same, states.lengths + 1) for states in (student, teacher))
            index[of_student], shared[of_student] = np.flatnonzero(of_teacher), True
        return cls(index, shared)
