"""Sections: cache keys, changed defaults, every problem at once."""

import inspect
import pickle
from typing import Annotated, Literal

import pytest
from pydantic import Field, PositiveInt

from prefdistill.core.errors import UserError
from prefdistill.core.options import NOT_IN_KEY, Section, takes, validate


class Inner(Section):
    rank: PositiveInt = Field(4, description="Rank.")
    verbose: Annotated[bool, NOT_IN_KEY] = Field(False, description="Print more.")


class Outer(Section):
    size: PositiveInt | Literal["all"] = Field(64, description="Rows.")
    share: float = Field(0.5, gt=0, le=1, description="Share.")
    log_every: Annotated[PositiveInt, NOT_IN_KEY] = Field(10, description="Steps between lines.")
    inner: Inner = Field(Inner(), description="More.")
    named: dict[str, Inner] = Field(default_factory=dict, description="By name.")


class Small(Outer):
    share: float = Outer.redefault("share", 0.25)


def test_a_cache_key_holds_what_changes_results():
    assert Outer(named={"a": Inner(rank=2)}).cache_key() == {
        "size": 64, "share": 0.5, "inner": {"rank": 4}, "named": {"a": {"rank": 2}}
    }  # fmt: skip
    assert Outer(log_every=3, inner=Inner(verbose=True)).cache_key() == Outer().cache_key()
    assert Outer(share=0.4).cache_key() != Outer().cache_key()


def test_a_changed_default_keeps_help_and_bounds():
    assert (Small().share, Outer().share) == (0.25, 0.5)
    assert Small.model_fields["share"].description == "Share."
    with pytest.raises(UserError, match="share must be less than or equal to 1, got 2"):
        Small.checked("here", share=2)


def test_every_problem_is_named_in_one_line():
    with pytest.raises(UserError) as error:
        Outer.checked("here", siz=1, size=0, share="x", inner={"rnk": 1})
    assert error.value.messages == (
        "size must be greater than 0 or 'all', got 0",
        "share must be a valid number, got 'x'",
        "unknown key 'inner.rnk'; did you mean 'rank'?",
        "unknown key 'siz'; did you mean 'size'?",
    )
    assert str(error.value).startswith("here: (1) size must be")
    assert str(pickle.loads(pickle.dumps(error.value))) == str(error.value)


def test_text_of_a_command_line_is_read_as_numbers():
    assert validate(Outer, {"size": "3", "share": "1e-1"}, "", strict=False) == Outer(size=3, share=0.1)
    with pytest.raises(UserError, match="--share must be a valid number, got 'x'"):
        validate(Outer, {"share": "x"}, "", spelled=lambda key: f"--{key}", strict=False)


def test_a_function_that_takes_a_section_shows_its_options():
    @takes(Outer)
    def function(path: str, share: float = 1.0, **options: object) -> None: ...

    parameters = inspect.signature(function).parameters
    assert list(parameters) == ["path", "share", "size", "log_every", "inner", "named"]
    assert parameters["size"].default == 64


class Lists(Section):
    words: list[str] = Field(default_factory=list)
    pair: tuple[int, ...] | None = None
    either: str | list[str] = Field(default_factory=list)
    nested: list[list[int]] = Field(default_factory=list)


def test_a_list_of_one_needs_no_brackets():
    lists = Lists.checked("lists", words="a", pair=3, either="b")
    assert (lists.words, lists.pair, lists.either) == (["a"], (3,), "b")
    assert lists == Lists.checked("lists", words=["a"], pair=(3,), either="b")
    assert Lists.checked("lists", pair=None).pair is None


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"words": 1}, "words.0 must be a valid string, got 1"),
        ({"words": {"a": 1}}, "words must be a valid list, got {'a': 1}"),
        ({"words": None}, "words must be a valid list, got None"),
        ({"pair": "a"}, "pair.0 must be a valid integer, got 'a'"),
        ({"nested": 1}, "nested.0 must be a valid list, got 1"),
    ],
)
def test_a_wrong_member_of_a_list_of_one(options, message):
    with pytest.raises(UserError) as error:
        Lists.checked("lists", **options)
    assert message in str(error.value)
