"""What a check finds: how bad it is, where, how often, and what to do."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass
from typing import Any, Literal

from prefdistill.core.text import printable

# error: it is refused, or what comes out is not what it says. warning: it runs, and rarely as meant. note: to know.
Severity = Literal["error", "warning", "note"]
SEVERITIES: tuple[Severity, ...] = ("error", "warning", "note")
FIRST_ROWS = 5
EXCERPT = 80  # characters


@dataclass(frozen=True)
class Finding:
    """`count` of `of` rows (or tokens) are so, `rows` the first of them; `data` is train, test, or neither."""

    check: str
    severity: Severity
    message: str
    fix: str
    count: int = 1
    of: int = 1
    rows: tuple[int, ...] = ()
    example: str = ""
    data: str = ""

    def __post_init__(self) -> None:
        """Names of files, columns and tokens are somebody else's: a terminal must be safe from them."""
        for name in ("message", "fix", "example"):
            object.__setattr__(self, name, printable(getattr(self, name)))

    def to_json(self) -> dict[str, Any]:
        return {**asdict(self), "rows": list(self.rows)}


def found(
    check: str,
    severity: Severity,
    where: tuple[str, int],
    hits: Iterable[tuple[int, str]],
    message: str,
    fix: str,
) -> Iterator[Finding]:
    """One finding of all the rows that a check hits, or none.

    Args:
        check: its name, `part.what`.
        severity: of the finding.
        where: name of the data, and its rows.
        hits: number of each row, and what is to be seen there.
        message: what is wrong with these rows.
        fix: what to do about it.

    Example:
        >>> [finding.count for finding in found("data.json", "error", ("train", 9), [(3, "x"), (7, "y")], "m", "f")]
        [2]
    """
    hits = list(hits)
    if hits:
        (name, of), (first, seen) = where, hits[0]
        example = f"row {first}: {excerpt(seen)}" if seen else f"row {first}"
        rows = tuple(row for row, _ in hits[:FIRST_ROWS])
        yield Finding(check, severity, message, fix, len(hits), of, rows, example, name)


def once_a_row(hits: Iterable[tuple[int, str]]) -> list[tuple[int, str]]:
    """The first of each row's hits."""
    first: dict[int, str] = {}
    for row, text in hits:
        first.setdefault(row, text)
    return [*first.items()]


def excerpt(text: str) -> str:
    """The start of a text in one line that is safe to print: what cannot be seen is written out.

    Example:
        >>> excerpt("a\\u200bb")
        'a\\\\u200bb'
    """
    return printable(text[:EXCERPT]) + ("…" if len(text) > EXCERPT else "")
