"""The soft value and the shaping return, against hand-derived numbers and naive float64 loops."""

import doctest
import inspect
import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.autograd import gradcheck

from prefdistill import losses
from prefdistill.losses import TERMINALS, shaping_return, soft_value

quick = settings(max_examples=15, deadline=None, derandomize=True)
TEMPERATURES = st.floats(0.05, 20.0)
LOGITS = st.lists(st.floats(-50.0, 50.0), min_size=1, max_size=8)


def naive_value(logits, temperature):
    top = max(logits)
    return top + temperature * math.log(sum(math.exp((z - top) / temperature) for z in logits))


def naive_return(values, length, discount, terminal, ended):
    states = [float(v) for v in values[: length + 1]]
    if ended and terminal == "last":
        states[length] = states[length - 1]
    if ended and terminal == "zero":
        states[length] = 0.0
    total = 0.0
    for t in range(length):
        total += discount * states[t + 1] - states[t]
    return total


@st.composite
def batches(draw, min_length=1):
    """(values with garbage after s_T, lengths, ended)."""
    rows = draw(st.integers(1, 3))
    longest = draw(st.integers(min_length, 6))
    lengths = draw(st.lists(st.integers(min_length, longest), min_size=rows, max_size=rows))
    ended = draw(st.lists(st.booleans(), min_size=rows, max_size=rows))
    number = st.floats(-100.0, 100.0)
    garbage = st.sampled_from([math.nan, math.inf, -math.inf, 1e30])
    values = [[draw(number if t <= length else garbage) for t in range(longest + 1)] for length in lengths]
    return torch.tensor(values, dtype=torch.float64), torch.tensor(lengths), torch.tensor(ended)


# ---------------------------------------------------------------- soft_value


@pytest.mark.parametrize(
    ("logits", "temperature", "expected"),
    [
        ([0.0, math.log(2), math.log(3)], 1.0, math.log(6)),  # log(1 + 2 + 3)
        ([0.0, 2 * math.log(2), 2 * math.log(3)], 2.0, 2 * math.log(6)),  # z / 2 = log 1, log 2, log 3
        ([0.0, math.log(2)], 0.5, 0.5 * math.log(5)),  # z / 0.5 = log 1, log 4
        ([7.25], 3.0, 7.25),  # one action: its own logit, whatever the temperature
        ([-math.inf, 1.0, 1.0], 1.0, 1.0 + math.log(2)),  # a masked id is as if it were not there
    ],
)
def test_soft_value_by_hand(logits, temperature, expected):
    assert soft_value(torch.tensor(logits, dtype=torch.float64), temperature).item() == pytest.approx(
        expected, abs=1e-14
    )


@quick
@given(LOGITS, TEMPERATURES)
def test_soft_value_is_the_naive_float64_sum(logits, temperature):
    value = soft_value(torch.tensor(logits, dtype=torch.float64), temperature)
    assert value.item() == pytest.approx(naive_value(logits, temperature), abs=1e-10)


@pytest.mark.parametrize("shape", [(5,), (3, 5), (2, 3, 5), (0, 5)])
def test_soft_value_reduces_the_last_axis_only(shape):
    logits = torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    values = soft_value(logits, 1.5)
    assert values.shape == shape[:-1]
    for index in np.ndindex(*shape[:-1]):
        assert values[index].item() == pytest.approx(naive_value(logits[index].tolist(), 1.5), abs=1e-13)


def test_soft_value_lies_between_the_limits_of_its_temperature():
    logits = torch.tensor([3.0, 1.0, -1.0], dtype=torch.float64)
    assert soft_value(logits, 1e-3).item() == pytest.approx(3.0, abs=1e-12)  # b -> 0: the maximum
    # b -> infinity: the mean plus b log n, up to variance / 2b = (4 + 0 + 4) / 3 / 2b
    wide = soft_value(logits, 1e5).item() - 1e5 * math.log(3)
    assert wide == pytest.approx(1.0 + 8 / 3 / 2e5, abs=1e-8)


@quick
@given(LOGITS, TEMPERATURES)
def test_gradient_of_soft_value_is_the_policy(logits, temperature):
    z = torch.tensor(logits, dtype=torch.float64, requires_grad=True)
    soft_value(z, temperature).backward()
    weights = [math.exp((x - max(logits)) / temperature) for x in logits]
    np.testing.assert_allclose(z.grad, [w / sum(weights) for w in weights], atol=1e-12)


def test_gradcheck_of_soft_value():
    logits = torch.randn(3, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(0), requires_grad=True)
    assert gradcheck(lambda z: soft_value(z, 0.7), logits)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
@pytest.mark.parametrize("temperature", [0.5, 1.0, 3.0])
def test_narrow_logits_give_float32_values(dtype, temperature):
    logits = (torch.randn(4, 300, generator=torch.Generator().manual_seed(0)) * 5).to(dtype)
    values = soft_value(logits, temperature)
    assert values.dtype == torch.float32
    # The naive sum starts from the rounded logits: only float32 arithmetic (2**-23, about 1e-7) may be lost, and
    # a sum in bfloat16 (2**-8) or float16 (2**-11) would be.
    expected = [naive_value(row.tolist(), temperature) for row in logits.double()]
    np.testing.assert_allclose(values, expected, rtol=2e-6)


def test_float64_logits_give_float64_values():
    assert soft_value(torch.zeros(2, 3, dtype=torch.float64)).dtype == torch.float64


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("temperature", [0.1, 1.0, 10.0])
@pytest.mark.parametrize("size", [1e4, -1e4])
def test_large_logits_stay_finite(dtype, temperature, size):
    logits = torch.full((4,), size, dtype=dtype)
    expected = logits[0].item() + temperature * math.log(4)  # four equal logits
    assert soft_value(logits, temperature).item() == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize("temperature", [0.0, -0.0, -1.0, math.nan])
def test_a_temperature_that_is_not_positive_is_refused(temperature):
    with pytest.raises(ValueError, match="temperature must be positive"):
        soft_value(torch.zeros(3), temperature)


@quick
@given(LOGITS, TEMPERATURES, st.floats(0.1, 10.0))
def test_property_5_scaling_logits_and_temperature_scales_the_value(logits, temperature, scale):
    z = torch.tensor(logits, dtype=torch.float64)
    scaled = soft_value(scale * z, scale * temperature)
    assert scaled.item() == pytest.approx(scale * naive_value(logits, temperature), rel=1e-10, abs=1e-9)


@quick
@given(LOGITS, TEMPERATURES, st.floats(-100.0, 100.0))
def test_the_value_is_gauge_dependent(logits, temperature, shift):
    """A constant added to all logits of a state keeps the policy and moves V by that constant."""
    moved = soft_value(torch.tensor(logits, dtype=torch.float64) + shift, temperature)
    assert moved.item() == pytest.approx(naive_value(logits, temperature) + shift, abs=1e-9)


@quick
@given(LOGITS)
def test_property_6_normalised_log_probs_have_value_zero(logits):
    log_probs = torch.tensor(logits, dtype=torch.float64).log_softmax(-1)
    assert abs(soft_value(log_probs, 1.0).item()) < 1e-12


@pytest.mark.parametrize(
    ("temperature", "expected"),
    [
        (2.0, 2 * math.log(1.4)),  # sqrt 0.36 + sqrt 0.64 = 0.6 + 0.8
        (0.5, 0.5 * math.log(0.5392)),  # 0.36^2 + 0.64^2 = 0.1296 + 0.4096
    ],
)
def test_property_6_renyi_by_hand(temperature, expected):
    log_probs = torch.tensor([0.36, 0.64], dtype=torch.float64).log()
    assert soft_value(log_probs, temperature).item() == pytest.approx(expected, abs=1e-14)


@quick
@given(
    st.lists(st.floats(-5.0, 5.0), min_size=1, max_size=8),
    st.one_of(st.floats(0.2, 0.95), st.floats(1.05, 5.0)),
)
def test_property_6_normalised_log_probs_give_a_renyi_entropy(logits, b):
    """With order a = 1/b, H_a = log(sum p^a) / (1 - a), so b log sum p^(1/b) = b (1 - 1/b) H_a = (b - 1) H_{1/b}."""
    log_probs = torch.tensor(logits, dtype=torch.float64).log_softmax(-1)
    order = 1 / b
    renyi = math.log(sum(p**order for p in log_probs.exp().tolist())) / (1 - order)
    assert soft_value(log_probs, b).item() == pytest.approx((b - 1) * renyi, abs=1e-11)


def test_property_6_near_temperature_one_it_is_the_shannon_entropy():
    probs = [0.5, 0.25, 0.25]
    shannon = 1.5 * math.log(2)  # 1/2 log 2 + 1/4 log 4 + 1/4 log 4
    log_probs = torch.tensor(probs, dtype=torch.float64).log()
    assert soft_value(log_probs, 1 + 1e-6).item() / 1e-6 == pytest.approx(shannon, abs=1e-5)


# ------------------------------------------------------------ shaping_return

# V(s_0) .. V(s_3) = 1, 2, 5, 11, T = 3
HAND = [
    (1.0, "bootstrap", True, 10.0),  # (2 - 1) + (5 - 2) + (11 - 5)
    (1.0, "last", True, 4.0),  # (2 - 1) + (5 - 2) + (5 - 5)
    (1.0, "zero", True, -1.0),  # (2 - 1) + (5 - 2) + (0 - 5)
    (0.5, "bootstrap", True, 1.0),  # (1 - 1) + (2.5 - 2) + (5.5 - 5)
    (0.5, "last", True, -2.0),  # (1 - 1) + (2.5 - 2) + (2.5 - 5)
    (0.5, "zero", True, -4.5),  # (1 - 1) + (2.5 - 2) + (0 - 5)
    *[(1.0, terminal, False, 10.0) for terminal in TERMINALS],  # truncated: always V(s_T)
    *[(0.5, terminal, False, 1.0) for terminal in TERMINALS],
]


@pytest.mark.parametrize(("discount", "terminal", "ended", "expected"), HAND)
def test_shaping_return_by_hand(discount, terminal, ended, expected):
    values = torch.tensor([[1.0, 2.0, 5.0, 11.0]])
    psi = shaping_return(values, torch.tensor([3]), discount, terminal, torch.tensor([ended]))
    assert psi.tolist() == [expected]


@pytest.mark.parametrize(("terminal", "expected"), [("bootstrap", 1.0), ("last", -1.5), ("zero", -3.0)])
def test_a_response_of_one_token(terminal, expected):
    """V = 3, 8 and discount 0.5: 4 - 3, 1.5 - 3 (the last state before the end token is the prompt), 0 - 3."""
    psi = shaping_return(torch.tensor([[3.0, 8.0]]), torch.tensor([1]), 0.5, terminal)
    assert psi.tolist() == [expected]


@pytest.mark.parametrize("terminal", TERMINALS)
@quick
@given(batch=batches(), discount=st.one_of(st.just(1.0), st.floats(0.0, 1.5)))
def test_shaping_return_is_the_naive_sum_over_steps(terminal, batch, discount):
    values, lengths, ended = batch
    psi = shaping_return(values, lengths, discount, terminal, ended)
    assert psi.shape == lengths.shape
    expected = [
        naive_return(row, length, discount, terminal, end)
        for row, length, end in zip(values.tolist(), lengths.tolist(), ended.tolist(), strict=True)
    ]
    np.testing.assert_allclose(psi, expected, atol=1e-9)


@pytest.mark.parametrize("discount", [1.0, 0.9])
@pytest.mark.parametrize("terminal", TERMINALS)
@pytest.mark.parametrize("garbage", [math.nan, math.inf, -math.inf])
def test_garbage_after_the_final_state_is_never_read(discount, terminal, garbage):
    """Padding equals deleting; where the response ended, "last" and "zero" do not read V(s_T) either."""
    clean = torch.tensor([[1.0, -2.0, 4.0, 0.5, 3.0], [2.0, 7.0, -1.0, 6.0, 9.0]], dtype=torch.float64)
    for ended in (True, False):
        for length in range(1, 5):
            values = clean.clone()
            read = length + 1 if not ended or terminal == "bootstrap" else length
            values[0, read:] = garbage
            mixed = shaping_return(values, torch.tensor([length, 4]), discount, terminal, torch.tensor([ended, True]))
            alone = shaping_return(
                clean[:1, : length + 1], torch.tensor([length]), discount, terminal, torch.tensor([ended])
            )
            assert mixed[0].item() == pytest.approx(alone.item(), abs=1e-14)
            assert mixed[1].item() == pytest.approx(naive_return(clean[1], 4, discount, terminal, True), abs=1e-12)


@pytest.mark.parametrize("terminal", TERMINALS)
@quick
@given(batch=batches())
def test_property_3_a_truncated_response_always_uses_its_last_value(terminal, batch):
    values, lengths, _ = batch
    psi = shaping_return(values, lengths, terminal=terminal, ended=torch.zeros_like(lengths, dtype=torch.bool))
    expected = [float(row[n] - row[0]) for row, n in zip(values.numpy(), lengths.tolist(), strict=True)]
    assert psi.tolist() == expected


def test_the_default_is_last_on_ended_responses_without_discount():
    values = torch.tensor([[1.0, 2.0, 5.0, 11.0], [4.0, 2.0, 8.0, 1.0]])
    lengths = torch.tensor([3, 2])
    assert shaping_return(values, lengths).tolist() == [5.0 - 1.0, 2.0 - 4.0]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("discount", [1.0, 0.9])
@pytest.mark.parametrize("terminal", TERMINALS)
def test_shaping_return_keeps_the_dtype(dtype, discount, terminal):
    assert shaping_return(torch.ones(2, 3, dtype=dtype), torch.tensor([1, 2]), discount, terminal).dtype == dtype


@pytest.mark.parametrize("discount", [1.0, 0.75])
def test_shaping_return_of_an_empty_batch_is_empty(discount):
    assert shaping_return(torch.zeros(0, 3), torch.zeros(0, dtype=torch.long), discount).shape == (0,)


def test_weight_of_every_value_in_the_discounted_return():
    """d Psi / d V(s_t): -1 at t = 0, g - 1 between, g at T, nothing after it; T = 3 and g = 0.75."""
    values = torch.randn(1, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(0), requires_grad=True)
    shaping_return(values, torch.tensor([3]), 0.75, "bootstrap").sum().backward()
    assert values.grad.tolist() == [[-1.0, -0.25, -0.25, 0.75, 0.0, 0.0]]


@pytest.mark.parametrize("terminal", ["Last", "none", "", None])
def test_an_unknown_terminal_is_refused(terminal):
    with pytest.raises(ValueError, match="terminal must be one of last, bootstrap, zero"):
        shaping_return(torch.zeros(1, 3), torch.tensor([2]), terminal=terminal)


@pytest.mark.parametrize("lengths", [[0, 2], [-1, 2], [1, 3], [1, 100]])
def test_lengths_out_of_range_are_refused(lengths):
    with pytest.raises(ValueError, match=r"lengths must lie in 1\.\.2"):
        shaping_return(torch.zeros(2, 3), torch.tensor(lengths))


@pytest.mark.parametrize(("values", "lengths"), [((3,), (1,)), ((2, 3), (3,)), ((2, 3), (2, 1)), ((2, 3, 1), (2,))])
def test_shapes_that_do_not_fit_are_refused(values, lengths):
    with pytest.raises(ValueError, match="values must be"):
        shaping_return(torch.zeros(values), torch.ones(lengths, dtype=torch.long))


# ------------------------------------------------------- docstring examples


@pytest.mark.parametrize("name", [n for n in losses.__all__ if inspect.isfunction(getattr(losses, n))])
def test_every_public_loss_has_an_example(name):
    assert doctest.DocTestParser().get_examples(inspect.getdoc(getattr(losses, name)))


@pytest.mark.parametrize("shape", [(2, 1), (1,)])
def test_ended_of_another_shape_is_refused(shape):
    with pytest.raises(ValueError, match="ended must be"):
        shaping_return(torch.zeros(2, 4), torch.tensor([2, 3]), ended=torch.ones(shape, dtype=torch.bool))


def test_ended_may_be_a_column_of_zeros_and_ones():
    values, lengths = torch.tensor([[1.0, 2.0, 5.0], [1.0, 2.0, 5.0]]), torch.tensor([2, 2])
    assert shaping_return(values, lengths, ended=torch.tensor([1, 0])).tolist() == [1.0, 4.0]
