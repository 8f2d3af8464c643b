"""What a judge's reply says: replies of many shapes, and how prompts are filled."""

import re

import numpy as np
import pytest

from prefdistill.evaluation.judges import verdicts
from prefdistill.evaluation.judges.inputs import fill

SKIPPED = "analysisWe compare. "  # <|channel|>analysis<|message|> without special tokens: only at the start of a reply

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
    ("The first turn gets [[3]], the second [[9]]", None),
    ("As [2] says, the answer is right. Rating: [[7]]", 7),
    ("Rating: [5]", 5),
    ("Rating: [5]/10, or [6]", 5),
    ("As [2] says, the answer is right.", None),
    ("As [2] says, the answer is right. Rating: [7]", 7),
    ("A [[10]] would need sources. Rating: [[2]]", 2),
    ("At first a [[4]].\n\nRead again, it is better: [[7]]", 7),
    ("Rating: [[4]]\n\nRead again.\n\nRating: [[7]]", None),
    ("Rating: [[6]]\n\n**Rating: [[6.0]]**", 6),
    ("Rating: [[5]] is usual, but this one gets [[8]]", None),
    ("[[11]], no: [[5]]", None),
    ("<think>[[3]]</think>\n\nRating: [[7]]", 7),
    ("<think>[[3]]", None),
    ("[[3]], or more</think>[[7]]", 7),
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
    assert verdicts.read_rating(reply).value == value


@pytest.mark.parametrize("reply", [reply for reply, value in RATINGS if value is not None and "*" not in reply])
def test_ratings_match_the_published_rule(reply):
    """FastChat's two expressions, without spaces inside, on replies with one number in brackets and no reasoning."""
    if "think>" in reply or len(re.findall(r"\[\d", reply)) > 1:
        return
    found = re.search(r"\[\[(\d+\.?\d*)\]\]", reply) or re.search(r"\[(\d+\.?\d*)\]", reply)
    if found:
        assert verdicts.read_rating(reply).value == float(found[1])


@pytest.mark.parametrize(
    ("reply", "letter"),
    [
        ("Assistant A is clearer. [[A]]", "A"),
        ("**[[B]]**", "B"),
        ("My verdict: [[ C ]]", "C"),
        ('"[[A]]"', "A"),
        ("[[**B**]]", "B"),
        ("[[B]] because [[A]] was wrong", None),
        ("Verdict: [[B]] because [[A]] was wrong", None),
        ("Final verdict: [[A]]\nFinal verdict: [[B]]", None),
        ("[[A]]\n\n[[B]]", None),
        ("[[A]]\n\nAs I said: [[A]]", "A"),
        ("I lean to [[A]] for its form.\n\n[[B]]", "B"),
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
    assert verdicts.read_winner(reply).value == letter


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
        ("I prefer [[A]] over [[B]]", "ABC", None),
        ("[[C]]", "ABC", 0.5),
        ("C", "ABC", 0.5),
        ("C", "AB", None),
        ("<think>m or M? [[m]]</think> M.", "mM", 1),
        ("<think>M", "mM", None),
        ("[[m]]\n[[M]]", "mM", None),
        ("[[m]]\n\nSo: [[m]]", "mM", 0),
        ("model m", "mM", None),
        ("mM", "mM", None),
        ("", "mM", None),
    ],
)
def test_labels(reply, labels, value):
    assert verdicts.read_label(reply, labels).value == value


@pytest.mark.parametrize(
    ("start", "end"),
    [
        ("<think>", "</think>"),
        ("<THINK>", "</THINK>\n"),
        ("\n<thinking>\n", "\n</thinking>\n"),
        ("<thought>", "</thought>"),
        ("<reasoning>", "</reasoning>"),
        ("<reason>", "</reason>"),
        ("<analysis>", "</analysis>"),
        ("<scratchpad>", "</scratchpad>"),
        ('<reasoning effort="high">', "</reasoning>"),
        ("<seed:think>", "</seed:think>"),
        ("[THINK]", "[/THINK]"),
        ("\u25c1think\u25b7", "\u25c1/think\u25b7"),
        ("<|begin_of_thought|>", "<|end_of_thought|>"),
        ("<|START_THINKING|>", "<|END_THINKING|>"),
        ("<|channel|>analysis<|message|>", "<|end|><|start|>assistant<|channel|>final<|message|>"),
        ("<|channel>thought\n", "<channel|>"),
        (SKIPPED, "assistantfinal"),
    ],
)
def test_reasoning_is_not_read(start, end):
    draft = "perhaps [[A]], [[10]], [[m]]; Verdict: [[A]]\n\nRating: [[10]]"
    for reply, cut in ((f"{start}{draft}{end}", True), ("", False)):
        for read, final, value in (
            (verdicts.read_winner, "[[B]]", "B"),
            (verdicts.read_rating, "[[2]]", 2),
            (lambda reply: verdicts.read_label(reply, "mM"), "M", 1),
        ):
            assert read(reply + final) == verdicts.Verdict(value, "parsed", cut)
            assert read(reply) == verdicts.Verdict(None, "no_verdict", cut)
            if start != SKIPPED:
                assert read(f"{reply}{final} {start}{draft}") == verdicts.Verdict(value, "parsed", True)
    assert verdicts.read_rating(start + draft) == verdicts.Verdict(None, "no_verdict", True)
    assert verdicts.without_reasoning(f"{draft}{end}rest").strip() == "rest"  # opened by the template


def test_nested_and_quoted_markers_of_reasoning():
    assert verdicts.read_winner("<think>a <think>b</think> [[A]]</think> [[B]]").value == "B"
    assert verdicts.read_winner("<think>The user writes <think> in [[A]].</think> [[B]]").value == "B"
    assert verdicts.read_winner("<think>[[A]]</think> so far. <think>[[C]]</think> [[B]]").value == "B"
    assert verdicts.read_winner("Assistant A's <think>aloud</think> is no fault. [[A]]").value == "A"


def test_outcomes_of_a_reply():
    assert verdicts.read_winner("A [[A]] or [[B]]?").outcome == "contradictory"
    assert verdicts.read_rating("[[4]] or [[5]]").outcome == "contradictory"
    assert verdicts.read_rating("[[11]]").outcome == "no_verdict"
    assert verdicts.read_label("[[m]] [[M]]", "mM").outcome == "contradictory"
    top = [("m", -0.1), ("M", -3.0)]
    assert verdicts.read_label_probability("m", top, "mM").outcome == "parsed"
    assert verdicts.read_label_probability("<think>m</think>M", top, "mM") == verdicts.Verdict(None, "no_verdict", True)


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
    assert verdicts.ranking_preference(reply) == value
    assert verdicts.read_ranking(f"<think>[{{}}]</think>\n{reply}").value == value


def test_braces_in_answers_and_prompts_stay():
    assert fill("{a} {{b}} {c} {", {"a": "{b}", "b": "x"}) == "{b} {x} {c} {"
