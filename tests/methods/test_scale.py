"""A shaping margin out of proportion to beta is warned of, with options that are in proportion."""

import re

import numpy as np
import pytest

from prefdistill.methods import make_method


def row_signals(spread):
    """Return shaping returns whose difference has this spread."""
    chosen = np.array([1.0, -1.0] * 50) * spread
    return {"shaping_chosen": chosen, "shaping_rejected": np.zeros(100)}


@pytest.mark.parametrize(
    ("options", "spread", "warns"),
    [
        ({"alpha": 0.7}, 7.0, True),
        ({"alpha": -0.7}, 7.0, True),
        ({"alpha": 0.1}, 7.0, False),
        ({"alpha": 0.7, "beta": 0.4}, 7.0, False),
        ({"alpha": 0.4, "standardize": True}, 2**0.5, False),
        ({"alpha": 3.0, "standardize": True}, 2**0.5, True),
        ({"alpha": 0.7, "potential": "shuffled"}, 7.0, True),
        ({"alpha": 0.0}, 1000.0, False),
    ],
)
def test_the_scale_is_known_before_and_after_the_teacher_is_read(options, spread, warns):
    method = make_method("tvkd", options)
    measured, expected = method.disproportion(row_signals(spread)), method.disproportion()
    assert bool(measured) == bool(expected) == warns
    if warns:
        assert measured.replace(" has ", " will have ") == expected
        assert ("standardize=true" in measured) != method.standardize
        for text in re.findall(r"(?:standardize=true with )?alpha=[-\d.]+", measured.partition("Use ")[2]):
            alpha = float(text.rpartition("=")[2])
            fixed = make_method(
                "tvkd", options | {"alpha": alpha, "standardize": "standardize" in text or method.standardize}
            )
            assert not fixed.disproportion(row_signals(2**0.5 if fixed.standardize else spread))
            assert np.sign(alpha) == np.sign(method.alpha)


def test_other_methods_add_nothing_and_scores_are_not_guessed():
    assert make_method("dpo", {}).disproportion(row_signals(100)) == make_method("dpo", {}).disproportion() == ""
    reward = make_method("tvkd", {"alpha": 10.0, "potential": "reward"})
    assert not reward.disproportion()
    assert reward.disproportion(row_signals(7.0))
