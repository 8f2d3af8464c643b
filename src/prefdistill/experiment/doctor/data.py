"""Checks of preference pairs as text. Each is a function of one data set that yields findings."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from itertools import pairwise
from numbers import Real
from typing import Any

import numpy as np

from prefdistill.data.columns import SCORES, SIDES, ended_column
from prefdistill.evaluation.stats import estimate, pair_wins
from prefdistill.experiment.doctor import characters
from prefdistill.experiment.doctor.findings import Finding, Severity, first_hit_per_row
from prefdistill.experiment.doctor.markers import one_sided_markers
from prefdistill.experiment.doctor.pairs import COLUMNS, Pair, PairSet

ROLES = {"system", "developer", "user", "assistant", "tool"}
EXTREME = 10  # times the 95th percentile of the lengths
BIAS = 0.1, 3.0  # distance from one half of the share of pairs whose chosen response is longer; also in standard errors


def empty_responses(data: PairSet) -> Iterator[Finding]:
    empty = [
        (pair.row, f"{name} is {pair.texts[name]!r}")
        for pair in data.pairs
        for name in [next((name for name in SIDES if not pair.texts[name].strip()), None)]
        if name
    ]
    yield from data.finding("data.empty-response", "warning", empty, "a response has no text", "Remove these rows.")


def empty_prompts(data: PairSet) -> Iterator[Finding]:
    hits = [(pair.row, pair.texts["chosen"]) for pair in data.pairs if not pair.texts["prompt"].strip()]
    yield from data.finding("data.empty-prompt", "warning", hits, "the prompt has no text", "Remove these rows.")


def equal_responses(data: PairSet) -> Iterator[Finding]:
    hits = [(pair.row, pair.texts["chosen"]) for pair in data.pairs if pair.key("chosen") == pair.key("rejected")]
    yield from data.finding(
        "data.equal-responses",
        "warning",
        hits,
        "chosen and rejected are equal: the pair expresses no preference, and accuracy counts it as a tie",
        "Remove these rows.",
    )


def duplicate_pairs(data: PairSet) -> Iterator[Finding]:
    hits = [
        (pair.row, f"as row {first.row}: {pair.texts['prompt']}")
        for pair, first in _repeated(data.pairs, lambda pair: tuple(pair.key(name) for name in COLUMNS))
    ]
    yield from data.finding(
        "data.duplicate-pairs",
        "warning",
        hits,
        "the pair is a duplicate of an earlier one",
        "Keep one of each, unless the extra weight is intended.",
    )


def near_duplicates(data: PairSet) -> Iterator[Finding]:
    """Find responses and pairs that are equal up to case, spaces and punctuation."""
    alike = [
        (pair.row, f"{pair.texts['chosen']!r} and {pair.texts['rejected']!r}")
        for pair in data.pairs
        if pair.key("chosen") != pair.key("rejected") and _words(pair, "chosen") == _words(pair, "rejected") != ""
    ]
    yield from data.finding(
        "data.near-equal-responses",
        "warning",
        alike,
        "chosen and rejected differ in case, spaces or punctuation alone",
        "Remove these rows, unless that difference is what shall be learnt.",
    )
    exact = {pair.row for pair, _ in _repeated(data.pairs, lambda pair: tuple(pair.key(name) for name in COLUMNS))}
    others = (pair for pair in data.pairs if pair.row not in exact)
    again = [
        (pair.row, f"as row {first.row}: {pair.texts['prompt']}")
        for pair, first in _repeated(others, lambda pair: tuple(_words(pair, name) for name in COLUMNS))
        if any(_words(pair, name) for name in COLUMNS)
    ]
    yield from data.finding(
        "data.near-duplicates",
        "warning",
        again,
        "the pair is an earlier one up to case, spaces and punctuation",
        "Keep one of each, unless the extra weight is intended.",
    )


def _words(pair: Pair, name: str) -> str:
    """Return the letters and digits of a column, in lower case."""
    return "".join(filter(str.isalnum, pair.texts[name].casefold()))


def both_labels(data: PairSet) -> Iterator[Finding]:
    seen = {tuple(pair.key(name) for name in COLUMNS): pair for pair in reversed(data.pairs)}
    hits = []
    for pair in data.pairs:
        prompt, chosen, rejected = (pair.key(name) for name in COLUMNS)
        other = seen.get((prompt, rejected, chosen))
        if other is not None and chosen != rejected:
            hits.append((pair.row, f"flipped in row {other.row}: {pair.texts['prompt']}"))
    yield from data.finding(
        "data.both-labels",
        "warning",
        hits,
        "the same two responses are labelled both ways",
        "Keep one of the two, or remove both.",
    )


def repeated_prompts(data: PairSet) -> Iterator[Finding]:
    prompts = Counter(pair.key("prompt") for pair in data.pairs)
    hits = [(pair.row, pair.texts["prompt"]) for pair in data.pairs if prompts[pair.key("prompt")] > 1]
    most = max(prompts.values(), default=0)
    yield from data.finding(
        "data.repeated-prompts",
        "note",
        hits,
        f"the prompt has several pairs ({len(prompts):,} prompts in all, at most {most} pairs per prompt)",
        "Split train and test by prompt, and compute error bars over prompts: pairs of one prompt are not independent.",
    )


def turns(data: PairSet) -> Iterator[Finding]:
    """Find conversations that most chat templates refuse or misread."""
    hits = [(pair.row, why) for pair in data.pairs if data.conversational and (why := _odd_turns(pair))]
    yield from data.finding(
        "data.turns",
        "warning",
        hits,
        "roles are unknown or do not alternate",
        "Use an optional system message, then user and assistant alternating: the prompt ends with a user message, "
        "and a response is one message.",
    )


def _odd_turns(pair: Pair) -> str:
    prompt = [message["role"] for message in pair.columns["prompt"]]
    if unknown := [role for role in prompt if role not in ROLES]:
        return f"a role {unknown[0]!r}"
    if {"system", "developer"} & {*prompt[1:]}:
        return f"a system message in the middle: {', '.join(prompt)}"
    dialogue = [role for role in prompt if role in ("user", "assistant")]
    if not dialogue or dialogue[0] != "user":
        return f"the user does not come first: {', '.join(prompt)}"
    if any(a == b == "user" for a, b in pairwise(prompt)):
        return f"two user messages in a row: {', '.join(prompt)}"
    if any(a == b == "assistant" for a, b in pairwise(prompt)):
        return f"two assistant messages in a row: {', '.join(prompt)}"
    if several := [name for name in SIDES if len(pair.columns[name]) > 1]:
        return f"{several[0]} has {len(pair.columns[several[0]])} messages"
    return ""


def scores(data: PairSet) -> Iterator[Finding]:
    """Find scores that are not numbers, or that contradict the labels."""
    invalid, contradicting = [], []
    for pair in data.pairs:
        values = [pair.columns.get(name) for name in SCORES]
        if any(value is not None and not _is_number(value) for value in values):
            invalid.append((pair.row, f"{values[0]!r} and {values[1]!r}"))
        elif None not in values and values[0] < values[1]:  # type: ignore[operator]
            contradicting.append((pair.row, f"{values[0]} < {values[1]}: {pair.texts['prompt']}"))
    names = " and ".join(SCORES)
    yield from data.finding("data.scores", "error", invalid, f"{names} are not finite numbers", "Give numbers or null.")
    yield from data.finding(
        "data.scores-turned",
        "warning",
        contradicting,
        "the rejected response has the higher score",
        "Flip or remove these pairs; or rename the columns, if they are not scores of the responses.",
    )


def _is_number(value: Any) -> bool:
    try:
        return isinstance(value, Real) and bool(np.isfinite(float(value)))  # the loader decides about booleans
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
    yield from data.finding(
        "data.ended",
        "error",
        first_hit_per_row(hits),
        f"{' or '.join(columns)} is neither true nor false",
        "Give true, false or null, or rename the column.",
    )


# check, severity, rule, message, fix
CHARACTERS: tuple[tuple[str, Severity, Callable[[str], int | None], str, str], ...] = (
    (
        "data.replacement",
        "warning",
        characters.replacement,
        "U+FFFD replaces a character that was lost",
        "Decode the source again with the right encoding, or remove these rows.",
    ),
    ("data.control", "warning", characters.control, "a text has a control character", "Strip control characters."),
    (
        "data.garbled",
        "warning",
        characters.garbled,
        "UTF-8 was decoded as Windows-1252",
        "Decode the source again as UTF-8, or fix the text (for instance with ftfy).",
    ),
    (
        "data.invisible",
        "note",
        characters.invisible,
        "a text has an invisible character (zero-width, soft hyphen, text direction)",
        "Strip them, if the text does not need them.",
    ),
)


def odd_characters(data: PairSet) -> Iterator[Finding]:
    for check, severity, rule, message, fix in CHARACTERS:
        hits = [hit for pair in data.pairs if (hit := _hit(pair, rule))]
        yield from data.finding(check, severity, hits, message, fix)


def normal_forms(data: PairSet) -> Iterator[Finding]:
    """Find decomposed accents: a warning only if others are composed, since one form throughout is a choice."""
    hits = [hit for pair in data.pairs if (hit := _hit(pair, characters.decomposed))]
    mixed = hits and any(characters.composed(text) for pair in data.pairs for text in pair.texts.values())
    yield from data.finding(
        "data.normal-form",
        "warning" if mixed else "note",
        hits,
        "accented letters are two characters" + (", in other places they are one" if mixed else ""),
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
    yield from data.finding(
        "data.extreme-length",
        "warning",
        hits,
        f"a text is more than {EXTREME} times as long as 95 % of its column",
        "Check for whole documents, loops or a broken export. Remove such rows, or let them be truncated.",
    )


def length_bias(data: PairSet) -> Iterator[Finding]:
    """Report how often the longer response is chosen: a rule that reads only lengths is right as often."""
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
    distance, errors = BIAS
    # If all prompts agree, the measured error is 0: use at least the error of a fair coin.
    least = 0.5 / measured["n"] ** 0.5
    strong = error is not None and abs(share - 0.5) >= max(distance, errors * max(error, least))
    margin = "" if error is None else f" ± {error:.1%}"
    which, right = ("longer", share) if share >= 0.5 else ("shorter", 1 - share)
    yield Finding(
        "data.length-bias",
        "warning" if strong else "note",
        f"chosen is longer in {share:.1%}{margin} of the pairs ({chosen.mean():,.0f} against "
        f"{rejected.mean():,.0f} {unit} on average)"
        + (f": a rule that prefers the {which} one is right in {right:.0%} of them" if strong else ""),
        "Compare accuracies with that rule, and watch the length of the student's responses; or balance the pairs."
        if strong
        else "Nothing to do.",
        int((chosen > rejected).sum()),
        len(pairs),
        data=data.name,
    )


def _lengths(data: PairSet, name: str) -> np.ndarray:
    return np.array([len(pair.texts[name]) for pair in data.pairs])


def _repeated(pairs: Iterable[Pair], key: Callable[[Pair], Any]) -> Iterator[tuple[Pair, Pair]]:
    """Yield each pair that repeats an earlier one, with the first of its kind."""
    first: dict[Any, Pair] = {}
    for pair in pairs:
        if (earlier := first.setdefault(key(pair), pair)) is not pair:
            yield pair, earlier


def leak(train: PairSet, test: PairSet) -> Iterator[Finding]:
    """Find prompts and whole pairs of the test data that are in the training data."""
    train_rows = {_normalised_prompt(pair): pair.row for pair in reversed(train.pairs)}
    train_pairs = {tuple(pair.key(name) for name in COLUMNS) for pair in train.pairs}
    same: list[tuple[int, str]] = []
    prompts: list[tuple[int, str]] = []
    for pair in test.pairs:
        if (row := train_rows.get(_normalised_prompt(pair))) is None:
            continue
        hit = (pair.row, f"as row {row} of train: {pair.texts['prompt']}")
        (same if tuple(pair.key(name) for name in COLUMNS) in train_pairs else prompts).append(hit)
    yield from test.finding(
        "data.leaked-pairs",
        "error",
        same,
        "the whole pair is in the training data: it is not held out",
        "Remove these rows from test (or from train), and split by prompt.",
    )
    yield from test.finding(
        "data.leaked-prompts",
        "warning",
        prompts,
        "the prompt is in the training data, up to case and spaces",
        "Split by prompt, so that held-out prompts are new.",
    )


def _normalised_prompt(pair: Pair) -> str:
    return " ".join(pair.texts["prompt"].casefold().split())


DATA_CHECKS = (
    empty_responses,
    empty_prompts,
    equal_responses,
    duplicate_pairs,
    near_duplicates,
    both_labels,
    repeated_prompts,
    turns,
    scores,
    ended,
    odd_characters,
    normal_forms,
    extreme_lengths,
    length_bias,
    one_sided_markers,
)
