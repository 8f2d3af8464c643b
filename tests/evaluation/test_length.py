"""Preferences with length taken out: whoever goes by length alone is at one half, whoever does not is not."""

import numpy as np
import pytest

from prefdistill.evaluation.length import length_balanced, length_controlled, length_controlled_wins
from prefdistill.evaluation.stats import estimate, pair_wins

RNG = np.random.default_rng(0)
EXTRA = np.where(RNG.random(400) < 0.8, 1, -1) * RNG.integers(1, 50, 400)  # chosen responses are longer in four of five


@pytest.mark.parametrize("sign", [1, -1])
def test_a_judge_by_length_is_at_one_half_and_a_good_one_is_not(sign):
    by_length = pair_wins(sign * EXTRA, 0 * EXTRA)
    assert by_length.mean() == pytest.approx(0.5 + sign * (np.mean(EXTRA > 0) - 0.5))
    assert length_balanced(by_length, EXTRA).mean() == pytest.approx(0.5)
    assert length_balanced(np.ones(400), EXTRA).mean() == pytest.approx(1)
    # right in nine of ten, whatever the length: as good as it is, however often the longer one is better
    wins = (RNG.random(400) < 0.9).astype(float)
    balanced = length_balanced(wins, EXTRA)
    by_part = (wins[EXTRA > 0].mean() + wins[EXTRA < 0].mean()) / 2
    assert balanced.mean() == pytest.approx(by_part)
    error = np.sqrt(sum(np.var(wins[part]) / part.sum() for part in (EXTRA > 0, EXTRA < 0))) / 2
    assert estimate(balanced)["se"] == pytest.approx(error, rel=0.1)


def test_pairs_of_equal_length_are_left_out_and_one_sided_data_have_no_answer():
    assert length_balanced([1, 1, 0, 1], [3, 0, -2, -1]).tolist() == [0.75, 0.375, 1.125]
    assert len(length_balanced([1, 0], [3, 4])) == len(length_balanced([], [])) == 0


def test_the_numbers_per_comparison_give_the_rate_and_its_error():
    extra = RNG.normal(2, 5, 300)
    wins = (RNG.random(300) < 1 / (1 + np.exp(-0.3 - extra / 5))).astype(float)
    rate, items = length_controlled(wins, extra), length_controlled_wins(wins, extra)
    assert items.mean() == pytest.approx(rate["mean"], abs=1e-12)
    assert rate["mean"] < wins.mean() - 0.03
    assert estimate(items)["se"] == pytest.approx(rate["se"], rel=0.15)
    assert length_controlled_wins(wins[:9], extra[:9]).size == 0
    assert length_controlled_wins(wins[:12], np.ones(12)).tolist() == wins[:12].tolist()
