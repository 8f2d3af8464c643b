"""Two requests that differ are told apart by path and both values."""

import pytest

from prefdistill.core.differences import Difference, compare, differences, listed

A, B = "3f2a" + "0" * 60, "91bc" + "0" * 60


@pytest.mark.parametrize(
    ("before", "after", "message"),
    [
        ({"alpha": 0.1}, {"alpha": 0.2}, "alpha is 0.2, was 0.1"),
        ({"m": {"tvkd": {"alpha": 0.1}}}, {"m": {"tvkd": {"alpha": 0.2}}}, "m.tvkd.alpha is 0.2, was 0.1"),
        ({"kinds": ["logps"]}, {"kinds": ["logps", "values"]}, "kinds is ['logps', 'values'], was ['logps']"),
        ({"a": [1, {"b": 2}]}, {"a": [1, {"b": 3}]}, "a[1].b is 3, was 2"),
        ({}, {"lora": {"r": 2}}, "lora is {'r': 2}, was unset"),
        ({"limit": 3}, {}, "limit is unset, was 3"),
        ({"limit": None}, {"limit": 3}, "limit is 3, was None"),
        ({"data": {"fingerprint": B}}, {"data": {"fingerprint": A}}, "data.fingerprint differs (3f2a..., was 91bc...)"),
        ({"key": A}, {"key": A[:-1] + "1"}, f"key differs ({A[:-1]}1..., was {A}...)"),
        ({"key": A}, {"key": None}, "key is None, was 3f2a0000..."),
        ({"model": "x" * 60}, {"model": "x" * 59 + "y"}, "model is ...xxxxxxxxxxy', was ...xxxxxxxxxxx'"),
        ({"model": "a" + "x" * 60}, {"model": "b"}, f"model is 'b', was 'a{'x' * 38}..."),
    ],
)  # fmt: skip
def test_a_difference_names_path_and_both_values(before, after, message):
    assert differences(before, after) == [message]


def test_equal_requests_do_not_differ():
    assert differences({"a": {"b": [1]}}, {"a": {"b": [1]}}) == []
    assert differences({"a": None}, {}) == []  # an option that was added later


def test_names_do_not_count_unless_asked_for():
    before, after = {"model": {"name": "here", "key": 1}}, {"model": {"name": "there", "key": 1}}
    assert differences(before, after) == []
    assert [str(difference) for difference in compare(before, after, ignored=())] == [
        "model.name is 'there', was 'here'"
    ]


def test_two_of_equal_rank_are_shown_side_by_side():
    assert Difference("max_length", 256, 128).side_by_side() == "max_length (256, 128)"


def test_a_message_names_the_first_few():
    assert listed(list("abc")) == "a; b; c"
    assert listed(list("abcdefg")) == "a; b; c; d; e; 2 more"
