"""The packed format of token distributions: about 126 bytes for the top 50 of 128,256 tokens, instead of 400.

A state has c ids, most likely first, and one bucket for the rest of the mass. Three float16, in nats:

    gap   from the first id down to the second
    span  from the second down to the last, at most `SPAN`
    odds  the rest's mass over the first id's, as a logarithm; -inf where there is no rest

    log p(i) = top - drop(i),  drop = 0 for the first id, gap + span * u(1 + 4u)/5 for the others,  u = level / L
    log rest = top + odds,     top  = -log(sum_i exp(-drop(i)) + exp(odds)), so a decoded state sums to one

The remainder is a level in 0..L for each id. Levels never fall from one id to the next, so their order costs nothing:

    ids     the ids of all states of a response, one after another, `id_bits(vocabulary)` bits each
    levels  for each state a frame of c + L bits with a 1 at level + rank of each id; the first level is 0, the last L,
            so a frame starts and ends with a 1. L = 16c - 47, but at least 0 and at most 62 (from c = 7)

Both are bit streams, least significant bit first, padded with zeros to whole bytes at the end of each response.

Log-probabilities at the ids of another store are not sorted: there `gap` is absent, `span` goes from the likeliest of
the ids down to the least likely, `levels` has one byte for each id, and L = 255.

Reading it needs only numpy. The levels are closer together near the top, where errors count most; anything more than
`SPAN` below (e^-48 = 1e-21 of the mass) is decoded as if it were at `SPAN`.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import ArrayLike

SPAN = 48.0
ID_BITS = 25  # with the up to 7 bits before it in its first byte an id must fit in 32
MOST = 62  # levels above 0; with 50 ids a frame has 14 bytes
BYTE = 255
BEND = 4.0  # a smaller one costs divergence where a few ids share the mass, a larger one where many do
HALF = float(np.finfo(np.float16).max)


def _curve(u: np.ndarray) -> np.ndarray:
    """Map a level, as a share of L, to a drop, as a share of the span; both 0..1."""
    return u * (1 + BEND * u) / (1 + BEND)


def _nearest(share: np.ndarray, most: np.ndarray | int) -> np.ndarray:
    """Return the level in 0..most whose drop is nearest to a share of the span."""
    u = (np.sqrt(1 + 4 * BEND * (1 + BEND) * share) - 1) / (2 * BEND)
    below = np.floor(u * most)
    low, high = (_curve(level / np.maximum(most, 1)) for level in (below, below + 1))
    return (below + (share - low > high - share)).astype(np.int64)


_SHARES = _curve(np.arange(MOST + 1) / np.maximum(np.arange(MOST + 1), 1)[:, None]).astype(np.float32)  # [L, level]
_BYTE_SHARES = _curve(np.arange(BYTE + 1) / BYTE).astype(np.float32)


def id_bits(vocabulary: int) -> int:
    """Return the bits that an id of a vocabulary takes.

    Example:
        >>> id_bits(128256)
        17
    """
    return max(1, (vocabulary - 1).bit_length())


def pack_sorted(ids: ArrayLike, logps: ArrayLike, rest: ArrayLike, counts: ArrayLike, bits: int) -> dict[str, Any]:
    """Pack one response's distributions into columns: `ids` and `levels`, bytes; `gap`, `span` and `odds`, float16 [T].

    Args:
        ids, logps: [n], of all states one after another, most likely first in each; log-probabilities in nats.
        rest: log of the mass of all other ids, [T]; may be -inf.
        counts: how many ids each state has, [T], at least 1; they add up to n.
        bits: of an id, see `id_bits`.

    Raises:
        ValueError: on shapes that do not fit, ids that do not fit in the bits, or log-probabilities that are not
            finite, not sorted or do not sum to one with the rest.

    Example:
        >>> import numpy as np
        >>> packed = pack_sorted([7, 2], np.log([0.5, 0.25]), np.log([0.25]), [2], bits=3)
        >>> packed["ids"].hex(), packed["levels"].hex(), packed["odds"].tolist()    # 7 | 2 << 3, first and last
        ('17', '03', [-0.693359375])
    """
    logps, rest, counts, first = _checked(logps, rest, counts)
    ids = np.asarray(ids)
    if ids.shape != logps.shape or (ids.size and ids.dtype.kind not in "iu"):
        raise ValueError(f"ids must be whole numbers, one for each of the {len(logps)} log-probabilities")
    _check_bits(bits)
    if ids.size and not 0 <= ids.min() <= ids.max() < 1 << bits:
        raise ValueError(f"ids must lie in 0..{(1 << bits) - 1} to fit in {bits} bits, got {ids.min()}..{ids.max()}")
    last = first + counts - 1
    rises = np.diff(logps) > 0
    rises[last[:-1]] = False
    if rises.any():
        raise ValueError("log-probabilities must be sorted, most likely first in each state")

    drop = np.repeat(logps[first], counts) - logps
    gap = _half(drop[np.minimum(first + 1, last)])
    span = _half(np.clip(drop[last] - gap, 0, SPAN))
    most = _most(counts)
    levels = _nearest(_share(drop - np.repeat(gap.astype(np.float64), counts), span, counts), np.repeat(most, counts))
    levels[last], levels[first] = most, 0
    width = counts + most
    frames = np.zeros(width.sum(), np.uint8)
    frames[levels + np.arange(len(levels)) + np.repeat(np.cumsum(width) - width - first, counts)] = 1
    id_bytes = ids.astype("<u4").view(np.uint8).reshape(-1, 4)
    return {
        "ids": _bytes_of(np.unpackbits(id_bytes, axis=1, bitorder="little")[:, :bits]),
        "levels": _bytes_of(frames),
        "gap": gap,
        "span": span,
        "odds": _half(rest - logps[first]),
    }


def unpack_sorted(
    ids: Sequence[bytes],
    levels: Sequence[bytes],
    gap: ArrayLike,
    span: ArrayLike,
    odds: ArrayLike,
    counts: ArrayLike,
    states: ArrayLike,
    bits: int,
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Decode the distributions of R responses at once, each as `pack_sorted` takes it.

    Args:
        ids, levels: of each response, R each.
        gap, span, odds, counts: of all states, [S], one response after another.
        states: how many states each response has, [R]; they add up to S.
        bits: of an id, as they were packed.

    Returns:
        Ids [n], int32, log-probabilities [n] and the log of the rest's mass [S], float32.

    Raises:
        ValueError: if the parts do not fit each other: something was truncated, swapped or damaged.

    Example:
        >>> import numpy as np
        >>> packed = pack_sorted([7, 2], np.log([0.5, 0.25]), np.log([0.25]), [2], bits=3)
        >>> ids, logps, rest = unpack_sorted([packed["ids"]] * 2, [packed["levels"]] * 2,
        ...     *(np.tile(packed[name], 2) for name in ("gap", "span", "odds")), [2, 2], [1, 1], bits=3)
        >>> ids.tolist(), np.exp(logps).round(3).tolist()
        ([7, 2, 7, 2], [0.5, 0.25, 0.5, 0.25])
    """
    counts, states, first = _counted(counts, states)
    _check_bits(bits)
    gap, span, odds = _scalars(len(counts), gap, span, odds)
    last = first + counts - 1
    most = _most(counts)
    width = counts + most
    stream, padding = _joined("levels", levels, _by_response(width, states))
    ones = np.flatnonzero(np.unpackbits(stream, bitorder="little").view(bool))
    frame = np.cumsum(width) - width + np.repeat(padding, states)
    if len(ones) != counts.sum() or (ones[first] != frame).any() or (ones[last] != frame + width - 1).any():
        raise ValueError("levels are damaged: they are not those of these counts")
    # level = one - frame - rank, rank = place - first
    ones -= np.arange(len(ones))
    ones += np.repeat(first - frame + most * (MOST + 1), counts)
    drop = _SHARES.ravel().take(ones)
    drop *= np.repeat(span, counts)
    drop += np.repeat(gap, counts)
    drop[first] = 0

    each = _by_response(counts, states)
    stream, padding = _joined("ids", ids, each * bits)
    at = np.arange(0, len(drop) * bits, bits) + np.repeat(padding, each)
    stream = np.concatenate([stream, np.zeros(3, np.uint8)])
    words = np.ndarray(len(stream) - 3, "<u4", stream, strides=(1,))  # the 32 bits from each byte on
    decoded_ids = words.take(at >> 3) >> (at & 7).astype(np.uint32) & np.uint32((1 << bits) - 1)
    return decoded_ids.view(np.int32), *_normalised(drop, odds, counts, first)


def pack_unsorted(logps: ArrayLike, rest: ArrayLike, counts: ArrayLike) -> dict[str, Any]:
    """Pack one response's log-probabilities at another store's ids: `levels`, bytes; `span` and `odds`, float16 [T].

    Args and errors: as in `pack_sorted`, but in any order.

    Example:
        >>> import numpy as np
        >>> packed = pack_unsorted(np.log([0.25, 0.5]), np.log([0.25]), [2])
        >>> packed["levels"].hex(), packed["span"].tolist()
        ('ff00', [0.693359375])
    """
    logps, rest, counts, first = _checked(logps, rest, counts)
    top = np.maximum.reduceat(logps, first)
    drop = np.repeat(top, counts) - logps
    span = _half(np.minimum(np.maximum.reduceat(drop, first), SPAN))
    levels = _nearest(_share(drop, span, counts), BYTE)
    return {"levels": levels.astype(np.uint8).tobytes(), "span": span, "odds": _half(rest - top)}


def unpack_unsorted(
    levels: Sequence[bytes], span: ArrayLike, odds: ArrayLike, counts: ArrayLike, states: ArrayLike
) -> tuple[np.ndarray, np.ndarray]:
    """Decode the log-probabilities [n] and rests [S] of R responses at once; otherwise as `unpack_sorted`.

    Example:
        >>> import numpy as np
        >>> packed = pack_unsorted(np.log([0.25, 0.5]), np.log([0.25]), [2])
        >>> logps, rest = unpack_unsorted([packed["levels"]], packed["span"], packed["odds"], [2], [1])
        >>> np.exp(logps).round(3).tolist(), np.exp(rest).round(3).tolist()
        ([0.25, 0.5], [0.25])
    """
    counts, states, first = _counted(counts, states)
    span, odds = _scalars(len(counts), span, odds)
    stream, _ = _joined("levels", levels, _by_response(counts, states) * 8)
    if np.minimum.reduceat(stream, first).any():
        raise ValueError("levels are damaged: no id of a state is its most likely")
    drop = _BYTE_SHARES.take(stream)
    drop *= np.repeat(span, counts)
    return _normalised(drop, odds, counts, first)


def kl_error(
    logps: ArrayLike, rest: ArrayLike, decoded_logps: ArrayLike, decoded_rest: ArrayLike, counts: ArrayLike
) -> np.ndarray:
    r"""Return the compression error of each state.

    .. math:: KL(p \,\|\, q) = \sum_i p_i \log\frac{p_i}{q_i} + \bar p \log\frac{\bar p}{\bar q}

    The divergence of the decoded distributions q from the original ones p, over the ids and the bucket of the rest.

    Args:
        logps, decoded_logps: [n], of all states one after another.
        rest, decoded_rest: log of the mass of all other ids, [S].
        counts: how many ids each state has, [S].

    Returns:
        [S], float64, in nats.

    Raises:
        ValueError: on shapes that do not fit.

    Example:
        >>> import numpy as np
        >>> kl_error(np.log([0.5, 0.5]), [-np.inf], np.log([0.25, 0.75]), [-np.inf], [2]).round(4).tolist()
        [0.1438]
    """
    p, p_rest, q, q_rest = (np.asarray(x, np.float64) for x in (logps, rest, decoded_logps, decoded_rest))
    counts, _, first = _counted(counts)
    if not p.shape == q.shape == (counts.sum(),) or not p_rest.shape == q_rest.shape == counts.shape:
        raise ValueError("the log-probabilities must be [n] each and the rests [S] each, as the counts say")
    return np.add.reduceat(_term(p, q), first) + _term(p_rest, q_rest)


def _term(p: np.ndarray, q: np.ndarray) -> np.ndarray:
    mass = np.exp(p)
    there = mass > 0
    return mass * np.subtract(p, q, out=np.zeros_like(p), where=there)


def _checked(logps: ArrayLike, rest: ArrayLike, counts: ArrayLike) -> tuple[np.ndarray, ...]:
    """Return what is to be packed, checked and in float64, and the start of each state."""
    logps, rest = np.asarray(logps, np.float64), np.asarray(rest, np.float64)
    counts, _, first = _counted(counts)
    if logps.shape != (counts.sum(),) or rest.shape != counts.shape:
        raise ValueError(
            f"{len(counts)} states of {counts.sum()} ids need as many rests and log-probabilities, got "
            f"{list(rest.shape)} and {list(logps.shape)}"
        )
    if not np.isfinite(logps).all() or not (rest < np.inf).all():  # NaN is not below either
        raise ValueError("log-probabilities must be finite, and the rest finite or -inf")
    with np.errstate(divide="ignore"):
        total = np.logaddexp(np.log(np.add.reduceat(np.exp(logps), first)), rest)
    if (np.abs(total) > 1e-3).any():  # decoding would normalise it away
        raise ValueError("the probabilities of a state and its rest must sum to one")
    return logps, rest, counts, first


def _counted(counts: ArrayLike, states: ArrayLike | None = None) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return counts and states as int64 (default: all are one response's), and the start of each state."""
    counts = np.asarray(counts)
    states = np.asarray([counts.size] if states is None else states)
    for name, numbers, least in (("counts", counts, 1), ("states", states, 0)):
        if numbers.ndim != 1 or (numbers.size and (numbers.dtype.kind not in "iu" or numbers.min() < least)):
            raise ValueError(f"{name} must be a list of whole numbers, {least} or more")
    counts, states = counts.astype(np.int64), states.astype(np.int64)
    if states.sum() != len(counts):
        raise ValueError(f"the responses have {states.sum()} states, but there are counts for {len(counts)}")
    return counts, states, np.cumsum(counts) - counts


def _scalars(states: int, *columns: ArrayLike) -> list[np.ndarray]:
    """Return columns with a number per state, checked: all but the last, the odds, are finite and not below 0."""
    *drops, odds = arrays = [np.asarray(column, np.float32) for column in columns]
    if any(column.shape != (states,) for column in arrays):
        raise ValueError(f"gap, span and odds must have one number for each of the {states} states")
    if not (odds < np.inf).all() or not all(((drop >= 0) & (drop < np.inf)).all() for drop in drops):
        raise ValueError("gap, span or odds are damaged: NaN, infinite or negative")
    return arrays


def _check_bits(bits: int) -> None:
    if not 1 <= bits <= ID_BITS:
        raise ValueError(f"an id takes 1 to {ID_BITS} bits, not {bits}")


def _most(counts: np.ndarray) -> np.ndarray:
    """Return L, the last level of a state with so many ids: fewer ids need fewer levels."""
    return np.clip(16 * counts - 47, 0, MOST)


def _half(x: np.ndarray) -> np.ndarray:
    """Convert to float16; too large becomes the largest number, not inf, but -inf stays."""
    with np.errstate(over="ignore"):
        return np.minimum(x, HALF).astype(np.float16)


def _share(drop: np.ndarray, span: np.ndarray, counts: np.ndarray) -> np.ndarray:
    """Return the drop as a share of the span, 0..1."""
    spans = np.repeat(span.astype(np.float64), counts)
    return np.clip(np.divide(drop, spans, out=np.zeros_like(drop), where=spans > 0), 0, 1)


def _bytes_of(bits: np.ndarray) -> bytes:
    return np.packbits(bits.ravel(), bitorder="little").tobytes()


def _by_response(of_states: np.ndarray, states: np.ndarray) -> np.ndarray:
    """Return sums over the states of each response: [S] -> [R]; a response may have none."""
    before = np.concatenate([[0], np.cumsum(of_states)])
    return np.diff(before[np.cumsum(states)], prepend=0)


def _joined(name: str, streams: Sequence[bytes], bits: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Join the streams of R responses, and return how many bits of padding are before each response."""
    sizes = -(-bits // 8)
    if [len(stream) for stream in streams] != sizes.tolist():
        raise ValueError(f"{name} are damaged: a response has more or fewer bytes than its counts need")
    stream = np.frombuffer(b"".join(streams), np.uint8)
    return stream, np.cumsum(8 * sizes - bits) - (8 * sizes - bits)


def _normalised(
    drop: np.ndarray, odds: np.ndarray, counts: np.ndarray, first: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Return log-probabilities [n] and rests [S] from the drop of each id below the top, and the odds of the rest."""
    top = -np.logaddexp(np.log(np.add.reduceat(np.exp(-drop), first, dtype=np.float64)), odds)
    return np.repeat(top.astype(np.float32), counts) - drop, (top + odds).astype(np.float32)
