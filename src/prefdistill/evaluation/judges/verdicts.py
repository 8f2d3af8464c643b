"""Parse a judge's reply. One that matches no rule, or states two verdicts, is counted and never guessed at."""

import ast
import math
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

_MARKUP = r"[\s*_`\"']*"  # spaces and emphasis that models put around a verdict
_NUMBER = rf"{_MARKUP}(-?\d+(?:\.\d*)?){_MARKUP}"
_RATING = rf"\[\[{_NUMBER}\]\]"
_SINGLE_BRACKETS = rf"\[{_NUMBER}\]"
_WINNER = rf"\[\[{_MARKUP}([ABC]){_MARKUP}\]\]"
LOWEST, HIGHEST = 1.0, 10.0
RANKING_CHARACTERS = 2_000  # longer replies are not parsed
Top = Sequence[tuple[str, float]] | None  # the likeliest first tokens of a reply, with log-probabilities in nats
PARSED, NO_VERDICT, CONTRADICTORY = OUTCOMES = ("parsed", "no_verdict", "contradictory")

_WORDS = r"(?:seed:)?(?:think(?:ing)?|thoughts?|reason(?:ing)?|analysis|reflection|scratchpad|inner_monologue)"
_REASONING = re.compile(
    rf"""
    (?P<open> <{_WORDS}(?:\s[^<>]*)?> | \[THINK\] | \u25c1think\u25b7 | <\|(?:begin_of_thought|START_THINKING)\|>
      | <\|channel\|?>\s*(?:analysis|commentary|thought)\b | \A\s*analysis(?=[A-Z]))  # the last: markers were skipped
    | (?P<close> </{_WORDS}\s*> | \[/THINK\] | \u25c1/think\u25b7 | <\|(?:end_of_thought|END_THINKING)\|>
      | <\|channel\|>\s*final\b(?:<\|message\|>)? | <channel\|> | assistantfinal)
    """,
    re.VERBOSE | re.IGNORECASE,
)
_STATES = re.compile(
    r"(?:\b(?:rating|score|grade|verdict|answer|decision|choice|winner)\b(?: is)?|^)[\s*_`\"':=]*$", re.I
)
_REST_OF_LINE = re.compile(r"[\s*_`\"'.]*$")


@dataclass(frozen=True)
class Verdict:
    """What a reply says.

    Args:
        value: a rating, a letter or a preference; None unless the outcome is "parsed".
        outcome: one of `OUTCOMES`.
        reasoning_cut: whether the reply held reasoning, which is not read.
    """

    value: Any
    outcome: str
    reasoning_cut: bool = False


def without_reasoning(reply: str) -> str:
    """Return a reply without its reasoning: what stands between markers such as <think> and </think>.

    Reasoning that is never closed ends with the reply. One that is never opened starts with the reply, as where the
    judge's template opens it in the prompt.

    Example:
        >>> without_reasoning("<think>perhaps [[A]]</think>[[B]]"), without_reasoning("[[A]]</think>[[B]]")
        ('[[B]]', '[[B]]')
    """
    answer, start, inside = "", 0, False
    for marker in _REASONING.finditer(reply):
        if marker["open"] is not None:
            answer += "" if inside else reply[start : marker.start()]
            inside = True
        else:
            answer = answer if inside else ""
            start, inside = marker.end(), False
    return answer if inside else answer + reply[start:]


def read_rating(reply: str) -> Verdict:
    """Return the rating, from 1 to 10, that a reply states in double brackets, else after a word such as "Rating:" in
    single ones.

    Example:
        >>> [read_rating(text).value for text in ("Sound. Rating: [[7.5]]", "Rating: 8/10", "[[3]] or [[4]]")]
        [7.5, None, None]
    """
    return _read(reply, _rating)


def read_winner(reply: str) -> Verdict:
    """Return the letter that a reply states in double brackets: A, B, or C for a tie.

    Example:
        >>> read_winner("Both are right, B is clearer. [[B]]").value, read_winner("B is better").value
        ('B', None)
    """
    return _read(reply, lambda answer: _stated(_WINNER, answer))


def read_label(reply: str, labels: Sequence[str]) -> Verdict:
    """Return the preference for the second output of a reply that is one of two labels (or three, the third for a tie).

    The reply is the label alone, ignoring spaces, quotes, emphasis and a full stop, or states it in double brackets.

    Args:
        reply: the judge's text.
        labels: of the first output, the second and, optionally, a tie. Case-sensitive.

    Returns:
        A verdict of 0 for the first output, 1 for the second, one half for a tie.

    Example:
        >>> read_label(" **M**\\n", ["m", "M"]).value, read_label("model m", ["m", "M"]).value
        (1.0, None)
    """
    preference = dict(zip(labels, (0.0, 1.0, 0.5), strict=False))
    bracketed = rf"\[\[{_MARKUP}({'|'.join(map(re.escape, labels))}){_MARKUP}\]\]"

    def read(answer: str) -> list[Any]:
        return [
            preference[name]
            for name in _stated(bracketed, answer) or [answer.strip(" \t\r\n*_`\"'.")]
            if name in preference
        ]

    return _read(reply, read)


def rating(reply: str) -> float | None:
    """Return the value of `read_rating`: None if a reply states no rating, or two that differ.

    Example:
        >>> rating("<think>a 10 would need more: [[10]]</think> Rating: [[2]]")
        2.0
    """
    return read_rating(reply).value


def winner(reply: str) -> str | None:
    """Return the value of `read_winner`: None if a reply states no letter, or two that differ.

    Example:
        >>> winner("First I leaned to A. My verdict: [[B]]")
        'B'
    """
    return read_winner(reply).value


def label(reply: str, labels: Sequence[str]) -> float | None:
    """Return the value of `read_label`: None if a reply states no label, or two that differ.

    Example:
        >>> label("<think>I lean to m</think>M", ["m", "M"])
        1.0
    """
    return read_label(reply, labels).value


def read_label_probability(reply: str, top: Top, labels: Sequence[str]) -> Verdict:
    """Return `label_probability`; none for a reply that starts by reasoning, whose first token is no verdict."""
    value = label_probability(top, labels) if without_reasoning(reply) == reply else None
    return _read(reply, lambda _: [] if value is None else [value])


def read_ranking(reply: str, first: str = "model_1") -> Verdict:
    """Return the preference for the second output of a reply that is a list, see `ranking_preference`."""
    value = ranking_preference(without_reasoning(reply), first)
    return _read(reply, lambda _: [] if value is None else [value])


def _read(reply: str, read: Callable[[str], list[Any]]) -> Verdict:
    """Return the verdict of a reply; `read` lists the verdicts that the reply without its reasoning states."""
    answer = without_reasoning(reply)
    values, cut = set(read(answer)), answer != reply
    if len(values) == 1:
        return Verdict(values.pop(), PARSED, cut)
    return Verdict(None, CONTRADICTORY if values else NO_VERDICT, cut)


def _rating(answer: str) -> list[Any]:
    values = [float(text) for text in _stated(_RATING, answer)]
    if not values and not re.search(_RATING, answer):
        values = [float(text) for text in _stated(_SINGLE_BRACKETS, answer, labelled=True)]
    return values if len(set(values)) > 1 else [value for value in values if LOWEST <= value <= HIGHEST]


def _stated(pattern: str, answer: str, labelled: bool = False) -> list[str]:
    """List the verdicts that an answer ends with: the last one, and every other that may be meant as final.

    Those are the ones after a word such as "Verdict:" or alone on their line. If the last one is neither, the others
    of its paragraph count too. A draft in an earlier paragraph does not.

    Args:
        pattern: of a verdict, with the value as its group.
        answer: without reasoning.
        labelled: only list verdicts after such a word or alone on their line.
    """
    matches = list(re.finditer(pattern, answer))
    stated = [match for match in matches if _is_stated(match, answer)]
    if labelled or not matches or matches[-1] in stated:
        return [match[1] for match in stated]
    paragraph = max((gap.end() for gap in re.finditer(r"\n\s*\n", answer[: matches[-1].start()])), default=0)
    return [match[1] for match in matches if match in stated or match.start() >= paragraph]


def _is_stated(match: re.Match[str], answer: str) -> bool:
    """Whether a verdict stands after a word such as "Verdict:", or alone on its line."""
    before = answer[: match.start()].rpartition("\n")[2]
    if not _STATES.search(before):
        return False
    return bool(before.strip("\t *_`\"'")) or bool(_REST_OF_LINE.match(answer[match.end() :].partition("\n")[0]))


def label_probability(top: Top, labels: Sequence[str]) -> float | None:
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


def ranking_preference(reply: str, first: str = "model_1") -> float | None:
    """Return the preference for the second output of a list of two `{"model": name, "rank": 1 or 2}`, Python or JSON.

    Example:
        >>> ranking_preference("[{'model': 'model_1', 'rank': 2}, {'model': 'model_2', 'rank': 1}]")
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
