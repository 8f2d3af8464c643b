"""Checks of the pairs as text. Each is a function of one data set that yields findings."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from itertools import pairwise
from numbers import Real
from typing import Any

import numpy as np

from prefdistill.data.columns import SCORES, SIDES, ended_column
from prefdistill.evaluation.stats import estimate, pair_wins
from prefdistill.experiment.doctor import text as characters
from prefdistill.experiment.doctor.findings import Finding, Severity, found, once_a_row
from prefdistill.experiment.doctor.pairs import COLUMNS, Pair, PairSet

ROLES = {"system", "developer", "user", "assistant", "tool"}
EXTREME = 10  # times the length that 95 % of the texts keep to
BIAS = 0.1, 3.0  # of the share of pairs in which the chosen response is longer: distance from one half, in errors too


def empty_responses(data: PairSet) -> Iterator[Finding]:
    empty = [
        (pair.row, f"{name} is {pair.texts[name]!r}")
        for pair in data.pairs
        for name in [next((name for name in SIDES if not pair.texts[name].strip()), None)]
        if name
    ]
    yield from found(
        "data.empty-response", "warning", data.where, empty, "a response has no text", "Remove these rows."
    )


def empty_prompts(data: PairSet) -> Iterator[Finding]:
    hits = [(pair.row, pair.texts["chosen"]) for pair in data.pairs if not pair.texts["prompt"].strip()]
    yield from found("data.empty-prompt", "warning", data.where, hits, "the prompt has no text", "Remove these rows.")


def equal_responses(data: PairSet) -> Iterator[Finding]:
    hits = [(pair.row, pair.texts["chosen"]) for pair in data.pairs if pair.key("chosen") == pair.key("rejected")]
    yield from found(
        "data.equal-responses",
        "warning",
        data.where,
        hits,
        "chosen and rejected are the same: nothing is preferred, and accuracy counts a tie",
        "Remove these rows.",
    )


def duplicate_pairs(data: PairSet) -> Iterator[Finding]:
    hits = [
        (pair.row, f"as row {first.row}: {pair.texts['prompt']}")
        for pair, first in _repeated(data.pairs, lambda pair: tuple(pair.key(name) for name in COLUMNS))
    ]
    yield from found(
        "data.duplicate-pairs",
        "warning",
        data.where,
        hits,
        "the same pair has come before",
        "Keep one of each, unless the weight is meant.",
    )


def both_labels(data: PairSet) -> Iterator[Finding]:
    seen = {tuple(pair.key(name) for name in COLUMNS): pair for pair in reversed(data.pairs)}
    hits = []
    for pair in data.pairs:
        prompt, chosen, rejected = (pair.key(name) for name in COLUMNS)
        other = seen.get((prompt, rejected, chosen))
        if other is not None and chosen != rejected:
            hits.append((pair.row, f"turned round in row {other.row}: {pair.texts['prompt']}"))
    yield from found(
        "data.both-labels",
        "warning",
        data.where,
        hits,
        "the same two responses are preferred both ways",
        "Decide for one of the two, or remove both.",
    )


def repeated_prompts(data: PairSet) -> Iterator[Finding]:
    prompts = Counter(pair.key("prompt") for pair in data.pairs)
    hits = [(pair.row, pair.texts["prompt"]) for pair in data.pairs if prompts[pair.key("prompt")] > 1]
    most = max(prompts.values(), default=0)
    yield from found(
        "data.repeated-prompts",
        "note",
        data.where,
        hits,
        f"the prompt has several pairs (prompts in all: {len(prompts):,}, at most {most} pairs of one)",
        "Split train and test by prompt, and draw error bars over prompts: pairs of one prompt go together.",
    )


def turns(data: PairSet) -> Iterator[Finding]:
    """Conversations that most chat templates refuse or take for others."""
    hits = [(pair.row, why) for pair in data.pairs if data.conversational and (why := _odd_turns(pair))]
    yield from found(
        "data.turns",
        "warning",
        data.where,
        hits,
        "roles are unusual or do not take turns",
        "Use system (first, if at all), then user and assistant in turn: the prompt ends with the user's, "
        "and a response is one message.",
    )


def _odd_turns(pair: Pair) -> str:
    prompt = [message["role"] for message in pair.columns["prompt"]]
    if unknown := [role for role in prompt if role not in ROLES]:
        return f"a role {unknown[0]!r}"
    if {"system", "developer"} & {*prompt[1:]}:
        return f"a system message in the middle: {', '.join(prompt)}"
    spoken = [role for role in prompt if role in ("user", "assistant")]
    if not spoken or spoken[0] != "user":
        return f"no user comes first: {', '.join(prompt)}"
    if any(a == b == "user" for a, b in pairwise(prompt)):
        return f"two user messages in a row: {', '.join(prompt)}"
    if any(a == b == "assistant" for a, b in pairwise(prompt)):
        return f"two assistant messages in a row: {', '.join(prompt)}"
    if many := [name for name in SIDES if len(pair.columns[name]) > 1]:
        return f"{many[0]} has {len(pair.columns[many[0]])} messages"
    return ""


def scores(data: PairSet) -> Iterator[Finding]:
    """Scores that are no numbers, or say the opposite of the labels."""
    wrong, turned = [], []
    for pair in data.pairs:
        values = [pair.columns.get(name) for name in SCORES]
        if any(value is not None and not _is_number(value) for value in values):
            wrong.append((pair.row, f"{values[0]!r} and {values[1]!r}"))
        elif None not in values and values[0] < values[1]:  # type: ignore[operator]
            turned.append((pair.row, f"{values[0]} < {values[1]}: {pair.texts['prompt']}"))
    names = " and ".join(SCORES)
    yield from found(
        "data.scores", "error", data.where, wrong, f"{names} are not finite numbers", "Give numbers or null."
    )
    yield from found(
        "data.scores-turned",
        "warning",
        data.where,
        turned,
        "the rejected response has the higher score",
        "Turn these pairs round or remove them; or rename the columns, if they are no scores of the responses.",
    )


def _is_number(value: Any) -> bool:
    try:
        return isinstance(value, Real) and bool(np.isfinite(float(value)))  # of true and false the loader has a say
    except OverflowError:  # an integer of hundreds of digits
        return False


def ended(data: PairSet) -> Iterator[Finding]:
    columns = [ended_column(name) for name in SIDES]
    hits = [
        (pair.row, f"{column} is {pair.columns[column]!r}")
        for pair in data.pairs
        for column in columns
        if not isinstance(pair.columns.get(column), bool | None)
    ]
    yield from found(
        "data.ended",
        "error",
        data.where,
        once_a_row(hits),
        f"{' or '.join(columns)} is neither true nor false",
        "Give true, false or null, or rename the column.",
    )


# check, severity, rule, what it is, what to do
CHARACTERS: tuple[tuple[str, Severity, Callable[[str], int | None], str, str], ...] = (
    (
        "data.replacement",
        "warning",
        characters.replacement,
        "U+FFFD stands for a character that was lost",
        "Decode the source again with its right encoding, or remove these rows.",
    ),
    ("data.control", "warning", characters.control, "a control character", "Strip control characters."),
    (
        "data.garbled",
        "warning",
        characters.garbled,
        "UTF-8 was read as Windows-1252",
        "Decode the source again as UTF-8, or repair the text (ftfy does).",
    ),
    (
        "data.invisible",
        "note",
        characters.invisible,
        "an invisible character (zero-width, soft hyphen, text direction)",
        "Strip them, if the text does not need them.",
    ),
)


def odd_characters(data: PairSet) -> Iterator[Finding]:
    for check, severity, rule, message, fix in CHARACTERS:
        hits = [hit for pair in data.pairs if (hit := _hit(pair, rule))]
        yield from found(check, severity, data.where, hits, message, fix)


def normal_forms(data: PairSet) -> Iterator[Finding]:
    """Only a mixture is worth a warning: one form throughout is the writer's choice."""
    hits = [hit for pair in data.pairs if (hit := _hit(pair, characters.decomposed))]
    mixed = hits and any(characters.composed(text) for pair in data.pairs for text in pair.texts.values())
    yield from found(
        "data.normal-form",
        "warning" if mixed else "note",
        data.where,
        hits,
        "letters and their accents are separate characters" + (", in others they are one" if mixed else ""),
        'Normalise all text: unicodedata.normalize("NFC", text).',
    )


def _hit(pair: Pair, rule: Callable[[str], int | None]) -> tuple[int, str] | None:
    for name, text in pair.texts.items():
        if (place := rule(text)) is not None:
            return pair.row, f"{name}: {characters.around(text, place)}"
    return None


def extreme_lengths(data: PairSet) -> Iterator[Finding]:
    limits = {
        name: EXTREME * float(np.quantile(_lengths(data, name), 0.95, method="lower")) for name in COLUMNS if data.pairs
    }
    hits = []
    for pair in data.pairs:
        name = next((name for name in COLUMNS if len(pair.texts[name]) > limits[name] > 0), None)
        if name:
            hits.append((pair.row, f"{name} has {len(pair.texts[name]):,} characters: {pair.texts[name]}"))
    yield from found(
        "data.extreme-length",
        "warning",
        data.where,
        hits,
        f"a text is more than {EXTREME} times as long as 95 % of its column",
        "Look at them: a whole document, a loop, or a broken export? Remove them or let truncation cut them.",
    )


def length_bias(data: PairSet) -> Iterator[Finding]:
    """How often the longer response is the chosen one: a rule that reads nothing is right as often."""
    pairs = [pair for pair in data.pairs if pair.tokens and not pair.tokens.dropped]
    unit = "tokens" if pairs else "characters"
    if pairs:
        sizes = [[len(pair.tokens.ids[name]) for name in SIDES] for pair in pairs if pair.tokens]
    else:
        pairs, sizes = data.pairs, [[len(pair.texts[name]) for name in SIDES] for pair in data.pairs]
    if len(pairs) < 2:
        return
    chosen, rejected = np.array(sizes).T
    measured = estimate(pair_wins(chosen, rejected), [pair.key("prompt") for pair in pairs])
    share, error = measured["mean"], measured["se"]
    away, errors = BIAS
    # Where all prompts agree, no draw of them differs: the error that chance has, had the lengths no part in it.
    least = 0.5 / measured["n"] ** 0.5
    strong = error is not None and abs(share - 0.5) >= max(away, errors * max(error, least))
    margin = "" if error is None else f" ± {error:.1%}"
    which, right = ("longer", share) if share >= 0.5 else ("shorter", 1 - share)
    yield Finding(
        "data.length-bias",
        "warning" if strong else "note",
        f"chosen is longer in {share:.1%}{margin} of the pairs ({chosen.mean():,.0f} against "
        f"{rejected.mean():,.0f} {unit} on average)"
        + (f": a rule that prefers the {which} one is right in {right:.0%} of them" if strong else ""),
        "Compare every accuracy with that rule, and watch the length of what the student writes; or balance the pairs."
        if strong
        else "Nothing to do.",
        int((chosen > rejected).sum()),
        len(pairs),
        data=data.name,
    )


def _lengths(data: PairSet, name: str) -> np.ndarray:
    return np.array([len(pair.texts[name]) for pair in data.pairs])


def _repeated(pairs: Iterable[Pair], key: Callable[[Pair], Any]) -> Iterator[tuple[Pair, Pair]]:
    """Each pair that has come before, with the first that was like it."""
    first: dict[Any, Pair] = {}
    for pair in pairs:
        if (before := first.setdefault(key(pair), pair)) is not pair:
            yield pair, before


def leak(train: PairSet, test: PairSet) -> Iterator[Finding]:
    """Prompts and whole pairs of the test data that are in the training data."""
    known = {_folded(pair): pair.row for pair in reversed(train.pairs)}
    whole = {tuple(pair.key(name) for name in COLUMNS) for pair in train.pairs}
    same: list[tuple[int, str]] = []
    prompts: list[tuple[int, str]] = []
    for pair in test.pairs:
        if (row := known.get(_folded(pair))) is None:
            continue
        hit = (pair.row, f"as row {row} of train: {pair.texts['prompt']}")
        (same if tuple(pair.key(name) for name in COLUMNS) in whole else prompts).append(hit)
    yield from found(
        "data.leaked-pairs",
        "error",
        test.where,
        same,
        "the whole pair is in the training data: what is measured on it is not held out",
        "Remove these rows from test (or from train), and split by prompt.",
    )
    yield from found(
        "data.leaked-prompts",
        "warning",
        test.where,
        prompts,
        "the prompt is in the training data, up to case and spaces",
        "Split by prompt, so that held-out prompts are new.",
    )


def _folded(pair: Pair) -> str:
    return " ".join(pair.texts["prompt"].casefold().split())


DATA_CHECKS = (
    empty_responses,
    empty_prompts,
    equal_responses,
    duplicate_pairs,
    both_labels,
    repeated_prompts,
    turns,
    scores,
    ended,
    odd_characters,
    normal_forms,
    extreme_lengths,
    length_bias,
)
