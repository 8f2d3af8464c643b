"""Token distributions of a teacher with another tokenizer, in the student's tokens and at the student's states."""

import numpy as np

from prefdistill.models.token_map import TokenMap
from prefdistill.signals.topk import TopK


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
        >>> states = TopK(np.array([[3], [5]]), np.log([[0.5], [0.25]]), np.log([0.5, 0.75]))
        >>> at_states(states, np.array([1, -1])).ids.tolist()
        [[5], [-1]]
    """
    nothing = places < 0
    ids, logps, rest = (part[places] for part in (states.ids, states.logps, states.rest))
    ids[nothing], logps[nothing], rest[nothing] = -1, -np.inf, 0.0
    return TopK(ids, logps, rest)


def mass_shares(states: TopK, tokens: TokenMap) -> dict[str, float]:
    """Return the mean mass of a state on tokens that go to one of the same text, to the start of their text, nowhere,
    and on those that the signals do not name.

    Example:
        >>> states = TopK(np.array([[0, 1]]), np.log([[0.5, 0.25]]), np.log([0.25]))
        >>> mass_shares(states, TokenMap(np.array([7, -1]), np.array([True, False])))
        {'exact': 0.5, 'start': 0.0, 'unmapped': 0.25, 'rest': 0.25}
    """
    known, at = states.ids >= 0, states.ids.clip(min=0)
    mass, exact, mapped = np.exp(states.logps), tokens.exact[at] & known, (tokens.ids[at] >= 0) & known
    parts = {"exact": exact, "start": mapped & ~exact, "unmapped": known & ~mapped}
    shares = {name: float((mass * part).sum(1).mean()) for name, part in parts.items()}
    return shares | {"rest": float(np.exp(states.rest).mean())}
