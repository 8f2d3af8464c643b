"""The storage of token distributions: ids come back exactly, the rest within a small divergence, damage is noticed."""

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from prefdistill.signals.packing import (
    ID_BITS,
    MOST,
    SPAN,
    id_bits,
    kl_error,
    pack_sorted,
    pack_unsorted,
    unpack_sorted,
    unpack_unsorted,
)

VOCABULARY = 32_000
STATES = 60
SCALARS = ("gap", "span", "odds")


def log_softmax(logits):
    shifted = logits - logits.max(-1, keepdims=True)
    return shifted - np.log(np.exp(shifted).sum(-1, keepdims=True))


def log_sum(x):
    with np.errstate(divide="ignore"):
        return np.log(np.exp(x).sum(-1))


def spiked(rng, spread, lead, spikes, apart):
    """Gaussian logits with a few tokens that lead the others."""
    logits = rng.normal(size=(STATES, VOCABULARY)) * spread
    best = logits.max(-1, keepdims=True) + rng.uniform(*lead, (STATES, 1))
    logits[:, :spikes] = best - rng.uniform(0, apart, (STATES, spikes))
    return logits


FAMILIES = {
    **{f"gaussian {s}": lambda rng, s=s: rng.normal(size=(STATES, VOCABULARY)) * s for s in (0.3, 1, 2, 3, 5)},
    "zipf": lambda rng: -rng.uniform(0.8, 3, (STATES, 1)) * np.log(np.arange(1, VOCABULARY + 1)),
    "peaked": lambda rng: spiked(rng, 2.5, (6, 20), 1, 0),
    "two spikes": lambda rng: spiked(rng, 2.0, (8, 14), 2, 2),
    "six spikes": lambda rng: spiked(rng, 2.0, (14, 20), 6, 4),
    "heavy tails": lambda rng: rng.standard_t(4, size=(STATES, VOCABULARY)) * 1.5,
    "flat": lambda rng: np.zeros((STATES, VOCABULARY)),
}


@pytest.fixture(scope="module", params=FAMILIES)
def family(request):
    """Log-probabilities of two alike models at the 50 likeliest tokens of the first, with what is left of each."""
    rng = np.random.default_rng(0)
    one = FAMILIES[request.param](rng)
    other = one + 0.7 * rng.normal(size=one.shape)
    ids = np.argsort(-one, kind="stable")[:, :50]
    found = []
    for logps in (log_softmax(one), log_softmax(other)):
        at_ids = np.take_along_axis(logps, ids, -1)
        np.put_along_axis(logps, ids, -np.inf, -1)
        found += [at_ids.ravel().astype(np.float32), log_sum(logps).astype(np.float32)]
    return request.param, ids.ravel(), *found, np.full(STATES, 50)


def random_states(rng, counts, spread=3.0, rest=True):
    """Sorted log-probabilities of states with these counts, [n], and the rests, [T]."""
    logps, rests = [], []
    for count in counts:
        drawn = log_softmax(rng.normal(size=count + 3) * spread * rng.uniform(0, 2))
        drawn = drawn if rest else log_softmax(drawn[:count])
        drawn[:count] = -np.sort(-drawn[:count])
        logps.append(drawn[:count])
        rests.append(log_sum(drawn[count:]) if rest else -np.inf)
    return np.concatenate([[], *logps]).astype(np.float32), np.array(rests, np.float32)


def joined(packed, counts):
    """Columns of several responses as `unpack_sorted` and `unpack_unsorted` take them."""
    streams = [[columns[name] for columns in packed] for name in ("ids", "levels") if all(name in p for p in packed)]
    numbers = [np.concatenate([p[name] for p in packed]) for name in SCALARS if all(name in p for p in packed)]
    return [*streams, *numbers, np.concatenate(counts), np.array([len(of) for of in counts])]


def naive_sorted(columns, counts, bits):
    """The format read bit by bit with Python's numbers."""
    stream, frames = (int.from_bytes(columns[name], "little") for name in ("ids", "levels"))
    all_ids, all_logps, rests = [], [], []
    for t, count in enumerate(counts):
        most = min(max(16 * count - 47, 0), 62)
        levels, zeros = [], 0
        for _ in range(count + most):
            if frames & 1:
                levels.append(zeros)
            else:
                zeros += 1
            frames >>= 1
        assert len(levels) == count
        assert zeros == most
        for _ in range(count):
            all_ids.append(stream & ((1 << bits) - 1))
            stream >>= bits
        gap, span, odds = (float(columns[name][t]) for name in SCALARS)
        drops = [0.0]
        for level in levels[1:]:
            u = level / most if most else 0.0
            drops.append(gap + span * u * (1 + 4 * u) / 5)
        top = -math.log(math.fsum(math.exp(-drop) for drop in drops) + math.exp(odds))
        all_logps += [top - drop for drop in drops]
        rests.append(top + odds)
    assert stream == frames == 0
    return all_ids, all_logps, rests


def naive_unsorted(columns, counts):
    levels, all_logps, rests = iter(columns["levels"]), [], []
    for t, count in enumerate(counts):
        us = [next(levels) / 255 for _ in range(count)]
        drops = [float(columns["span"][t]) * u * (1 + 4 * u) / 5 for u in us]
        odds = float(columns["odds"][t])
        top = -math.log(math.fsum(math.exp(-drop) for drop in drops) + math.exp(odds))
        all_logps += [top - drop for drop in drops]
        rests.append(top + odds)
    assert next(levels, None) is None
    return all_logps, rests


def test_bytes_of_a_small_response():
    """By hand: states of one, three and four ids in 5 bits. L = 0, 1, 17."""
    half, eighth = math.log(0.5), math.log(0.125)
    four = [0.5, 0.3, 0.1, 0.05]
    logps = [math.log(0.75), half, half + math.log(0.5), eighth, *np.log(four)]
    packed = pack_sorted([31, 1, 2, 3, 4, 5, 6, 7], logps, [math.log(0.25), eighth, math.log(0.05)], [1, 3, 4], bits=5)
    ids = sum(number << 5 * place for place, number in enumerate([31, 1, 2, 3, 4, 5, 6, 7]))
    assert packed["ids"] == ids.to_bytes(5, "little")
    # log(0.3 / 0.1) / log(0.3 / 0.05) = 0.613 of the span; u(1 + 4u)/5 = 0.613 at u = 0.759, 12.9 of 17
    frames = "1" + "1101" + "11" + "0" * 13 + "1" + "0" * 4 + "1"
    assert packed["levels"] == int(frames[::-1], 2).to_bytes(4, "little")
    # not the rounded numbers themselves: the span starts where the rounded gap ends
    np.testing.assert_allclose(packed["gap"], [0, math.log(2), math.log(0.5 / 0.3)], rtol=1e-3)
    np.testing.assert_allclose(packed["span"], [0, math.log(2), math.log(0.3 / 0.05)], rtol=1e-3)
    np.testing.assert_allclose(packed["odds"], np.log([1 / 3, 0.25, 0.1]), rtol=1e-3)
    assert all(packed[name].dtype == np.float16 for name in SCALARS)


some_counts = st.lists(st.lists(st.integers(1, 12) | st.just(60), max_size=6), min_size=1, max_size=4)


@settings(max_examples=80, deadline=None, derandomize=True)
@given(some_counts, st.integers(1, ID_BITS), st.integers(0, 2**32 - 1), st.booleans())
def test_sorted_round_trip(per_response, bits, seed, rest):
    rng = np.random.default_rng(seed)
    given_ids, given_logps, packed = [], [], []
    for counts in per_response:
        logps, rests = random_states(rng, counts, rest=rest)
        ids = rng.integers(0, 1 << bits, len(logps))
        packed.append(pack_sorted(ids, logps, rests, counts, bits))
        given_ids.append(ids)
        given_logps.append(logps)
    counts = [np.array(of, np.int32) for of in per_response]
    ids, logps, rests = unpack_sorted(*joined(packed, counts), bits)
    assert (ids.dtype, logps.dtype, rests.dtype) == (np.int32, np.float32, np.float32)
    np.testing.assert_array_equal(ids, np.concatenate(given_ids))

    naive = [naive_sorted(columns, of, bits) for columns, of in zip(packed, per_response, strict=True)]
    for found, part in zip((ids, logps, rests), zip(*naive, strict=True), strict=True):
        np.testing.assert_allclose(found, np.concatenate([[], *part]), rtol=2e-6, atol=2e-6)
    alone = [unpack_sorted(*joined([p], [of]), bits) for p, of in zip(packed, counts, strict=True)]
    for found, part in zip((ids, logps, rests), zip(*alone, strict=True), strict=True):
        np.testing.assert_array_equal(found, np.concatenate(part))

    ends = np.cumsum(np.concatenate(counts), dtype=np.int64)[:-1]
    for state, before, bucket in zip(
        np.split(logps, ends), np.split(np.concatenate(given_logps), ends), rests, strict=False
    ):
        if not len(state):
            continue
        assert (np.diff(state) <= 0).all()
        assert log_sum(np.append(state, bucket).astype(np.float64)) == pytest.approx(0, abs=1e-6)
        assert (bucket == -np.inf) == (not rest)
        down, was = state[0] - state, np.minimum(before[0] - before, SPAN)
        most = min(max(16 * len(state) - 47, 0), MOST)
        rounding = was[-1] * 2.0**-11 + 1e-5  # a float16 gap and span, and float32
        assert np.abs(down - was)[[0, min(1, len(state) - 1), -1]].max() <= rounding
        # in between at most half the widest step, the last: u(1 + 4u)/5 has the slope 9/5 there
        assert np.abs(down - was).max() <= rounding + 0.9 * down[-1] / max(most, 1)


@settings(max_examples=60, deadline=None, derandomize=True)
@given(some_counts, st.integers(0, 2**32 - 1), st.booleans())
def test_unsorted_round_trip(per_response, seed, rest):
    rng = np.random.default_rng(seed)
    given_logps, packed = [], []
    for counts in per_response:
        logps, rests = random_states(rng, counts, rest=rest)
        ends = np.cumsum(counts, dtype=np.int64)[:-1]
        logps = np.concatenate([[], *(rng.permutation(state) for state in np.split(logps, ends))])
        packed.append(pack_unsorted(logps, rests, counts))
        given_logps.append(logps)
    counts = [np.array(of, np.int32) for of in per_response]
    logps, rests = unpack_unsorted(*joined(packed, counts))
    naive = [naive_unsorted(columns, of) for columns, of in zip(packed, per_response, strict=True)]
    for found, part in zip((logps, rests), zip(*naive, strict=True), strict=True):
        np.testing.assert_allclose(found, np.concatenate([[], *part]), rtol=2e-6, atol=2e-6)
    alone = [unpack_unsorted(*joined([p], [of])) for p, of in zip(packed, counts, strict=True)]
    for found, part in zip((logps, rests), zip(*alone, strict=True), strict=True):
        np.testing.assert_array_equal(found, np.concatenate(part))
    ends = np.cumsum(np.concatenate(counts), dtype=np.int64)[:-1]
    for state, before in zip(np.split(logps, ends), np.split(np.concatenate(given_logps), ends), strict=True):
        if len(state):
            assert state[before.argmax()] == state.max()
            down, was = state.max() - state, np.minimum(before.max() - before, SPAN)
            assert np.abs(down - was).max() <= was.max() * (2.0**-11 + 0.9 / 255) + 1e-5


def test_compression_error_is_small(family):
    name, ids, logps, rest, other, other_rest, counts = family
    packed = pack_sorted(ids, logps, rest, counts, 15)
    decoded_ids, decoded, decoded_rest = unpack_sorted(*joined([packed], [counts]), 15)
    np.testing.assert_array_equal(decoded_ids, ids)
    lost = kl_error(logps, rest, decoded, decoded_rest, counts)
    assert lost.min() > -2e-6, name
    assert lost.mean() < 3e-4, name
    assert lost.max() < 1.5e-3, name

    packed = pack_unsorted(other, other_rest, counts)
    lost = kl_error(other, other_rest, *unpack_unsorted(*joined([packed], [counts])), counts)
    assert lost.min() > -2e-6, name
    assert lost.mean() < 1e-4, name
    assert lost.max() < 3e-4, name


@pytest.mark.parametrize("states", [1, 7, 200])
def test_a_state_of_50_ids_takes_127_bytes(states):
    counts = np.full(states, 50)
    logps, rest = random_states(np.random.default_rng(0), counts)
    bits = id_bits(128_256)
    assert bits == 17
    columns = pack_sorted(np.arange(50 * states), logps, rest, counts, bits)
    size = sum(len(column) if isinstance(column, bytes) else column.nbytes for column in columns.values())
    assert size <= 127 * states
    columns = pack_unsorted(logps, rest, counts)
    assert sum(len(c) if isinstance(c, bytes) else c.nbytes for c in columns.values()) == 54 * states


@pytest.mark.parametrize(
    ("logps", "rest"),
    [
        ([-1e-5, math.log(6e-6)], math.log(4e-6)),  # the likeliest has nearly all
        ([-1e-9], math.log(1e-9)),
        ([0.0], -math.inf),
        ([0.0, -200.0, -201.0, -250.0], -230.0),  # what the likeliest leaves is nothing in float16
        ([0.0, -2e5, -3e5], -4e5),  # tokens that are masked with a large number; past what float16 holds
        ([-2e5, -2e5, -3e5], 0.0),
        ([math.log(0.25)] * 4, -math.inf),
        ([math.log(0.125)] * 8, -math.inf),
        ([-11.0, *[-11.0001] * 7], math.log1p(-8 * math.exp(-11.0))),  # a span below a step of float16 at 11
    ],
)
def test_extremes(logps, rest):
    counts = np.array([len(logps)])
    packed = pack_sorted(np.arange(len(logps)), logps, [rest], counts, 5)
    back = pack_unsorted(logps, [rest], counts)
    for decoded, decoded_rest in (
        unpack_sorted(*joined([packed], [counts]), 5)[1:],
        unpack_unsorted(*joined([back], [counts])),
    ):
        lost = kl_error(logps, [rest], decoded, decoded_rest, counts)
        assert abs(lost[0]) < 1e-5
        assert np.isfinite(decoded).all()
        assert (decoded <= 0).all()
        assert (np.diff(decoded) <= 0).all()
        assert log_sum(np.append(decoded, decoded_rest).astype(np.float64)) == pytest.approx(0, abs=1e-6)
        if logps[0] > -1e4:  # beyond SPAN one number stands for all
            np.testing.assert_allclose(decoded[0], logps[0], rtol=2e-3, atol=1e-7)
            assert (decoded_rest[0] == rest) or decoded_rest[0] == pytest.approx(rest, rel=2e-3) or rest < -6e4


def test_an_outlier_does_not_cost_the_others_their_precision():
    """What lies more than SPAN below comes back at SPAN."""
    logps, counts = np.log([0.6, 0.3, 0.1, 1.0]) - [0, 0, 0, 1000], [np.array([4])]
    columns = pack_sorted([0, 1, 2, 3], logps, [-np.inf], counts[0], 2)
    found = unpack_sorted(*joined([columns], counts), 2)[1]
    np.testing.assert_allclose(found, [*logps[:3], logps[1] - SPAN], atol=0.5)
    found = unpack_unsorted(*joined([pack_unsorted(logps, [-np.inf], counts[0])], counts))[0]
    np.testing.assert_allclose(found, [*logps[:3], logps[0] - SPAN], atol=0.03)


def test_the_whole_vocabulary():
    rng = np.random.default_rng(0)
    logps = -np.sort(-log_softmax(rng.normal(size=(3, 5000)) * 2))
    ids = np.stack([rng.permutation(5000) for _ in range(3)])
    counts = np.full(3, 5000)
    packed = pack_sorted(ids.ravel(), logps.ravel(), np.full(3, -np.inf), counts, id_bits(5000))
    found, decoded, rest = unpack_sorted(*joined([packed], [counts]), id_bits(5000))
    np.testing.assert_array_equal(found, ids.ravel())
    assert (rest == -np.inf).all()
    assert kl_error(logps.ravel(), rest, decoded, rest, counts).max() < 2e-3


def test_divergence_by_hand():
    p, q = np.log([0.5, 0.25, 0.9]), np.log([0.25, 0.25, 0.9])
    lost = kl_error(p, np.log([0.25, 0.1]), q, np.log([0.5, 0.1]), [2, 1])
    np.testing.assert_allclose(lost, [0.25 * math.log(2), 0], atol=1e-12)
    assert kl_error([0.0], [-np.inf], [0.0], [-np.inf], [1]) == 0
    assert kl_error([math.log(0.5)], [math.log(0.5)], [0.0], [-np.inf], [1]) == np.inf
    with pytest.raises(ValueError, match="must be"):
        kl_error(p, [0.0], q, [0.0], [2, 1])


GOOD = {"ids": [1, 2], "logps": np.log([0.5, 0.25]), "rest": np.log([0.25]), "counts": [2], "bits": 3}


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"ids": [1]}, "ids must be"),
        ({"ids": [1.0, 2.0]}, "ids must be"),
        ({"ids": [-1, 2]}, "0..7"),
        ({"ids": [1, 8]}, "0..7"),
        ({"bits": 0}, "1 to 25"),
        ({"bits": 26}, "1 to 25"),
        ({"logps": np.log([0.25, 0.5])}, "sorted"),
        ({"logps": np.log([0.5, 0.25, 0.1])}, "as many"),
        ({"logps": [-0.5, -np.inf]}, "finite"),
        ({"logps": [np.nan, -0.5]}, "finite"),
        ({"rest": [np.nan]}, "finite"),
        ({"rest": [np.inf]}, "finite"),
        ({"rest": np.log([0.5])}, "sum to one"),
        ({"rest": np.log([0.25, 0.25])}, "as many"),
        ({"counts": [1]}, "as many"),
        ({"counts": [2, 0]}, "counts must be"),
        ({"counts": [2.0]}, "counts must be"),
        ({"counts": [[2]]}, "counts must be"),
    ],
)
def test_invalid_distributions_are_refused(change, says):
    pack_sorted(**GOOD)
    with pytest.raises(ValueError, match=says):
        pack_sorted(**GOOD | change)
    unsorted = {name: value for name, value in (GOOD | change).items() if name in ("logps", "rest", "counts")}
    if says in ("sorted", "0..7", "1 to 25", "ids must be"):
        pack_unsorted(**unsorted)
    else:
        with pytest.raises(ValueError, match=says):
            pack_unsorted(**unsorted)


@pytest.fixture
def stored():
    """Three responses, the second without states; the columns of both codings by name."""
    rng = np.random.default_rng(1)
    counts = [np.array([5, 1, 9, 2, 30]), np.array([], int), np.array([8, 8, 3])]
    found = {"sorted": [], "unsorted": []}
    for of in counts:
        logps, rest = random_states(rng, of)
        found["sorted"].append(pack_sorted(rng.integers(0, 1000, len(logps)), logps, rest, of, 10))
        found["unsorted"].append(pack_unsorted(logps, rest, of))
    names = {"sorted": ("ids", "levels", *SCALARS), "unsorted": ("levels", "span", "odds")}
    return {
        kind: dict(zip((*names[kind], "counts", "states"), joined(packed, counts), strict=True))
        | ({"bits": 10} if kind == "sorted" else {})
        for kind, packed in found.items()
    }


def cut(streams):
    return [streams[0][:-1], *streams[1:]]


def grown(streams):
    return [*streams[:-1], streams[-1] + b"\0"]


def number(value):
    return lambda column: np.concatenate([column[:-1], [value]])


@pytest.mark.parametrize(
    ("kind", "name", "damage"),
    [
        *((kind, "levels", damage) for kind in ("sorted", "unsorted") for damage in (cut, grown, lambda x: x[:-1])),
        *(("sorted", "ids", damage) for damage in (cut, grown, lambda x: x[::-1])),
        ("sorted", "bits", lambda _: 9),
        ("sorted", "bits", lambda _: 26),
        *(("sorted", name, number(value)) for name in SCALARS for value in (np.nan, np.inf)),
        *((kind, "span", number(-1.0)) for kind in ("sorted", "unsorted")),
        *((kind, "odds", lambda x: x[:-1]) for kind in ("sorted", "unsorted")),
        *((kind, "counts", lambda x: x[::-1]) for kind in ("sorted", "unsorted")),
        *((kind, "counts", lambda x: np.append(x[:-1], 0)) for kind in ("sorted", "unsorted")),
        *((kind, "states", lambda x: x[:-1]) for kind in ("sorted", "unsorted")),
        *((kind, "states", lambda x: x - [0, 0, -1]) for kind in ("sorted", "unsorted")),
        *((kind, "states", lambda x: x - [1, 0, -1]) for kind in ("sorted", "unsorted")),
        ("unsorted", "levels", lambda x: [b"\1" * len(x[0]), *x[1:]]),
    ],
)
def test_damage_is_detected(stored, kind, name, damage):
    unpack, columns = {"sorted": unpack_sorted, "unsorted": unpack_unsorted}[kind], stored[kind]
    unpack(**columns)
    with pytest.raises(ValueError, match=r"damaged|must|takes|have"):
        unpack(**columns | {name: damage(columns[name])})


def flipped(stream, *bits):
    return (int.from_bytes(stream, "little") ^ sum(1 << bit for bit in bits)).to_bytes(len(stream), "little")


@pytest.mark.parametrize("response", [0, 2])
def test_every_flipped_bit_of_the_levels_is_detected(stored, response):
    columns = stored["sorted"]
    for bit in range(8 * len(columns["levels"][response])):
        levels = columns["levels"].copy()
        levels[response] = flipped(levels[response], bit)
        with pytest.raises(ValueError, match="levels are damaged"):
            unpack_sorted(**columns | {"levels": levels})


@pytest.mark.parametrize("moved", [(0, 2), (20, 19)])
def test_the_first_and_the_last_of_a_frame_stay_where_they_are(moved):
    """As many ones as before, but the first is not at level 0, or the last not at 17."""
    columns, counts = pack_sorted([0, 1, 2, 3], np.log([0.5, 0.3, 0.1, 0.02]), np.log([0.08]), [4], 2), [np.array([4])]
    unpack_sorted(*joined([columns], counts), 2)
    with pytest.raises(ValueError, match="levels are damaged"):
        unpack_sorted(*joined([columns | {"levels": flipped(columns["levels"], *moved)}], counts), 2)


def test_counts_that_need_as_many_bytes_are_told_apart(stored):
    """Frames start and end with a 1, so counts in another order do not fit them."""
    columns = stored["sorted"]
    counts = columns["counts"].copy()
    counts[[0, 2]] = counts[[2, 0]]
    with pytest.raises(ValueError, match="levels are damaged"):
        unpack_sorted(**columns | {"counts": counts})


def test_no_states():
    none = np.zeros(0, np.float16)
    packed = pack_sorted([], [], [], [], 17)
    assert packed["ids"] == packed["levels"] == b""
    for states in ([], [0], [0, 0]):
        streams = [b""] * len(states)
        assert [len(x) for x in unpack_sorted(streams, streams, none, none, none, [], states, 17)] == [0, 0, 0]
        assert [len(x) for x in unpack_unsorted(streams, none, none, [], states)] == [0, 0]
    assert pack_unsorted([], [], [])["levels"] == b""


@pytest.mark.parametrize(("vocabulary", "bits"), [(1, 1), (2, 1), (3, 2), (256, 8), (257, 9), (128_256, 17)])
def test_bits_of_an_id(vocabulary, bits):
    assert id_bits(vocabulary) == bits
