"""A teacher's token distributions in the student's tokens: mass, order, and the divergence that follows."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from prefdistill import METHODS
from prefdistill.losses import topk_kl
from prefdistill.methods import Student
from prefdistill.models.logprobs import likeliest, topk_logps
from prefdistill.models.token_map import TokenMap
from prefdistill.signals.projection import at_states, mass_shares, project
from prefdistill.signals.topk import TopK

quick = settings(max_examples=40, deadline=None, derandomize=True)


def distributions(seed, n=6, vocabulary=12, k=5, p=None, scale=3.0):
    """The k most likely tokens of random float32 distributions, some states with fewer."""
    logits = torch.from_numpy(np.random.default_rng(seed).normal(size=(n, vocabulary)).astype(np.float32)) * scale
    ids, logps, rest = likeliest(logits, k, p)
    width = int((ids >= 0).sum(1).max())
    return TopK(ids.numpy().astype(np.int64)[:, :width], logps.numpy()[:, :width], rest.numpy())


def mass_by_token(states, i):
    return {int(token): np.exp(np.float64(logp)) for token, logp in zip(states.ids[i], states.logps[i], strict=True)}


@quick
@given(st.integers(0, 10_000), st.lists(st.integers(-1, 6), min_size=12, max_size=12), st.sampled_from([None, 0.7]))
def test_mass_is_summed_by_token_and_what_goes_nowhere_joins_the_rest(seed, ids, p):
    states = distributions(seed, p=p)
    projected = project(states, np.array(ids))
    for i in range(len(states.ids)):
        expected, rest = {}, np.exp(np.float64(states.rest[i]))
        for token, mass in mass_by_token(states, i).items():
            if token >= 0 and ids[token] >= 0:
                expected[ids[token]] = expected.get(ids[token], 0.0) + mass
            else:
                rest += mass
        found = mass_by_token(projected, i)
        found.pop(-1, None)
        assert found == pytest.approx(expected, rel=1e-6)
        assert np.exp(projected.rest[i]) == pytest.approx(rest, rel=1e-6)
        assert sum(found.values()) + np.exp(projected.rest[i]) == pytest.approx(1, abs=1e-6)
        named = projected.ids[i] >= 0
        assert (np.diff(projected.logps[i][named]) <= 0).all()  # the most likely first, as packing has them
        assert not named[named.sum() :].any()
        assert np.isneginf(projected.logps[i][~named]).all()


@quick
@given(st.integers(0, 10_000), st.sampled_from([None, 0.7]), st.booleans())
def test_a_vocabulary_in_another_order_changes_nothing_but_the_ids(seed, p, tied):
    """To the last bit, in the same order, also of equally likely tokens; the identity is the case of the same ids."""
    states = distributions(seed, p=p, scale=0.0 if tied else 3.0)
    order = np.random.default_rng(seed).permutation(12)
    for table in (np.arange(12), order):
        projected = project(states, table)
        np.testing.assert_array_equal(projected.ids, np.where(states.ids >= 0, table[states.ids], -1))
        np.testing.assert_array_equal(projected.logps, states.logps)
        np.testing.assert_array_equal(projected.rest, states.rest)
        assert (projected.logps.dtype, projected.rest.dtype) == (states.logps.dtype, states.rest.dtype)


def kl_and_gradient(states, logits):
    logits = logits.clone().requires_grad_()
    at_ids, rest, _ = topk_logps(logits, torch.from_numpy(states.ids))
    kl = topk_kl(torch.from_numpy(states.logps), at_ids, torch.from_numpy(states.rest), rest)
    kl.sum().backward()
    return kl.detach(), logits.grad


def test_the_divergence_is_that_of_the_teachers_distribution_pushed_forward():
    """Naively in float64, over the whole vocabulary: each of the student's tokens has the sum of its teacher tokens."""
    states, table = distributions(3, k=12), np.array([0, 0, 1, 2, 2, 2, 3, 4, 0, 1, 5, 5])
    logits = torch.randn(6, 8, generator=torch.Generator().manual_seed(0))
    kl, gradient = kl_and_gradient(project(states, table), logits)
    for i in range(6):
        pushed = torch.zeros(8, dtype=torch.float64)
        for token, mass in mass_by_token(states, i).items():
            pushed[table[token]] += mass
        q = logits[i].double().log_softmax(-1)
        known = pushed > 0
        assert float(kl[i]) == pytest.approx(float((pushed * (pushed.log() - q))[known].sum()), abs=1e-5)
        torch.testing.assert_close(gradient[i].double(), q.exp() - pushed, atol=1e-6, rtol=0)


def test_divergence_and_gradient_do_not_depend_on_the_order_of_the_teachers_vocabulary():
    states, order = distributions(4), np.random.default_rng(1).permutation(12)
    logits = torch.randn(6, 12, generator=torch.Generator().manual_seed(1))
    teacher = TopK(np.where(states.ids >= 0, order[states.ids], -1), states.logps, states.rest)  # with permuted ids
    kl, gradient = kl_and_gradient(states, logits)
    other_kl, other_gradient = kl_and_gradient(project(teacher, np.argsort(order)), logits)
    assert torch.equal(kl, other_kl)
    assert torch.equal(gradient, other_gradient)
    assert kl.min() > 0.01


@pytest.mark.parametrize("name", ["vanillakd", "dckd", "distillm2"])
def test_a_state_that_is_not_shared_has_no_divergence_no_gradient_and_no_weight(name):
    """The mean is over the taught states of each response: leaving the others out of the response changes nothing."""
    method = METHODS[name](across="first_token")
    places, lengths = np.array([0, -1, 2, 3, -1, 5, -1]), torch.tensor([4, 2, 1])  # nothing of the last row is taught
    states = at_states(distributions(5), places)
    logits = torch.randn(7, 12, generator=torch.Generator().manual_seed(2), requires_grad=True)

    def loss_of(states, logits, lengths):
        at_ids, rest, _ = topk_logps(logits, torch.from_numpy(states.ids))
        student = Student(
            dict.fromkeys(method.responses, torch.zeros(len(lengths))),
            dict.fromkeys(method.responses, lengths),
            dict.fromkeys(method.responses, at_ids),
            dict.fromkeys(method.responses, rest),
        )
        signals = {}
        for response in method.responses:
            signals[f"{response}_ids"] = torch.from_numpy(states.ids)
            signals[f"teacher_{response}_topk"] = torch.from_numpy(states.logps)
            signals[f"teacher_{response}_rest"] = torch.from_numpy(states.rest)
        return method.loss(student, signals)

    loss, metrics = loss_of(states, logits, lengths)
    loss.backward()
    untaught = places < 0
    assert torch.equal(logits.grad[untaught], torch.zeros(3, 12))
    assert logits.grad[~untaught].abs().sum(1).min() > 0
    assert metrics[f"taught/{method.responses[0]}"].item() == pytest.approx(4 / 7)
    kl, _ = kl_and_gradient(states, logits.detach())
    assert kl[untaught].tolist() == [0.0] * 3
    if name != "distillm2":
        assert metrics["kl/chosen"].item() == pytest.approx((kl[:4].sum() / 3 + kl[4:6].sum() / 1 + 0).item() / 3)

    left = TopK(states.ids[~untaught], states.logps[~untaught], states.rest[~untaught])
    without, metrics = loss_of(left, logits.detach()[~untaught], torch.tensor([3, 1, 0]))
    assert (without.item(), metrics[f"taught/{method.responses[0]}"].item()) == (pytest.approx(loss.item()), 1)


def test_shares_of_the_mass_by_where_it_goes():
    states = at_states(distributions(6, k=12), np.array([0, 1, 2, -1, 3, 4, 5]))
    tokens = TokenMap(np.array([0, 1, 2, 3, 4, 5, 6, 7, 8, -1, -1, -1]), np.arange(12) < 6)
    probabilities = np.zeros((6, 12))
    np.put_along_axis(probabilities, states.ids[[0, 1, 2, 4, 5, 6]], np.exp(states.logps[[0, 1, 2, 4, 5, 6]]), axis=1)
    expected = {"exact": probabilities[:, :6], "start": probabilities[:, 6:9], "unmapped": probabilities[:, 9:]}
    shares = mass_shares(states, tokens)
    assert list(shares) == [*expected, "rest"]
    for name, part in expected.items():
        np.testing.assert_allclose(shares[name], part.sum(1), atol=1e-6)
    np.testing.assert_allclose(sum(shares.values()), 1, atol=1e-6)
