"""Token distributions of a teacher with another tokenizer, in the student's tokens and at the student's states."""

from collections.abc import Mapping

import numpy as np

from prefdistill.models.token_map import TokenMap
from prefdistill.signals.topk import TopK

SHARES = ("taught", "exact", "start", "unmapped", "rest")  # what `in_words` says


def project(states: TopK, ids: np.ndarray) -> TopK:
    r"""Return distributions over a teacher's tokens as distributions over a student's.

    .. math:: p'(b) = \sum_{a: f(a) = b} p(a), \qquad \bar p' = \bar p + \sum_{a: f(a) = \emptyset} p(a)

    The mass of all tokens that go to one token is summed; that of tokens that go nowhere joins the rest, so that the
    mass of a state stays 1. The most likely token comes first.

    Args:
        states: of the teacher.
        ids: f, the student's token by the teacher's id, -1 where there is none; `TokenMap.ids`.

    Source: the matrix of X-Token (arXiv 2605.21699) with all the weight of a token on the first that writes it.

    Example:
        >>> import numpy as np
        >>> from prefdistill.signals.topk import TopK
        >>> states = TopK(np.array([[0, 1, 2]]), np.log([[0.5, 0.25, 0.125]]), np.log([0.125]))
        >>> student = project(states, np.array([7, 9, 7]))
        >>> student.ids, np.exp(student.logps).round(3)
        (array([[7, 9]]), array([[0.625, 0.25 ]]))
    """
    n, k = states.ids.shape
    mapped = np.where(states.ids >= 0, ids[states.ids], -1)
    order = mapped.argsort(axis=1, kind="stable")
    mapped = np.take_along_axis(mapped, order, axis=1)
    starts = np.flatnonzero(np.diff(mapped, axis=1, prepend=-2))  # of each token's run within its state
    mass = np.take_along_axis(states.logps, order, axis=1).astype(np.float64).ravel()
    mass = np.logaddexp.reduceat(mass, starts)
    state, token, place = starts // k, mapped.ravel()[starts], order.ravel()[starts]
    nowhere = token < 0
    rest = states.rest.astype(np.float64)
    rest[state[nowhere]] = np.logaddexp(rest[state[nowhere]], mass[nowhere])
    likeliest_first = np.lexsort((place[~nowhere], -mass[~nowhere], state[~nowhere]))
    counts = np.bincount(state[~nowhere], minlength=n)
    filled = np.arange(max(1, counts.max(initial=0))) < counts[:, None]
    projected = TopK(
        np.full(filled.shape, -1, states.ids.dtype),
        np.full(filled.shape, -np.inf, states.logps.dtype),
        rest.astype(states.rest.dtype),
    )
    projected.ids[filled] = token[~nowhere][likeliest_first]
    projected.logps[filled] = mass[~nowhere][likeliest_first]
    return projected


def at_states(states: TopK, places: np.ndarray) -> TopK:
    """Return the distributions at some places among the states, [m]; at -1 no tokens and the rest 1, which teaches
    nothing: its divergence is 0, and so is the gradient.

    Example:
        >>> import numpy as np
        >>> from prefdistill.signals.topk import TopK
        >>> states = TopK(np.array([[3], [5]]), np.log([[0.5], [0.25]]), np.log([0.5, 0.75]))
        >>> at_states(states, np.array([1, -1])).ids.tolist()
        [[5], [-1]]
    """
    nothing = places < 0
    ids, logps, rest = (part[places] for part in (states.ids, states.logps, states.rest))
    ids[nothing], logps[nothing], rest[nothing] = -1, -np.inf, 0.0
    return TopK(ids, logps, rest)


def mass_shares(states: TopK, tokens: TokenMap) -> dict[str, np.ndarray]:
    """Return the mass of each state that has tokens, [n] each: on tokens that go to one of the same text, to the start
    of their text, nowhere, and outside the stored ones.

    Example:
        >>> import numpy as np
        >>> from prefdistill.models.token_map import TokenMap
        >>> from prefdistill.signals.topk import TopK
        >>> states = TopK(np.array([[0, 1]]), np.log([[0.5, 0.25]]), np.log([0.25]))
        >>> mass_shares(states, TokenMap(np.array([7, -1]), np.array([True, False])))
        {'exact': array([0.5]), 'start': array([0.]), 'unmapped': array([0.25]), 'rest': array([0.25])}
    """
    some = (states.ids >= 0).any(1)
    ids, mass = states.ids[some], np.exp(states.logps[some])
    known, at = ids >= 0, ids.clip(min=0)
    mapped, exact = known & (tokens.ids[at] >= 0), known & tokens.exact[at]
    parts = {"exact": exact, "start": mapped & ~exact, "unmapped": known & ~mapped}
    return {name: (mass * part).sum(1) for name, part in parts.items()} | {"rest": np.exp(states.rest[some])}


def in_words(shares: Mapping[str, float]) -> str:
    """Return the sentence about what a projection loses.

    Args:
        shares: "taught", of the student's states, and those of `mass_shares` there.

    Example:
        >>> in_words({"taught": 0.9, "exact": 0.8, "start": 0.1, "unmapped": 0.0, "rest": 0.1})
        "90.0 % of the student's states are taught; of the teacher's mass there 80.0 % is on a token of the same text, \
10.0 % on the start of its text, 0.0 % on tokens without a place, 10.0 % outside the stored tokens"
    """
    percent = {name: f"{100 * share:.1f} %" for name, share in shares.items()}
    return (
        f"{percent['taught']} of the student's states are taught; of the teacher's mass there {percent['exact']} is on "
        f"a token of the same text, {percent['start']} on the start of its text, {percent['unmapped']} on tokens "
        f"without a place, {percent['rest']} outside the stored tokens"
    )
