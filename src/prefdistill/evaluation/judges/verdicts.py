"""Parse a judge's reply. A reply that matches no rule is None: it is counted, never guessed at."""

import ast
import math
import re
from collections.abc import Sequence
from typing import Any

_MARKUP = r"[\s*_`\"']*"  # spaces and emphasis that models put around a verdict
_NUMBER = rf"{_MARKUP}(\d+(?:\.\d*)?){_MARKUP}"
_RATING = re.compile(rf"\[\[{_NUMBER}\]\]")
_SINGLE_BRACKETS = re.compile(rf"\[{_NUMBER}\]")
_WINNER = re.compile(rf"\[\[{_MARKUP}([ABC]){_MARKUP}\]\]")
LOWEST, HIGHEST = 1.0, 10.0
RANKING_CHARACTERS = 2_000  # longer replies are not parsed


def rating(reply: str) -> float | None:
    """Return the number in the first double brackets, else in the first single ones; None unless it is 1 to 10.

    Example:
        >>> rating("A sound answer. Rating: [[7.5]]"), rating("Rating: 8/10")
        (7.5, None)
    """
    match = _RATING.search(reply) or _SINGLE_BRACKETS.search(reply)
    if match is None:
        return None
    value = float(match[1])
    return value if LOWEST <= value <= HIGHEST else None


def winner(reply: str) -> str | None:
    """Return the letter in the first double brackets: A, B, or C for a tie.

    Example:
        >>> winner("Both are right, B is clearer. [[B]]"), winner("B is better")
        ('B', None)
    """
    match = _WINNER.search(reply)
    return None if match is None else match[1]


def label(reply: str, labels: Sequence[str]) -> float | None:
    """Return the preference for the second output of a reply that is one of two labels (or three, the third for a tie).

    The reply is the label alone, ignoring spaces, quotes, emphasis and a full stop, or holds it in double brackets (the
    first ones count).

    Args:
        reply: the judge's text.
        labels: of the first output, the second and, optionally, a tie. Case-sensitive.

    Returns:
        0 for the first output, 1 for the second, one half for a tie.

    Example:
        >>> label(" **M**\\n", ["m", "M"]), label("The verdict: [[A]]", ["A", "B"]), label("model m", ["m", "M"])
        (1.0, 0.0, None)
    """
    preference = dict(zip(labels, (0.0, 1.0, 0.5), strict=False))
    bracketed = re.search(rf"\[\[{_MARKUP}({'|'.join(map(re.escape, labels))}){_MARKUP}\]\]", reply)
    return preference[bracketed[1]] if bracketed else preference.get(reply.strip(" \t\r\n*_`\"'."))


def label_probability(top: Sequence[tuple[str, float]] | None, labels: Sequence[str]) -> float | None:
    r"""Return the preference for the second output, from the log-probabilities of the reply's first token.

    .. math:: \frac{p(\text{second})}{p(\text{first}) + p(\text{second})}

    Args:
        top: (token, log-probability in nats) of the most likely tokens; None if the endpoint gave none.
        labels: the tokens for the first output and the second. One that is not in `top` has probability 0.

    Example:
        >>> round(label_probability([("M", -0.1), ("m", -2.5), ("The", -5.0)], ["m", "M"]), 3)
        0.917
    """
    listed = dict(top or [])
    first, second = (math.exp(listed[name]) if name in listed else 0.0 for name in labels[:2])
    return second / (first + second) if first + second > 0 else None


def ranking(reply: str, first: str = "model_1") -> float | None:
    """Return the preference for the second output of a list of two `{"model": name, "rank": 1 or 2}`, Python or JSON.

    Example:
        >>> ranking("[{'model': 'model_1', 'rank': 2}, {'model': 'model_2', 'rank': 1}]")
        1.0
    """
    if len(reply) > RANKING_CHARACTERS:
        return None
    try:
        listed: Any = ast.literal_eval(re.sub(r"^\s*```\w*|```\s*$", "", reply).strip())
        ranks = {entry["model"]: entry["rank"] for entry in listed}
        values = sorted(ranks.values())
    except (ValueError, SyntaxError, TypeError, KeyError, MemoryError, RecursionError):
        return None
    if len(ranks) != 2 or values != [1, 2] or first not in ranks:
        return None
    return float(ranks[first] - 1)
