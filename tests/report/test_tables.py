"""Tables of results: plain text for a terminal, markdown, and numbers as they are."""

import re
import textwrap
from typing import Any

import pytest

from prefdistill.report import method_table
from support.runs import INF, NAN, make_results, small


def test_table_as_plain_text() -> None:
    results = small({"tvkd": (0.039, 0.012, 3), "tvkd-shuffled": (-0.05, 0.01, 3), "adpa": (NAN, None, 1)}, seeds=3)
    results["methods"]["tvkd"] = {"r": {"mean": 3.069, "se": 0.15, "n": 3}, "length": {"mean": 12, "se": None}}
    results["methods"]["adpa"] = {"r": {"mean": NAN, "se": None, "n": 3}}
    results["metrics"]["length"] = {"label": "tokens", "format": ".1f"}
    expected = """\
                                   difference to
    method                reward             DPO  tokens
    -------------  -------------  --------------  ------
    dpo            1.000                baseline       -
    tvkd           3.069 ± 0.150  +0.039 ± 0.012    12.0
    tvkd-shuffled  1.000          -0.050 ± 0.010       -
    adpa              not finite      not finite       -

    ± is the standard error of the mean over 3 seeds; differences are paired.
    """
    assert method_table(results) == textwrap.dedent(expected).rstrip()


def test_table_fits_a_terminal_and_its_columns_line_up() -> None:
    results = make_results()
    for i in range(9):
        results["metrics"][f"extra{i}"] = {"label": f"one more metric with a long name {i}", "format": ".2f"}
        for scores in results["methods"].values():
            scores[f"extra{i}"] = {"mean": 10.0**i, "se": 0.5, "n": 3}
    text = method_table(results)
    assert max(map(len, text.splitlines())) <= 100
    assert all(text.count(f"name {i}") == 1 or f"{i}" in text for i in range(9))
    for block in text.split("\n\n")[:-1]:
        rows = [line for line in block.splitlines() if "±" in line]
        assert len(rows) == len(results["methods"])
        columns = {tuple(m.start() for m in re.finditer("±", row)) for row in rows if "baseline" not in row}
        assert len({max(c) for c in columns}) == 1


def test_table_as_markdown() -> None:
    results = small({"tvkd": (0.039, 0.012, 3), "a|b<i>": (0.1, 0.1, 3)})
    assert method_table(results, markdown=True).splitlines() == [
        "| method | reward | difference to DPO |",
        "| :-- | --: | --: |",
        "| **dpo** | 1.000 | baseline |",
        "| tvkd | 1.000 | +0.039 ± 0.012 |",
        r"| a\|b&lt;i&gt; | 1.000 | +0.100 ± 0.100 |",
    ]


def test_table_of_very_little() -> None:
    assert method_table({"methods": {"dpo": {"x": 1}, "tvkd": {}}}).splitlines()[-2:] == [
        "dpo     1.000",
        "tvkd        -",
    ]
    assert "dpo" in method_table({"methods": {"dpo": {}}})


def test_terminal_escapes_do_not_reach_the_terminal() -> None:
    assert "\x1b" not in method_table({"methods": {"dpo\x1b[31m": {"x\x1b]0;": 1.0}}})


@pytest.mark.parametrize(
    ("value", "text"),
    [(NAN, "not finite"), (INF, "not finite"), (-INF, "not finite"), ("NaN", "not finite"), (None, "-"), (True, "-"),
     ({"mean": None}, "-"), ({"mean": 1.0, "se": NAN}, "1.000 ± not finite"), (-0.0001, "0.000"), (-2, "-2.000"),
     ({"mean": 1.0, "se": 0.25}, "1.000 ± 0.250")],
)  # fmt: skip
def test_numbers_are_shown_as_they_are(value: Any, text: str) -> None:
    last = method_table({"methods": {"tvkd": {"x": value}}}).splitlines()[-1]
    assert last.split(maxsplit=1)[1] == text
