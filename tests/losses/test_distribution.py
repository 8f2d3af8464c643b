"""Divergences and advantages over k ids and a bucket for the rest: hand values, naive float64 sums, the dense limit."""

import math
from itertools import pairwise

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.autograd import gradcheck

from prefdistill.losses import advantage_score, rest_logprob, skew_kl, topk_kl, with_rest

quick = settings(max_examples=25, deadline=None, derandomize=True)
INF = math.inf
SKEWS = st.one_of(st.sampled_from([0.0, 0.1, 1.0]), st.floats(0.0, 1.0))


def f64(rows):
    return torch.tensor(rows, dtype=torch.float64)


def naive_kl(p, q, skew=0.0):
    """KL(p || skew p + (1 - skew) q) of two lists of probabilities, with 0 log 0 = 0."""
    return sum(a * math.log(a / (skew * a + (1 - skew) * b)) for a, b in zip(p, q, strict=True) if a > 0)


def softmax(logits):
    weights = [math.exp(z - max(logits)) for z in logits]
    return [w / sum(weights) for w in weights]


@st.composite
def distributions(draw, models=2):
    """Logits of several models over one vocabulary, and k of its ids in some order."""
    size = draw(st.integers(2, 7))
    row = st.lists(st.floats(-8.0, 8.0), min_size=size, max_size=size)
    k = draw(st.integers(1, size))
    return [draw(row) for _ in range(models)], draw(st.permutations(range(size)))[:k]


def cut(logits, ids):
    """What is known of a distribution at some ids: log-probabilities [1, k], the log of the rest [1], and a naive list
    of the k probabilities and the rest."""
    p = softmax(logits)
    rest = sum(x for i, x in enumerate(p) if i not in ids)
    logps = f64([[math.log(p[i]) for i in ids]])
    return logps, f64([math.log(rest) if rest else -INF]), [*(p[i] for i in ids), rest]


# ---------------------------------------------------------------- the rest


@pytest.mark.parametrize(
    ("probabilities", "rest"),
    [
        ([0.25, 0.25], 0.5),
        ([0.125], 0.875),
        ([0.5, 0.25, 0.25], 0.0),
        ([0.25, 0.0, 0.25, 0.0], 0.5),  # two ids that fill up
        ([1.0, 0.0], 0.0),
        ([0.0, 0.0], 1.0),  # no id at all
    ],
)
def test_rest_by_hand(probabilities, rest):
    found = rest_logprob(f64([probabilities]).log()).exp()
    assert found.tolist() == pytest.approx([rest], abs=1e-15)


@quick
@given(distributions(models=1))
def test_ids_and_rest_are_one_distribution(case):
    (logits,), ids = case
    logps, rest, _ = cut(logits, ids)
    assert with_rest(logps, rest).exp().sum().item() == pytest.approx(1.0, abs=1e-14)
    whole = with_rest(logps).exp()
    assert whole.sum().item() == pytest.approx(1.0, abs=1e-13)
    assert whole[0, -1].item() == pytest.approx(float(rest.exp()), abs=1e-13)


def test_gradient_of_the_rest_by_hand():
    """d log(1 - sum p) / d log p_a = -p_a / (1 - sum p): -0.25 / 0.625, -0.125 / 0.625; none where nothing is left."""
    some = f64([0.25, 0.125]).log().requires_grad_()
    rest_logprob(some).backward()
    np.testing.assert_allclose(some.grad, [-0.4, -0.2], rtol=1e-14)
    assert gradcheck(rest_logprob, some)
    everything = f64([0.5, 0.25, 0.25]).log().requires_grad_()
    rest_logprob(everything).backward()
    assert everything.grad.tolist() == [0.0, 0.0, 0.0]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("size", [2, 50, 3000])
def test_what_rounding_leaves_of_a_whole_distribution_is_nothing(dtype, size):
    logits = 5 * torch.randn(64, size, dtype=dtype, generator=torch.Generator().manual_seed(size))
    assert rest_logprob(logits.log_softmax(-1)).tolist() == [-INF] * 64


def test_a_small_rest_that_is_more_than_rounding_stays():
    left = rest_logprob(f64([0.5, 0.5 - 1e-9]).log()).item()
    assert left == pytest.approx(math.log(1e-9), abs=1e-5)  # 1 - 1e-9 holds the rest to about 1e-16 / 1e-9
    left = rest_logprob(torch.tensor([0.5, 0.499]).log()).item()
    assert left == pytest.approx(math.log(0.001), abs=1e-3)


def test_with_rest_by_hand():
    logps = f64([[0.5, 0.25], [0.125, 0.125]]).log()
    assert with_rest(logps, f64([-1.0, -2.0])).tolist() == [[*logps[0].tolist(), -1.0], [*logps[1].tolist(), -2.0]]


@pytest.mark.parametrize("shape", [(3,), (2, 1), ()])
def test_a_rest_of_another_shape_is_refused(shape):
    with pytest.raises(ValueError, match=r"the rest must be \[N\]"):
        with_rest(torch.full((2, 4), -3.0), torch.zeros(shape))


# ------------------------------------------------------- divergences by hand

P, Q = [0.5, 0.25], [0.25, 0.25]  # the rests are 0.25 and 0.5


@pytest.mark.parametrize(
    ("skew", "expected"),
    [
        (0.0, 0.5 * math.log(2) + 0.25 * math.log(0.25 / 0.5)),
        # mixtures 0.375, 0.25, 0.375
        (0.5, 0.5 * math.log(0.5 / 0.375) + 0.25 * math.log(0.25 / 0.375)),
        # 0.2 p + 0.8 q = 0.3, 0.25, 0.45
        (0.2, 0.5 * math.log(0.5 / 0.3) + 0.25 * math.log(0.25 / 0.45)),
        (1.0, 0.0),
    ],
)
def test_skew_kl_by_hand(skew, expected):
    found = skew_kl(f64([P]).log(), f64([Q]).log(), skew=skew)
    assert found.tolist() == pytest.approx([expected], abs=1e-15)


def test_topk_kl_by_hand():
    """0.5 log(0.5 / 0.25) + 0.25 log(0.25 / 0.25) + 0.25 log(0.25 / 0.5), each way."""
    p, q = f64([P]).log(), f64([Q]).log()
    assert topk_kl(p, q).tolist() == pytest.approx([0.25 * math.log(2)], abs=1e-15)
    # 0.25 log(1/2) + 0 + 0.5 log 2: equal here, so take another pair to see that the sides are not swapped
    p, q = f64([[0.75]]).log(), f64([[0.5]]).log()
    assert topk_kl(p, q).tolist() == pytest.approx([0.75 * math.log(1.5) + 0.25 * math.log(0.5)], abs=1e-15)
    assert topk_kl(q, p).tolist() == pytest.approx([0.5 * math.log(2 / 3) + 0.5 * math.log(2)], abs=1e-15)


@quick
@given(distributions(), SKEWS)
def test_divergences_are_the_naive_float64_sum(case, skew):
    (teacher, student), ids = case
    (p, p_rest, naive_p), (q, q_rest, naive_q) = cut(teacher, ids), cut(student, ids)
    found = skew_kl(p, q, skew=skew, p_rest=p_rest, q_rest=q_rest)
    assert found.item() == pytest.approx(naive_kl(naive_p, naive_q, skew), abs=1e-12)
    if skew == 0:
        assert topk_kl(p, q, p_rest, q_rest).item() == found.item()
    derived = skew_kl(p, q, skew=skew).item()
    assert derived == pytest.approx(naive_kl(naive_p, naive_q, skew), abs=1e-8)


@quick
@given(distributions(), SKEWS)
def test_a_coarser_view_never_sees_more_divergence(case, skew):
    """Each id that goes into the bucket can only lower it; at k = vocabulary it is that of the full distributions."""
    (teacher, student), _ = case
    size = len(teacher)
    dense = naive_kl(softmax(teacher), softmax(student), skew)
    found = []
    for k in range(1, size + 1):
        (p, p_rest, _), (q, q_rest, _) = cut(teacher, range(k)), cut(student, range(k))
        found.append(skew_kl(p, q, skew=skew, p_rest=p_rest, q_rest=q_rest).item())
    assert found[-1] == pytest.approx(dense, abs=1e-12)
    for fewer, more in pairwise(found):
        assert -1e-12 < fewer < more + 1e-12


# ----------------------------------------------------- k = the vocabulary


def gradient_of_naive_kl(p, q, skew, reverse=False):
    """By hand, in the logits of q, of KL(p || m) with m = skew p + (1 - skew) q; or, `reverse`, in those of p.

    d/dq_a = -(1 - skew) p_a / m_a; d/dp_a = log(p_a / m_a) + 1 - skew p_a / m_a; through a softmax x - E[x], times it.
    """
    p, q = np.array(p), np.array(q)
    m = skew * p + (1 - skew) * q
    if reverse:
        by = np.log(p / m) + 1 - skew * p / m
        return p * (by - (p * by).sum())
    by = -(1 - skew) * p / m
    return q * (by - (q * by).sum())


@pytest.mark.parametrize("derived", [False, True], ids=["rests-given", "rests-derived"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("skew", [0.0, 0.1, 0.7])
def test_the_whole_vocabulary_gives_the_dense_value_and_gradient(skew, dtype, derived):
    """In the logits of the student, on either side of the divergence; the ids come in an order of their own."""
    generator = torch.Generator().manual_seed(3)
    size, states = 40, 30
    teacher, student = (3 * torch.randn(states, size, dtype=dtype, generator=generator) for _ in range(2))
    ids = torch.stack([torch.randperm(size, generator=generator) for _ in range(states)])
    nothing = None if derived else torch.full((states,), -INF, dtype=dtype)
    rounding = 1e-12 if dtype == torch.float64 else 3e-6
    dense = [
        ([float(x) for x in p.double().softmax(-1)], [float(x) for x in q.double().softmax(-1)])
        for p, q in zip(teacher, student, strict=True)
    ]
    for reverse in (False, True):
        student.requires_grad_().grad = None
        given = [logits.log_softmax(-1).gather(-1, ids) for logits in (teacher, student)]
        p, q = reversed(given) if reverse else given
        found = skew_kl(p, q, skew=skew, p_rest=nothing, q_rest=nothing)
        found.sum().backward()
        pairs = [(q, p) if reverse else (p, q) for p, q in dense]
        np.testing.assert_allclose(found.detach(), [naive_kl(*pair, skew) for pair in pairs], atol=rounding)
        by_hand = [gradient_of_naive_kl(*pair, skew, reverse) for pair in pairs]
        np.testing.assert_allclose(student.grad, by_hand, atol=rounding)


def test_the_gradient_of_the_plain_divergence_is_the_difference_of_the_distributions():
    teacher, student = f64([[2.0, 0.0, -1.0]]), f64([[0.0, 1.0, 0.5]]).requires_grad_()
    topk_kl(teacher.log_softmax(-1), student.log_softmax(-1)).sum().backward()
    np.testing.assert_allclose(student.grad[0], student.detach()[0].softmax(-1) - teacher[0].softmax(-1), atol=1e-15)


@quick
@given(distributions(), st.floats(0.0, 0.95))
def test_gradcheck_of_the_divergences(case, skew):
    """In both models' log-probabilities, with the rests as arguments of their own and derived."""
    (teacher, student), ids = case
    (p, p_rest, _), (q, q_rest, _) = cut(teacher, ids), cut(student, ids)
    p, q = p.requires_grad_(), q.requires_grad_()
    rests = [x.requires_grad_() for x in (p_rest, q_rest) if math.isfinite(x.item())]
    if rests:
        assert gradcheck(
            lambda p, q, p_rest, q_rest: skew_kl(p, q, skew=skew, p_rest=p_rest, q_rest=q_rest), (p, q, *rests)
        )
    if p_rest.item() > math.log(1e-3) and q_rest.item() > math.log(1e-3):  # steps of 1e-6 must not empty the bucket
        assert gradcheck(lambda p, q: skew_kl(p, q, skew=skew), (p, q))


# ------------------------------------------------------- limits and extremes


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("k", [3, 20])
def test_nothing_diverges_from_itself(k, dtype):
    logits = 4 * torch.randn(50, 20, dtype=dtype, generator=torch.Generator().manual_seed(0))
    logits = logits.requires_grad_()
    student = logits.log_softmax(-1)[:, :k]
    teacher = student.detach()
    divergence = topk_kl(teacher, student)
    assert divergence.tolist() == [0.0] * 50
    divergence.sum().backward()
    assert logits.grad.abs().max() < (1e-15 if dtype == torch.float64 else 1e-6)
    np.testing.assert_allclose(skew_kl(teacher, student.detach(), skew=0.3), np.zeros(50), atol=3e-7)


@quick
@given(distributions(), st.floats(0.0, 0.95), st.integers(1, 3))
def test_ids_that_fill_up_are_as_if_they_were_not_there(case, skew, more):
    (teacher, student), ids = case
    found = []
    for padding in (0, more):
        (p, p_rest, _), (q, q_rest, _) = cut(teacher, ids), cut(student, ids)
        p, q = (torch.nn.functional.pad(x, (0, padding), value=-INF).requires_grad_() for x in (p, q))
        divergence = skew_kl(p, q, skew=skew, p_rest=p_rest, q_rest=q_rest)
        score = advantage_score(with_rest(q, q_rest), with_rest(p, p_rest) - with_rest(q, q_rest).detach())
        (divergence + score).sum().backward()
        found.append((divergence.item(), score.item(), p.grad, q.grad))
    (divergence, score, p_grad, q_grad), (padded, padded_score, p_padded, q_padded) = found
    assert padded == pytest.approx(divergence, abs=1e-14)
    assert padded_score == pytest.approx(score, abs=1e-14)
    for whole, x in ((p_padded, p_grad), (q_padded, q_grad)):
        np.testing.assert_allclose(whole[:, : len(ids)], x, atol=1e-13)
        assert whole[:, len(ids) :].tolist() == [[0.0] * more]


@pytest.mark.parametrize("skew", [0.0, 0.1])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize(
    ("p", "p_rest", "q", "q_rest"),
    [
        ([0.5, 0.5 - 1e-12], 1e-12, [0.5, 0.25], 0.25),  # hardly any rest at the teacher,
        ([0.5, 0.25], 0.25, [0.5, 0.5 - 1e-12], 1e-12),  # at the student,
        ([0.5, 0.5], 1e-30, [0.5, 0.5], 1e-37),  # at both
        ([1.0, 0.0], 0.0, [0.25, 0.25], 0.5),  # a teacher of one token
        ([1.0, 1e-30], 0.0, [1e-30, 1.0], 0.0),  # a student of another one
        ([0.0, 0.0], 1.0, [0.0, 0.0], 1.0),  # a state without ids
        ([0.5, 0.5], 0.0, [0.5, 0.5], 0.0),
    ],
)
def test_extremes_stay_finite_and_right(p, p_rest, q, q_rest, dtype, skew):
    given = [torch.tensor(x, dtype=dtype).log().requires_grad_() for x in ([p], [p_rest], [q], [q_rest])]
    divergence = skew_kl(given[0], given[2], skew=skew, p_rest=given[1], q_rest=given[3])
    expected = naive_kl([*p, p_rest], [*q, q_rest], skew)
    assert divergence.item() == pytest.approx(expected, abs=3e-6 if dtype == torch.float32 else 1e-10)
    divergence.sum().backward()
    assert all(torch.isfinite(x.grad).all() for x in given)


@pytest.mark.parametrize("skew", [0.0, 0.1])
@pytest.mark.parametrize("logits", [[[1e4, 0.0, -1e4]], [[-80.0, 80.0, 0.0]], [[0.0, -INF, 3.0]]])
def test_extreme_logits_stay_finite(logits, skew):
    """The rests as the models' own logits give them; -inf is a token that cannot be, for the teacher just as well."""
    teacher = torch.tensor([[1.0, -INF if math.isinf(logits[0][1]) else 0.0, -1.0]])
    student = torch.tensor(logits, requires_grad=True)
    p, q = teacher.log_softmax(-1), student.log_softmax(-1)
    for divergence in (
        skew_kl(p, q, skew=skew),
        skew_kl(p[:, :2], q[:, :2], skew=skew, p_rest=p[:, 2], q_rest=q[:, 2]),
        skew_kl(p[:, :2], q[:, :2], skew=skew),
        skew_kl(q, p, skew=skew),
    ):
        (gradient,) = torch.autograd.grad(divergence.sum(), student, retain_graph=True)
        assert torch.isfinite(divergence).all()
        assert torch.isfinite(gradient).all()


@pytest.mark.parametrize(("p", "q"), [((2, 3), (2, 4)), ((2, 3), (3, 3)), ((3,), (3,)), ((1, 2, 3), (1, 2, 3))])
def test_shapes_that_do_not_fit_are_refused(p, q):
    p, q = torch.full(p, -3.0), torch.full(q, -3.0)
    for refused in (lambda: skew_kl(p, q, skew=0.1), lambda: topk_kl(p, q), lambda: advantage_score(p, q)):
        with pytest.raises(ValueError, match=r"both must be \[N, k\]"):
            refused()


@pytest.mark.parametrize("rests", [{"p_rest": torch.zeros(3)}, {"q_rest": torch.zeros(2, 1)}])
def test_rests_that_do_not_fit_are_refused(rests):
    with pytest.raises(ValueError, match=r"the rest must be \[N\]"):
        skew_kl(torch.full((2, 4), -3.0), torch.full((2, 4), -3.0), skew=0.0, **rests)


@pytest.mark.parametrize("skew", [-0.1, 1.1, math.nan])
def test_a_skew_out_of_range_is_refused(skew):
    with pytest.raises(ValueError, match=r"skew must lie in 0\.\.1"):
        skew_kl(torch.full((2, 4), -3.0), torch.full((2, 4), -3.0), skew=skew)


# --------------------------------------------------------------- advantages


def test_advantage_by_hand():
    """0.5 * 1 - 0.25 * 2 + 0.25 * 4."""
    assert advantage_score(f64([[0.5, 0.25, 0.25]]).log(), f64([[1.0, -2.0, 4.0]])).tolist() == [1.0]


@quick
@given(distributions(models=3))
def test_advantage_is_the_naive_float64_expectation(case):
    """At k = vocabulary in value, and in gradient: d/dz_a = q_a (A_a - E[A]); on k ids with the bucket as one token."""
    (teacher, base, student), ids = case
    size = range(len(teacher))
    for chosen in (size, ids):
        (p, p_rest, naive_p), (r, r_rest, naive_r) = cut(teacher, chosen), cut(base, chosen)
        z = f64([student]).requires_grad_()
        logps = z.log_softmax(-1)
        others = [i for i in size if i not in chosen]
        rest = torch.logsumexp(logps[:, others], -1) if others else f64([-INF])
        score = advantage_score(with_rest(logps[:, chosen], rest), with_rest(p, p_rest) - with_rest(r, r_rest))
        advantages = [math.log(a / b) if a > 0 else 0.0 for a, b in zip(naive_p, naive_r, strict=True)]
        _, _, q = cut(student, chosen)
        mean = sum(a * b for a, b in zip(q, advantages, strict=True))
        assert score.item() == pytest.approx(mean, abs=1e-12)
        score.sum().backward()
        of_token = [advantages[list(chosen).index(i)] if i in chosen else advantages[-1] for i in size]
        by_hand = [p * (a - mean) for p, a in zip(softmax(student), of_token, strict=True)]
        np.testing.assert_allclose(z.grad[0], by_hand, atol=1e-12)


def test_teachers_that_agree_give_no_advantage():
    z = f64([[1.0, 2.0, -1.0]]).requires_grad_()
    teacher = with_rest(f64([[0.3, 0.5, 0.2]]).log())  # its rest is empty: the advantage there is -inf - -inf
    score = advantage_score(with_rest(z.log_softmax(-1), f64([-INF])), teacher - teacher)
    assert score.tolist() == [0.0]
    score.sum().backward()
    assert z.grad.tolist() == [[0.0, 0.0, 0.0]]


def test_what_the_student_cannot_say_has_no_advantage():
    logps = f64([[0.5, 0.5, 0.0, 0.0]]).log().requires_grad_()
    score = advantage_score(logps, f64([[1.0, 2.0, math.nan, -INF]]))
    assert score.tolist() == [1.5]
    score.sum().backward()
    assert logps.grad.tolist() == [[0.5, 1.0, 0.0, 0.0]]


def test_gradcheck_of_the_advantage():
    generator = torch.Generator().manual_seed(0)
    logps = torch.randn(4, 5, dtype=torch.float64, generator=generator).log_softmax(-1).requires_grad_()
    advantages = torch.randn(4, 5, dtype=torch.float64, generator=generator)
    assert gradcheck(lambda x: advantage_score(x, advantages), logps)
