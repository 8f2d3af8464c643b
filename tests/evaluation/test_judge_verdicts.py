"""What a judge's reply says: replies of many shapes, and how prompts are filled."""

import re

import numpy as np
import pytest

from prefdistill.evaluation.judges import verdicts
from prefdistill.evaluation.judges.inputs import fill

RATINGS = [
    ("A fine answer. Rating: [[8]]", 8),
    ("Rating: [[7.5]]", 7.5),
    ("[[10]]", 10),
    ("[[1]]", 1),
    ("**Rating: [[9]]**", 9),
    ("Rating: **[[ 6 ]]**", 6),
    ("Rating: [[**6**]]", 6),
    ("Rating: [[8.]]", 8),
    ('"[[4]]"', 4),
    ("Rating: [[\n5\n]]", 5),
    ("The first turn gets [[3]], the second [[9]]", 3),
    ("As [2] says, the answer is right. Rating: [[7]]", 7),
    ("Rating: [5]", 5),
    ("Rating: [5]/10, or [6]", 5),
    ("[[0]]", None),
    ("[[11]]", None),
    ("[[100]]", None),
    ("[[-3]]", None),
    ("[[11]], no: [5]", None),
    ("Rating: 8/10", None),
    ("Rating: 8", None),
    ("[[8/10]]", None),
    ("[[eight]]", None),
    ("[[rating]]", None),
    ("[[A]]", None),
    ("", None),
]


@pytest.mark.parametrize(("reply", "value"), RATINGS)
def test_ratings(reply, value):
    assert verdicts.rating(reply) == value


@pytest.mark.parametrize("reply", [reply for reply, value in RATINGS if value is not None and "*" not in reply])
def test_ratings_match_the_published_rule(reply):
    """First double brackets, else first single ones: FastChat's two expressions, without spaces inside."""
    found = re.search(r"\[\[(\d+\.?\d*)\]\]", reply) or re.search(r"\[(\d+\.?\d*)\]", reply)
    if found:
        assert verdicts.rating(reply) == float(found[1])


@pytest.mark.parametrize(
    ("reply", "letter"),
    [
        ("Assistant A is clearer. [[A]]", "A"),
        ("**[[B]]**", "B"),
        ("My verdict: [[ C ]]", "C"),
        ('"[[A]]"', "A"),
        ("[[**B**]]", "B"),
        ("[[B]] because [[A]] was wrong", "B"),
        ("[A]", None),
        ("A", None),
        ("[[a]]", None),
        ("[[D]]", None),
        ("[[AB]]", None),
        ("Assistant B is better.", None),
        ("[[Tie]]", None),
        ("", None),
    ],
)
def test_winners(reply, letter):
    assert verdicts.winner(reply) == letter


@pytest.mark.parametrize(
    ("reply", "labels", "value"),
    [
        ("m", "mM", 0),
        ("M", "mM", 1),
        (" M\n", "mM", 1),
        ('"m"', "mM", 0),
        ("**M**.", "mM", 1),
        ("`m`", "mM", 0),
        ("[[M]]", "mM", 1),
        ("I prefer [[A]] over [[B]]", "ABC", 0),
        ("[[C]]", "ABC", 0.5),
        ("C", "ABC", 0.5),
        ("C", "AB", None),
        ("model m", "mM", None),
        ("mM", "mM", None),
        ("", "mM", None),
    ],
)
def test_labels(reply, labels, value):
    assert verdicts.label(reply, labels) == value


def test_probabilities_of_labels():
    top = [("M", np.log(0.6)), ("m", np.log(0.2)), ("x", np.log(0.2))]
    assert verdicts.label_probability(top, "mM") == pytest.approx(0.75)
    assert verdicts.label_probability(top[:1], "mM") == 1
    assert verdicts.label_probability(top[1:], "mM") == 0
    assert verdicts.label_probability(top[2:], "mM") is None
    assert verdicts.label_probability(None, "mM") is None


@pytest.mark.parametrize(
    ("reply", "value"),
    [
        ("[{'model': 'model_1', 'rank': 1}, {'model': 'model_2', 'rank': 2}]", 0),
        ('[{"model": "model_2", "rank": 1}, {"model": "model_1", "rank": 2}]', 1),
        ("```python\n[{'model': 'model_1', 'rank': 2}, {'model': 'model_2', 'rank': 1}]\n```", 1),
        ("[{'model': 'model_1', 'rank': 1}, {'model': 'model_2', 'rank': 1}]", None),
        ("[{'model': 'model_1', 'rank': 3}, {'model': 'model_2', 'rank': 1}]", None),
        ("[{'model': 'model_1', 'rank': 1}]", None),
        ("[{'model': [1], 'rank': 1}]", None),
        ("__import__('os').getcwd()", None),
        ("model_1", None),
        ("(" * 100_000, None),
        ("", None),
    ],
)
def test_rankings(reply, value):
    assert verdicts.ranking(reply) == value


def test_braces_in_answers_and_prompts_stay():
    assert fill("{a} {{b}} {c} {", {"a": "{b}", "b": "x"}) == "{b} {x} {c} {"
