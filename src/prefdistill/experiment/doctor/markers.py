"""Find what tells the two sides apart by its form: text that nearly all responses of one side have and hardly any of
the other, such as an opening `<think>`, a stock phrase, end punctuation, formatting or a language."""

from __future__ import annotations

import re
import unicodedata
from collections import Counter
from collections.abc import Iterator

from prefdistill.data.columns import SIDES, ended_column
from prefdistill.experiment.doctor.findings import Finding, excerpt
from prefdistill.experiment.doctor.pairs import Pair, PairSet

NEARLY_ALL, HARDLY_ANY = 0.9, 0.1  # shares of the responses of a side
FEWEST = 20  # pairs, below which chance makes markers
SAMPLE = 5_000  # pairs
SHOWN = 4  # markers
END = 20  # last characters
LETTERS = 200  # by which the script of a response is recognised
PIECE = re.compile(r"</?[\w|-]+>|\w+|[^\w\s]")
INSIDE = {
    "has several paragraphs": re.compile(r"\S *\n\s*\n"),
    "has a list": re.compile(r"^ *(?:[-*•]|\d+[.)]) ", re.MULTILINE),
    "has a heading": re.compile(r"^#+ ", re.MULTILINE),
    "has bold text": re.compile(r"\*\*\S"),
    "has a code block": re.compile(r"```"),
    "has a link": re.compile(r"https?://"),
}
AT_START = {"starts with a capital letter": re.compile(r"\s*[A-Z]"), "starts with white space": re.compile(r"\s")}
AT_END = {  # of the last characters
    "ends with end punctuation": re.compile(r"[.!?…。！？][^\w\s]*\s*$"),
    "ends with white space": re.compile(r"\s$"),
}


def one_sided_markers(data: PairSet) -> Iterator[Finding]:
    pairs = data.pairs[:: max(1, len(data.pairs) // SAMPLE)]
    if len(pairs) < FEWEST:
        return
    forms = [{side: set(_forms(pair, side)) for side in SIDES} for pair in pairs]
    counts = {side: Counter(form for row in forms for form in row[side]) for side in SIDES}
    one_sided = []
    for form in counts["chosen"] | counts["rejected"]:
        shares = [counts[side][form] / len(pairs) for side in SIDES]
        if max(shares) >= NEARLY_ALL and min(shares) <= HARDLY_ANY:
            one_sided.append((form, shares))
    if not one_sided:
        return
    one_sided.sort(key=lambda one: (_kind(one[0]), abs(one[1][0] - one[1][1]), len(one[0])), reverse=True)
    best = max(one_sided, key=lambda one: abs(one[1][0] - one[1][1]))[0]
    rows = [
        pair for pair, row in zip(pairs, forms, strict=True) if (best in row["chosen"]) != (best in row["rejected"])
    ]
    shown: list[str] = []
    for form, (chosen, rejected) in one_sided:
        text = _quoted(form)
        if len(shown) < SHOWN and not (text and any(text in _quoted(other) for other in shown)):
            shown.append(f"{form} ({chosen:.0%} of chosen, {rejected:.0%} of rejected)")
    yield Finding(
        "data.one-sided",
        "warning",
        f"a form tells chosen from rejected: {'; '.join(shown)}. A student may learn it in place of what is better",
        "Remove it from the texts, or give it to both sides; check how the responses were made and exported.",
        len(rows),
        len(pairs),
        tuple(pair.row for pair in rows[:5]),
        f"row {rows[0].row}: {excerpt(rows[0].texts['chosen'][:40])!r} and {excerpt(rows[0].texts['rejected'][:40])!r}",
        data.name,
    )


def _quoted(form: str) -> str:
    """Return the text that a form quotes, in lower case; "" if it quotes none."""
    return form.partition("`")[2].rpartition("`")[0].lower()


def _kind(form: str) -> int:
    """Return a higher number for a form that says more: one with a name, then text at the edges, then text inside."""
    return 2 if not _quoted(form) else 1 if not form.startswith("contains") else 0


def _forms(pair: Pair, side: str) -> Iterator[str]:
    """Yield what a response looks like, in words."""
    text = pair.texts[side]
    pieces = PIECE.findall(text)
    yield from {f"contains `{piece.lower()}`" for piece in pieces}
    for count in (1, 2, 3):
        yield f"starts with `{' '.join(pieces[:count])}`"
        yield f"ends with `{' '.join(pieces[-count:])}`"
    yield from (form for form, pattern in INSIDE.items() if pattern.search(text))
    yield from (form for form, pattern in AT_START.items() if pattern.match(text))
    yield from (form for form, pattern in AT_END.items() if pattern.search(text[-END:]))
    letters = [letter for letter in text[: 2 * LETTERS] if letter.isalpha()][:LETTERS]
    for script, _ in Counter(unicodedata.name(letter, "?").split()[0] for letter in letters).most_common(1):
        yield f"is in {script.capitalize()} letters"
    if pair.columns.get(ended_column(side)) is False:
        yield "was cut while it was sampled"
