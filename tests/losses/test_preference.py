"""SFT, DPO and TVKD: hand-derived values and gradients, naive float64 references, and what follows from the formula."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.autograd import gradcheck

from prefdistill.losses import TERMINALS, dpo_loss, sft_loss, shaping_return, tvkd_loss

quick = settings(max_examples=15, deadline=None, derandomize=True)
BETAS = st.floats(0.01, 2.0)
ALPHAS = st.floats(-2.0, 2.0)


def naive_minus_log_sigmoid(margin):
    return math.log1p(math.exp(-margin)) if margin > 0 else -margin + math.log1p(math.exp(margin))


def sigmoid(x):
    return math.exp(-naive_minus_log_sigmoid(x))


def naive_margin(row, beta, alpha=0.0):
    """row: policy_w, policy_l, ref_w, ref_l, psi_w, psi_l."""
    policy_w, policy_l, ref_w, ref_l, psi_w, psi_l = (float(x) for x in row)
    return beta * policy_w - beta * ref_w - beta * policy_l + beta * ref_l + alpha * psi_w - alpha * psi_l


def f64(rows):
    return torch.tensor(rows, dtype=torch.float64)


def columns(rows):
    return f64(rows).unbind(1)


def random_columns(count, rows=7, seed=0):
    return [5 * x for x in torch.randn(count, rows, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))]


def rows_of(width, low=-30.0, high=30.0):
    row = st.lists(st.floats(low, high), min_size=width, max_size=width)
    return st.lists(row, min_size=1, max_size=3)


@st.composite
def pairs(draw, min_length=1):
    """One pair: the values of the two responses, which share V(s_0), as [2, T + 1]; their two lengths."""
    lengths = [draw(st.integers(min_length, 6)) for _ in range(2)]
    start = draw(st.floats(-50.0, 50.0))
    values = [[start, *draw(st.lists(st.floats(-50.0, 50.0), min_size=6, max_size=6))] for _ in range(2)]
    return f64(values), torch.tensor(lengths)


# ----------------------------------------------------------------------- SFT


def test_sft_by_hand():
    """4 / 2, 2 / 1 and 0.5 / 10: each response by its own tokens."""
    loss = sft_loss(f64([-4.0, -2.0, -0.5]), torch.tensor([2, 1, 10]))
    assert loss.tolist() == [2.0, 2.0, 0.05]


def test_gradient_of_sft():
    log_probs = f64([-4.0, -2.0, -0.5]).requires_grad_()
    sft_loss(log_probs, torch.tensor([2, 1, 5])).sum().backward()
    assert log_probs.grad.tolist() == [-1 / 2, -1.0, -1 / 5]
    assert gradcheck(lambda p: sft_loss(p, torch.tensor([2, 1, 5])), log_probs)


# ----------------------------------------------------------------------- DPO


def test_dpo_by_hand():
    """Margins 0.5 * [(-1 + 3) - (-4 + 2)] = 2 and 0.1 * ... = 0.4; log(1 + e^-m)."""
    row = columns([[-1.0, -4.0, -3.0, -2.0]])
    assert dpo_loss(*row, beta=0.5).tolist() == pytest.approx([math.log(1 + math.exp(-2.0))], abs=1e-15)
    assert dpo_loss(*row, beta=0.1).tolist() == pytest.approx([math.log(1 + math.exp(-0.4))], abs=1e-15)


@quick
@given(rows_of(4), BETAS)
def test_dpo_is_the_naive_float64_loss(rows, beta):
    expected = [naive_minus_log_sigmoid(naive_margin([*row, 0, 0], beta)) for row in rows]
    np.testing.assert_allclose(dpo_loss(*columns(rows), beta=beta), expected, rtol=1e-10, atol=1e-12)


@quick
@given(rows_of(4), BETAS)
def test_gradient_of_dpo_is_beta_times_the_sigmoid_of_the_negative_margin(rows, beta):
    inputs = [x.clone().requires_grad_() for x in columns(rows)]
    dpo_loss(*inputs, beta=beta).sum().backward()
    slope = np.array([beta * sigmoid(-naive_margin([*row, 0, 0], beta)) for row in rows])
    for x, sign in zip(inputs, (-1, 1, 1, -1), strict=True):  # policy_w, policy_l, ref_w, ref_l
        np.testing.assert_allclose(x.grad, sign * slope, rtol=1e-9, atol=1e-12)


def test_gradcheck_of_dpo():
    inputs = [x.requires_grad_() for x in random_columns(4)]
    assert gradcheck(lambda *x: dpo_loss(*x, beta=0.3), inputs)


def test_dpo_is_log_two_where_the_student_is_the_reference():
    policy_w, policy_l = random_columns(2)
    loss = dpo_loss(policy_w, policy_l, policy_w, policy_l, beta=0.3)
    np.testing.assert_allclose(loss, np.full(7, math.log(2)), rtol=1e-15)


@pytest.mark.parametrize("loss", [dpo_loss, tvkd_loss])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_extreme_margins_stay_finite(loss, dtype):
    """A margin of -10,000 costs 10,000 with slope -1, one of 10,000 costs 0 with slope 0; log(sigmoid(.)) overflows."""
    policy_w = torch.tensor([-1e4, 0.0], dtype=dtype, requires_grad=True)
    policy_l = torch.tensor([0.0, -1e4], dtype=dtype)
    zero = torch.zeros(2, dtype=dtype)
    if loss is dpo_loss:
        result = dpo_loss(policy_w, policy_l, zero, zero, beta=1.0)
    else:
        result = tvkd_loss(policy_w, policy_l, zero, zero, zero, zero, beta=1.0, alpha=0.7)
    result.sum().backward()
    assert result.tolist() == [1e4, 0.0]
    assert policy_w.grad.tolist() == [-1.0, 0.0]


@quick
@given(rows_of(6), BETAS, ALPHAS)
def test_swapping_the_pair_gives_the_other_probability(rows, beta, alpha):
    policy_w, policy_l, ref_w, ref_l, psi_w, psi_l = columns(rows)
    one_way = tvkd_loss(policy_w, policy_l, ref_w, ref_l, psi_w, psi_l, beta=beta, alpha=alpha)
    other_way = tvkd_loss(policy_l, policy_w, ref_l, ref_w, psi_l, psi_w, beta=beta, alpha=alpha)
    np.testing.assert_allclose(torch.exp(-one_way) + torch.exp(-other_way), np.ones(len(rows)), rtol=1e-12)


# ---------------------------------------------------------------------- TVKD


def test_tvkd_by_hand():
    """0.5 * [(-1 + 3) - (-4 + 2)] + 0.25 * (3 - 5) = 2 - 0.5 = 1.5; alpha = -0.25: 2 + 0.5 = 2.5."""
    row = columns([[-1.0, -4.0, -3.0, -2.0, 3.0, 5.0]])
    for alpha, margin in ((0.25, 1.5), (-0.25, 2.5)):
        loss = tvkd_loss(*row, beta=0.5, alpha=alpha)
        assert loss.tolist() == pytest.approx([math.log(1 + math.exp(-margin))], abs=1e-15)


@quick
@given(rows_of(6), BETAS, ALPHAS)
def test_tvkd_is_the_naive_float64_loss(rows, beta, alpha):
    expected = [naive_minus_log_sigmoid(naive_margin(row, beta, alpha)) for row in rows]
    np.testing.assert_allclose(tvkd_loss(*columns(rows), beta=beta, alpha=alpha), expected, rtol=1e-10, atol=1e-12)


@quick
@given(rows_of(6), BETAS, ALPHAS)
def test_gradient_of_tvkd(rows, beta, alpha):
    inputs = [x.clone().requires_grad_() for x in columns(rows)]
    tvkd_loss(*inputs, beta=beta, alpha=alpha).sum().backward()
    slope = np.array([beta * sigmoid(-naive_margin(row, beta, alpha)) for row in rows])
    for x, sign in zip(inputs[:4], (-1, 1, 1, -1), strict=True):
        np.testing.assert_allclose(x.grad, sign * slope, rtol=1e-9, atol=1e-12)


def test_gradcheck_of_tvkd():
    *inputs, psi_w, psi_l = random_columns(6)
    inputs = [x.requires_grad_() for x in inputs]
    assert gradcheck(lambda *x: tvkd_loss(*x, psi_w, psi_l, beta=0.3, alpha=0.7), inputs)


@pytest.mark.parametrize("discount", [1.0, 0.9])
@pytest.mark.parametrize("terminal", TERMINALS)
def test_the_shaping_carries_no_gradient(discount, terminal):
    """Neither to the returns nor through them to the values they are made of."""
    policy_w, policy_l, ref_w, ref_l = (x.requires_grad_() for x in random_columns(4))
    values = torch.randn(14, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(1), requires_grad=True)
    psi = shaping_return(values, torch.full((14,), 3), discount, terminal)
    psi.retain_grad()
    tvkd_loss(policy_w, policy_l, ref_w, ref_l, psi[:7], psi[7:], beta=0.3, alpha=0.7).sum().backward()
    assert values.grad is None
    assert psi.grad is None
    assert (policy_w.grad < 0).all()
    assert (policy_l.grad > 0).all()


@quick
@given(rows_of(6), BETAS)
def test_tvkd_without_its_teacher_is_dpo_bit_for_bit(rows, beta):
    inputs = [x.float() for x in columns(rows)]
    assert torch.equal(tvkd_loss(*inputs, beta=beta, alpha=0.0), dpo_loss(*inputs[:4], beta=beta))


@pytest.mark.parametrize(("alpha", "cheaper"), [(0.7, True), (-0.7, False)])
def test_a_teacher_that_prefers_the_chosen_response_lowers_the_loss_unless_alpha_turns_it(alpha, cheaper):
    row, psi = random_columns(4), torch.ones(7, dtype=torch.float64)
    with_teacher = tvkd_loss(*row, psi, -psi, beta=0.1, alpha=alpha)
    assert ((with_teacher < dpo_loss(*row, beta=0.1)) == cheaper).all()


# ------------------------------------------------ what follows from the formula


def tvkd_of(pair, psi, beta=0.3, alpha=0.7):
    return tvkd_loss(*f64(pair).reshape(4, 1), psi[:1], psi[1:], beta=beta, alpha=alpha)


PAIR = st.lists(st.floats(-10.0, 10.0), min_size=4, max_size=4)
ENDED = st.lists(st.booleans(), min_size=2, max_size=2).map(torch.tensor)


@pytest.mark.parametrize("terminal", TERMINALS)
@pytest.mark.parametrize("discount", [1.0, 0.9])
@quick
@given(pair=PAIR, responses=pairs(min_length=2), ended=ENDED, start=st.floats(-50.0, 50.0))
def test_property_1_the_value_of_the_prompt_cancels(terminal, discount, pair, responses, ended, start):
    values, lengths = responses
    moved = values.clone()
    moved[:, 0] = start
    psi, psi_moved = (shaping_return(v, lengths, discount, terminal, ended) for v in (values, moved))
    np.testing.assert_allclose(psi - psi_moved, (start - values[:, 0]), atol=1e-10)  # each response does see it
    np.testing.assert_allclose(tvkd_of(pair, psi), tvkd_of(pair, psi_moved), atol=1e-10)


def test_property_1_a_one_token_response_ends_at_the_prompt_itself():
    """Under "last" with T = 1, V(s_{T-1}) is V(s_0): Psi is 0, and the other response brings V(s_0) into the margin."""
    values = torch.tensor([[3.0, 8.0, 0.0], [3.0, 5.0, 9.0]])
    psi = shaping_return(values, torch.tensor([1, 2]), terminal="last")
    assert psi.tolist() == [0.0, 5.0 - 3.0]


@quick
@given(rows_of(6), BETAS, ALPHAS)
def test_property_2_tvkd_is_dpo_with_other_reference_log_probs(rows, beta, alpha):
    policy_w, policy_l, ref_w, ref_l, psi_w, psi_l = columns(rows)
    shifted_w, shifted_l = ref_w - alpha / beta * psi_w, ref_l - alpha / beta * psi_l

    ours = [policy_w.clone().requires_grad_(), policy_l.clone().requires_grad_()]
    theirs = [policy_w.clone().requires_grad_(), policy_l.clone().requires_grad_()]
    loss = tvkd_loss(*ours, ref_w, ref_l, psi_w, psi_l, beta=beta, alpha=alpha)
    same = dpo_loss(*theirs, shifted_w, shifted_l, beta=beta)

    np.testing.assert_allclose(loss.detach(), same.detach(), rtol=1e-9, atol=1e-12)
    loss.sum().backward()
    same.sum().backward()
    for x, y in zip(ours, theirs, strict=True):
        np.testing.assert_allclose(x.grad, y.grad, rtol=1e-9, atol=1e-12)


@quick
@given(pair=PAIR, responses=pairs(), dtype=st.sampled_from([torch.float32, torch.float64]))
def test_property_3_a_zero_terminal_potential_makes_tvkd_dpo_to_the_last_bit(pair, responses, dtype):
    values, lengths = responses
    psi = shaping_return(values.to(dtype), lengths, 1.0, "zero")
    assert (psi[0] - psi[1]).item() == 0.0
    row = f64(pair).to(dtype).reshape(4, 1)
    loss = tvkd_loss(*row, psi[:1], psi[1:], beta=0.3, alpha=0.7)
    assert torch.equal(loss, dpo_loss(*row, beta=0.3))


@pytest.mark.parametrize(
    ("terminal", "ended", "margin"),
    [
        # chosen V = 1, 4, 6 (T = 2), rejected V = 1, 2, 9, 3 (T = 3)
        ("bootstrap", [True, True], 6.0 - 3.0),  # V(s_T) of both
        ("last", [True, True], 4.0 - 9.0),  # V(s_{T-1}) of both
        ("zero", [True, True], 0.0),
        ("bootstrap", [True, False], 6.0 - 3.0),
        ("last", [True, False], 4.0 - 3.0),  # the truncated response keeps its V(s_T)
        ("zero", [True, False], 0.0 - 3.0),  # "zero" is DPO only where both responses ended
        ("last", [False, True], 6.0 - 9.0),
        ("zero", [False, True], 6.0 - 0.0),
    ],
)
def test_property_3_what_the_teacher_adds_is_the_value_of_the_last_state(terminal, ended, margin):
    values = f64([[1.0, 4.0, 6.0, math.nan], [1.0, 2.0, 9.0, 3.0]])
    psi = shaping_return(values, torch.tensor([2, 3]), terminal=terminal, ended=torch.tensor(ended))
    loss = tvkd_of([0.0, 0.0, 0.0, 0.0], psi, beta=0.1, alpha=0.7)
    assert loss.item() == pytest.approx(naive_minus_log_sigmoid(0.7 * margin), abs=1e-14)


@pytest.mark.parametrize("terminal", TERMINALS)
@quick
@given(pair=PAIR, responses=pairs(), both_ended=st.booleans(), constant=st.floats(-100.0, 100.0))
def test_property_5_a_constant_added_to_every_value_changes_nothing(terminal, pair, responses, both_ended, constant):
    values, lengths = responses
    ended = torch.tensor([both_ended, both_ended])
    psi, moved = (shaping_return(v, lengths, 1.0, terminal, ended) for v in (values, values + constant))
    np.testing.assert_allclose(tvkd_of(pair, psi), tvkd_of(pair, moved), atol=1e-10)


@pytest.mark.parametrize(("terminal", "moves_by"), [("bootstrap", 0.0), ("last", 0.0), ("zero", -10.0)])
def test_property_5_fails_where_zero_meets_a_truncated_response(terminal, moves_by):
    """0 is not moved by the constant and the truncated response's V(s_T) is: the margin moves by (0 - 10)."""
    values, lengths, ended = f64([[1.0, 4.0, 6.0], [1.0, 2.0, 9.0]]), torch.tensor([2, 2]), torch.tensor([True, False])
    before, after = (shaping_return(v, lengths, 1.0, terminal, ended) for v in (values, values + 10.0))
    assert ((after[0] - after[1]) - (before[0] - before[1])).item() == moves_by


def test_property_5_needs_discount_one():
    """With g = 0.5 a constant 8 adds (0.5 - 1) * 8 = -4 per token: lengths 2 and 3 move by -8 and -12."""
    values, lengths = f64([[1.0, 4.0, 6.0, 0.0], [1.0, 2.0, 9.0, 3.0]]), torch.tensor([2, 3])
    before, after = (shaping_return(v, lengths, 0.5, "bootstrap") for v in (values, values + 8.0))
    assert (after - before).tolist() == [-8.0, -12.0]


@pytest.mark.parametrize("place", range(6))
def test_shapes_that_would_broadcast_are_refused(place):
    arguments = [torch.zeros(3) for _ in range(6)]
    arguments[place] = torch.zeros(3, 1)
    with pytest.raises(ValueError, match=r"shape \[B\]"):
        tvkd_loss(*arguments, beta=0.1, alpha=0.7)
    if place < 4:
        with pytest.raises(ValueError, match=r"shape \[B\]"):
            dpo_loss(*arguments[:4], beta=0.1)
