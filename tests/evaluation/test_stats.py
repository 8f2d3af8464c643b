"""Error bars: by hand, against scipy on the raw data, and by the coverage of the interval."""

import math

import numpy as np
import pytest
from scipy.stats import bootstrap

from prefdistill.evaluation.stats import crossed, estimate, mean_and_error


def test_mean_and_error_by_hand():
    result = mean_and_error([1, 2, 6])  # mean 3, squares 4 + 1 + 9, s^2 = 7
    half = 4.302653 * math.sqrt(7 / 3)  # Student's t of 2 degrees of freedom
    interval = {"low": pytest.approx(3 - half), "high": pytest.approx(3 + half)}
    assert result == {"mean": 3.0, "se": pytest.approx(math.sqrt(7 / 3)), "n": 3, **interval}
    assert mean_and_error([5.0]) == {"mean": 5.0, "se": None, "n": 1}
    assert mean_and_error(np.array([True, True])) == {"mean": 1.0, "se": 0.0, "n": 2, "low": 1.0, "high": 1.0}


def test_every_item_has_the_same_weight_whatever_its_group():
    result = estimate([1, 1, 1, 0], ["long", "long", "long", "short"])
    assert (result["mean"], result["n"]) == (0.75, 2)
    # the draws are (long, long), (short, short) and twice (long, short), whose ratio of sums is 3/4
    assert (result["low"], result["high"]) == (0.0, 1.0)
    outcomes = np.array([1, 0, 0.75, 0.75])
    assert result["se"] == pytest.approx(outcomes.std(), rel=0.05)


def test_without_groups_equals_scipys_bootstrap_of_the_mean():
    values = np.random.default_rng(0).exponential(size=60)
    result = estimate(values, seed=3, resamples=500)
    expected = bootstrap((values,), np.mean, n_resamples=500, method="percentile", rng=np.random.default_rng(3))
    assert result["low"] == pytest.approx(expected.confidence_interval.low)
    assert result["high"] == pytest.approx(expected.confidence_interval.high)
    assert result["se"] == pytest.approx(expected.standard_error)
    assert result["se"] == pytest.approx(mean_and_error(values)["se"], rel=0.1)


def test_groups_are_resampled_whole():
    """Against a bootstrap that gathers the raw items of each drawn group."""
    rng = np.random.default_rng(1)
    items = [rng.normal(rng.normal(), 1, size) for size in rng.integers(1, 9, 25)]
    groups = [f"prompt {g}" for g, values in enumerate(items) for _ in values]
    order = rng.permutation(len(groups))  # the items of a group need not stand together
    result = estimate(np.concatenate(items)[order], [groups[i] for i in order], resamples=4_000)
    drawn = [np.concatenate([items[g] for g in rng.integers(0, 25, 25)]).mean() for _ in range(4_000)]
    assert result["n"] == 25
    assert result["se"] == pytest.approx(np.std(drawn, ddof=1), rel=0.06)
    assert [result["low"], result["high"]] == pytest.approx(np.percentile(drawn, [2.5, 97.5]), abs=0.15 * result["se"])


def test_reproducible_and_nearly_equal_in_batches(monkeypatch):
    values, groups = np.arange(50) % 7, [str(i // 3) for i in range(50)]
    once = estimate(values, groups, seed=1)
    assert once == estimate(values, groups, seed=1)
    assert once != estimate(values, groups, seed=2)
    monkeypatch.setattr("prefdistill.evaluation.stats.BATCH_NUMBERS", 100)
    assert once == pytest.approx(estimate(values, groups, seed=1), rel=0.1)


def test_no_interval_for_one_group_or_infinite_values():
    assert estimate([1.0, 3.0], ["a", "a"]) == {"mean": 2.0, "se": None, "n": 1}
    assert estimate([4.0]) == {"mean": 4.0, "se": None, "n": 1}
    assert estimate([1.0, -math.inf]) == {"mean": -math.inf, "se": None, "n": 2}
    assert estimate([1, 1, 1]) == {"mean": 1.0, "se": 0.0, "n": 3, "low": 1.0, "high": 1.0}
    with pytest.raises(ValueError, match="at least one number"):
        estimate([])
    with pytest.raises(ValueError, match="a group for each value, got 1 groups and 2 values"):
        estimate([1.0, 2.0], ["a"])


def test_coverage_of_the_interval():
    """Groups of 1 to 14 items that share half of their variance; drawing items alone would be far too sure."""
    rng = np.random.default_rng(2)
    whole = alone = 0
    runs = 300
    for _ in range(runs):
        groups = np.repeat(np.arange(60), rng.integers(1, 15, 60))
        values = rng.normal(size=60)[groups] + rng.normal(size=len(groups))
        for by_group in (True, False):
            result = estimate(values, groups if by_group else None, resamples=400)
            inside = result["low"] <= 0 <= result["high"]
            whole, alone = whole + (inside and by_group), alone + (inside and not by_group)
    assert 0.90 < whole / runs < 0.98
    assert alone / runs < 0.75


def test_crossed_by_the_textbook():
    """The mean squares of a two-way layout, in loops."""
    x = np.random.default_rng(0).normal(size=(3, 8)) + np.arange(3)[:, None] / 4 + np.arange(8)
    (repeats, items), mean = x.shape, x.mean()
    of_repeats = sum(items * (row.mean() - mean) ** 2 for row in x) / (repeats - 1)
    of_items = sum(repeats * (column.mean() - mean) ** 2 for column in x.T) / (items - 1)
    rest = sum((x[r, i] - x[r].mean() - x[:, i].mean() + mean) ** 2 for r in range(repeats) for i in range(items)) / (
        (repeats - 1) * (items - 1)
    )
    result = crossed(x)
    assert result["se"] ** 2 == pytest.approx((of_repeats + of_items - rest) / (repeats * items))
    assert (result["mean"], result["n"], result["prompts"]) == (pytest.approx(mean), 3, 8)
    half = result["high"] - mean
    assert mean - result["low"] == pytest.approx(half)
    assert 1.96 * result["se"] < half < 4.31 * result["se"]  # between infinitely many degrees of freedom and two


def test_crossed_is_never_surer_than_over_repeats_or_over_items_alone():
    rng = np.random.default_rng(1)
    for _ in range(50):
        x = rng.normal(size=(3, 1)) * rng.random() + rng.normal(size=6) * rng.random() + rng.normal(size=(3, 6))
        se = crossed(x)["se"]
        assert se >= mean_and_error(x.mean(axis=1))["se"] - 1e-12
        assert se >= mean_and_error(x.mean(axis=0))["se"] - 1e-12


def test_crossed_where_only_repeats_or_only_items_vary():
    same_repeats, same_items = np.tile([1.0, 2.0, 6.0], (2, 1)), np.tile([[1.0], [2.0], [6.0]], 5)
    over_items, over_repeats = crossed(same_repeats), crossed(same_items)
    for key in ("mean", "se", "low", "high"):
        assert over_items[key] == pytest.approx(mean_and_error([1, 2, 6])[key])
        assert over_repeats[key] == pytest.approx(mean_and_error([1, 2, 6])[key])
    assert crossed(np.ones((2, 3))) == {"mean": 1.0, "se": 0.0, "n": 2, "low": 1.0, "high": 1.0, "prompts": 3}


def test_crossed_weighs_every_item_alike_whatever_its_group():
    groups = ["a", "b", "a", "c", "a"]
    values = np.array([[1.0, 0, 1, 0, 1], [1, 1, 1, 0, 1]])
    result = crossed(values, groups)
    assert (result["mean"], result["prompts"]) == (pytest.approx(0.7), 3)
    in_groups = np.tile(np.random.default_rng(2).normal(size=(2, 6)), 2)  # every item twice: nothing new
    assert crossed(in_groups, [*range(6), *range(6)]) == pytest.approx(crossed(in_groups[:, :6]))


def test_crossed_without_repeats_groups_or_finite_values():
    assert crossed([[1.0, 3.0]]) == {"mean": 2.0, "se": None, "n": 1}
    assert crossed([[1.0, 3.0], [3.0, 5.0]], ["a", "a"]) == mean_and_error([2.0, 4.0])
    assert crossed([[1.0, math.inf], [1.0, 1.0]]) == {"mean": math.inf, "se": None, "n": 2}


@pytest.mark.parametrize(
    ("of_repeats", "of_items", "rest"), [(0.0, 0.5, 1.0), (0.3, 0.5, 1.0), (0.1, 1.0, 0.3), (0.0, 0.0, 1.0)]
)
def test_coverage_of_the_crossed_interval(of_repeats, of_items, rest):
    """New repeats and new items: the error over either alone would be too small."""
    rng, runs, inside = np.random.default_rng(3), 400, 0
    for _ in range(runs):
        x = of_repeats * rng.normal(size=(3, 1)) + of_items * rng.normal(size=40) + rest * rng.normal(size=(3, 40))
        result = crossed(x)
        inside += result["low"] <= 0 <= result["high"]
    assert 0.91 < inside / runs <= 1
