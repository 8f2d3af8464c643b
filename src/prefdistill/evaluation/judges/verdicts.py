"""What a judge's reply says. A reply that follows no rule is None: it is counted, and never guessed at."""

import ast
import math
import re
from collections.abc import Sequence
from typing import Any

_MARKUP = r"[\s*_`\"']*"  # spaces and emphasis that models put around what was asked for
_NUMBER = rf"{_MARKUP}(\d+(?:\.\d*)?){_MARKUP}"
_RATING = re.compile(rf"\[\[{_NUMBER}\]\]")
_SINGLE_BRACKETS = re.compile(rf"\[{_NUMBER}\]")
_WINNER = re.compile(rf"\[\[{_MARKUP}([ABC]){_MARKUP}\]\]")
LOWEST, HIGHEST = 1.0, 10.0
RANKING_CHARACTERS = 2_000  # a list of two names and ranks is short; what is longer is not handed to a parser


def rating(reply: str) -> float | None:
    """The number in the first double brackets, else in the first single ones; None outside of 1 to 10 or without.

    Example:
        >>> rating("A sound answer. Rating: [[7.5]]"), rating("Rating: 8/10")
        (7.5, None)
    """
    found = _RATING.search(reply) or _SINGLE_BRACKETS.search(reply)
    if found is None:
        return None
    value = float(found[1])
    return value if LOWEST <= value <= HIGHEST else None


def winner(reply: str) -> str | None:
    """The letter in the first double brackets: A, B, or C for a tie.

    Example:
        >>> winner("Both are right, B is clearer. [[B]]"), winner("B is better")
        ('B', None)
    """
    found = _WINNER.search(reply)
    return None if found is None else found[1]


def label(reply: str, labels: Sequence[str]) -> float | None:
    """How much the second output is preferred by a reply that is one of two labels (or three, the third for a tie).

    The reply is the label alone, but for spaces, quotes, emphasis and a full stop, or holds it in double brackets, the
    first of which counts.

    Args:
        reply: the judge's text.
        labels: of the first output, the second and, if the prompt has one, of a tie. Case counts.

    Returns:
        0 for the first output, 1 for the second, one half for a tie.

    Example:
        >>> label(" **M**\\n", ["m", "M"]), label("The verdict: [[A]]", ["A", "B"]), label("model m", ["m", "M"])
        (1.0, 0.0, None)
    """
    worth = dict(zip(labels, (0.0, 1.0, 0.5), strict=False))
    bracketed = re.search(rf"\[\[{_MARKUP}({'|'.join(map(re.escape, labels))}){_MARKUP}\]\]", reply)
    return worth[bracketed[1]] if bracketed else worth.get(reply.strip(" \t\r\n*_`\"'."))


def label_probability(top: Sequence[tuple[str, float]] | None, labels: Sequence[str]) -> float | None:
    r"""How much the second output is preferred, from the log-probabilities of the reply's first token.

    .. math:: \frac{p(\text{second})}{p(\text{first}) + p(\text{second})}

    Args:
        top: (token, log-probability in nats) of the likeliest tokens; None where the endpoint gave none.
        labels: the tokens that name the first output and the second. One that is not listed has probability 0.

    Example:
        >>> round(label_probability([("M", -0.1), ("m", -2.5), ("The", -5.0)], ["m", "M"]), 3)
        0.917
    """
    listed = dict(top or [])
    first, second = (math.exp(listed[name]) if name in listed else 0.0 for name in labels[:2])
    return second / (first + second) if first + second > 0 else None


def ranking(reply: str, first: str = "model_1") -> float | None:
    """How much the second output is preferred by a list of two `{"model": name, "rank": 1 or 2}`, Python or JSON.

    Example:
        >>> ranking("[{'model': 'model_1', 'rank': 2}, {'model': 'model_2', 'rank': 1}]")
        1.0
    """
    if len(reply) > RANKING_CHARACTERS:
        return None
    try:
        listed: Any = ast.literal_eval(re.sub(r"^\s*```\w*|```\s*$", "", reply).strip())
        ranks = {entry["model"]: entry["rank"] for entry in listed}
        given = sorted(ranks.values())
    except (ValueError, SyntaxError, TypeError, KeyError, MemoryError, RecursionError):
        return None
    if len(ranks) != 2 or given != [1, 2] or first not in ranks:
        return None
    return float(ranks[first] - 1)
