"""ADPA, DCKD, VanillaKD, DPKD, daDPO and DistiLLM-2 by hand, by gradient, and where each becomes another."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.autograd import gradcheck

from prefdistill.losses import (
    adpa_loss,
    dadpo_loss,
    dckd_loss,
    distillm2_loss,
    dpkd_loss,
    dpo_loss,
    sft_loss,
    skew_kl,
    vanillakd_loss,
)

quick = settings(max_examples=25, deadline=None, derandomize=True)
BETAS = st.floats(0.01, 2.0)


def f64(rows):
    return torch.tensor(rows, dtype=torch.float64)


def softplus(x):
    return math.log1p(math.exp(-abs(x))) + max(x, 0.0)


def columns(width, low=-30.0, high=30.0):
    row = st.lists(st.floats(low, high), min_size=width, max_size=width)
    return st.lists(row, min_size=1, max_size=3)


# loss, its hyper-parameters, arguments of two rows, the two losses by hand
BY_HAND = [
    (vanillakd_loss, {"alpha": 0.5}, [(2.0, 1.0), (0.5, 3.0)], [2.25, 2.5]),
    (dckd_loss, {"alpha": 0.5}, [(2.0, 1.0), (0.5, 3.0), (4.0, 1.0)], [2.0 + 0.5 * 4.5, 1.0 + 0.5 * 4.0]),
    (adpa_loss, {"gamma": 3.0}, [(2.0, 1.0), (0.5, -2.0)], [0.5, 7.0]),
    (distillm2_loss, {}, [(2.0, 1.0), (0.5, 3.0)], [1.25, 2.0]),
    # 0.5 * [(-1 + 3) - (-4 + 2)] = 2; 0.5 * [(-1 + 1) - (-1 + 3)] = -1
    (
        dpkd_loss,
        {"beta": 0.5},
        [(-1.0, -1.0), (-4.0, -1.0), (-3.0, -1.0), (-2.0, -3.0)],
        [math.log(1 + math.exp(-2.0)), math.log(1 + math.exp(1.0))],
    ),
    # 0.5 * 4 + 0.25 * [(-1 + 2) - (-4 + 7)] = 1.5; 0.5 * -2 + 0.25 * [(-1 + 9) - (-1 + 1)] = 1
    (
        dadpo_loss,
        {"beta": 0.5, "teacher_beta": 0.25},
        [(-1.0, -1.0), (-4.0, -1.0), (-3.0, -1.0), (-2.0, -3.0), (-2.0, -9.0), (-7.0, -1.0)],
        [math.log(1 + math.exp(-1.5)), math.log(1 + math.exp(-1.0))],
    ),
]
LOSSES = [pytest.param(*case, id=case[0].__name__) for case in BY_HAND]


@pytest.mark.parametrize(("loss", "options", "arguments", "expected"), LOSSES)
def test_by_hand(loss, options, arguments, expected):
    assert loss(*map(f64, arguments), **options).tolist() == pytest.approx(expected, abs=1e-15)


@pytest.mark.parametrize(("loss", "options", "arguments", "expected"), LOSSES)
def test_gradcheck(loss, options, arguments, expected):
    assert gradcheck(lambda *x: loss(*x, **options), [f64(x).requires_grad_() for x in arguments])


@pytest.mark.parametrize(("loss", "options", "arguments", "expected"), LOSSES)
def test_shapes_that_would_broadcast_are_refused(loss, options, arguments, expected):
    for place in range(len(arguments)):
        given = [torch.zeros(3) for _ in arguments]
        given[place] = torch.zeros(3, 1)
        with pytest.raises(ValueError, match=r"shape \[B\]"):
            loss(*given, **options)


# ------------------------------------------------------------- gradients


@quick
@given(columns(6), BETAS, BETAS)
def test_gradient_of_dadpo_adds_the_two_pulls(rows, beta, teacher_beta):
    """-sigmoid(-m) times beta + teacher_beta at the policy, -beta at the reference, -teacher_beta at the teacher."""
    inputs = [x.clone().requires_grad_() for x in f64(rows).unbind(1)]
    loss = dadpo_loss(*inputs, beta=beta, teacher_beta=teacher_beta)
    loss.sum().backward()
    margins = [
        beta * (pw - rw - pl + rl) + teacher_beta * (pw - tw - pl + tl) for pw, pl, rw, rl, tw, tl in rows
    ]  # fmt: skip
    np.testing.assert_allclose(loss.detach(), [softplus(-m) for m in margins], rtol=1e-9, atol=1e-12)
    slope = np.array([math.exp(-softplus(m)) for m in margins])  # sigmoid(-m)
    factors = (-(beta + teacher_beta), beta + teacher_beta, beta, -beta, teacher_beta, -teacher_beta)
    for x, factor in zip(inputs, factors, strict=True):
        np.testing.assert_allclose(x.grad, factor * slope, rtol=1e-8, atol=1e-12)


@quick
@given(columns(4), BETAS)
def test_dpkd_is_the_naive_float64_loss(rows, beta):
    expected = [softplus(-beta * ((st - tt) - (ss - ts))) for st, ss, tt, ts in rows]
    np.testing.assert_allclose(dpkd_loss(*f64(rows).unbind(1), beta=beta), expected, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_extreme_margins_stay_finite(dtype):
    policy = torch.tensor([-1e4, 0.0], dtype=dtype, requires_grad=True)
    other, zero = torch.tensor([0.0, -1e4], dtype=dtype), torch.zeros(2, dtype=dtype)
    for loss in (
        dpkd_loss(policy, other, zero, zero, beta=1.0),
        dadpo_loss(policy, other, zero, zero, zero, zero, beta=0.25, teacher_beta=0.75),
    ):
        (gradient,) = torch.autograd.grad(loss.sum(), policy)
        assert loss.tolist() == [1e4, 0.0]
        assert gradient.tolist() == [-1.0, 0.0]


# --------------------------------------------- where one becomes another


@quick
@given(columns(3))
def test_without_the_teacher_it_is_supervised_fine_tuning(rows):
    """To the last bit: VanillaKD and DCKD at alpha = 0, ADPA at gamma = 0 or with teachers that agree everywhere."""
    logps, first, second = f64(rows).unbind(1)
    sft = sft_loss(logps, torch.full(logps.shape, 7))
    assert torch.equal(vanillakd_loss(sft, first, alpha=0.0), sft)
    assert torch.equal(dckd_loss(sft, first, second, alpha=0.0), sft)
    assert torch.equal(adpa_loss(sft, first, gamma=0.0), sft)
    assert torch.equal(adpa_loss(sft, torch.zeros_like(sft), gamma=1.7), sft)


@quick
@given(columns(3), BETAS)
def test_dckd_is_vanillakd_where_nothing_diverges_on_the_rejected_side(rows, alpha):
    sft, kl, _ = f64(rows).unbind(1)
    assert torch.equal(dckd_loss(sft, kl, torch.zeros_like(kl), alpha=alpha), vanillakd_loss(sft, kl, alpha=alpha))


@quick
@given(columns(4), BETAS)
def test_dpkd_is_dpo_with_the_teacher_as_reference(rows, beta):
    student_t, student_s, teacher_t, teacher_s = f64(rows).unbind(1)
    dpo = dpo_loss(student_t, student_s, ref_chosen=teacher_t, ref_rejected=teacher_s, beta=beta)
    assert torch.equal(dpkd_loss(student_t, student_s, teacher_t, teacher_s, beta=beta), dpo)


@quick
@given(columns(6), BETAS, BETAS)
def test_dadpo_between_dpo_and_dpkd(rows, beta, teacher_beta):
    """Bit for bit at either end; one reference in both places is DPO with the sum of the betas."""
    policy_w, policy_l, ref_w, ref_l, teacher_w, teacher_l = f64(rows).unbind(1)
    given = (policy_w, policy_l, ref_w, ref_l)
    dpo = dpo_loss(*given, beta=beta)
    assert torch.equal(dadpo_loss(*given, teacher_w, teacher_l, beta=beta, teacher_beta=0.0), dpo)
    dpkd = dpkd_loss(policy_w, policy_l, teacher_w, teacher_l, beta=teacher_beta)
    found = dadpo_loss(*given, teacher_w, teacher_l, beta=0.0, teacher_beta=teacher_beta)
    assert torch.equal(found, dpkd)
    both = dadpo_loss(*given, ref_w, ref_l, beta=beta, teacher_beta=teacher_beta)
    np.testing.assert_allclose(both, dpo_loss(*given, beta=beta + teacher_beta), rtol=1e-9, atol=1e-12)


@quick
@given(columns(3, -3.0, 3.0), BETAS, BETAS)
def test_the_policy_of_dadpo_is_the_optimum_of_a_reward_with_two_pulls(rows, beta, teacher_beta):
    """pi ~ ref^(b/(b+t)) teacher^(t/(b+t)) exp(r/(b+t)) maximises E r - b KL(pi|ref) - t KL(pi|teacher); there the
    margin of every pair is that of the reward."""
    reward, ref, teacher = (torch.cat([x, x.new_zeros(2)]) for x in f64(rows).unbind(1))
    ref, teacher = ref.log_softmax(0), teacher.log_softmax(0)
    total = beta + teacher_beta
    policy = ((beta * ref + teacher_beta * teacher + reward) / total).log_softmax(0)

    def objective(logits):
        p = logits.log_softmax(0)
        pulls = beta * (p - ref) + teacher_beta * (p - teacher)
        return (p.exp() * (reward - pulls)).sum()

    logits = policy.clone().requires_grad_()
    objective(logits).backward()
    np.testing.assert_allclose(logits.grad, np.zeros(len(policy)), atol=1e-11)  # nothing to climb
    for w in range(len(policy)):
        one = torch.full_like(policy, 1.0)
        given = [part for x in (policy, ref, teacher) for part in (x[w] * one, x)]
        loss = dadpo_loss(*given, beta=beta, teacher_beta=teacher_beta)
        np.testing.assert_allclose(loss, [softplus(-float(reward[w] - r)) for r in reward], rtol=1e-9, atol=1e-10)


def test_distillm2_is_one_half_of_two_divergences_of_different_kind():
    """Teacher 3/4, 1/4 and student 1/2, 1/2 at skew 0.5: both mixtures are 5/8, 3/8."""
    p, q = f64([[0.75, 0.25]]).log(), f64([[0.5, 0.5]]).log()
    found = distillm2_loss(skew_kl(p, q, skew=0.5), skew_kl(q, p, skew=0.5))
    forward = 0.75 * math.log(0.75 / 0.625) + 0.25 * math.log(0.25 / 0.375)
    backward = 0.5 * math.log(0.5 / 0.625) + 0.5 * math.log(0.5 / 0.375)
    assert found.tolist() == pytest.approx([(forward + backward) / 2], abs=1e-15)
