"""Findings: what is wrong, how severe it is, in which rows, and how to fix it."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from typing import Any, Literal

from prefdistill.core.errors import UserError
from prefdistill.core.text import printable

# error: the run is refused or its results are wrong; warning: it runs, but probably not as intended; note: good to know
Severity = Literal["error", "warning", "note"]
SEVERITIES: tuple[Severity, ...] = ("error", "warning", "note")
FIRST_ROWS = 5
EXCERPT = 80  # characters


@dataclass(frozen=True)
class Finding:
    """A result of a check: it holds for `count` of `of` rows or tokens, of which `rows` are the first.

    `data` is "train" or "test", or "" for what is not about data.
    """

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
        """Escape control characters: names of files, columns and tokens must not reach the terminal as they are."""
        for name in ("message", "fix", "example"):
            object.__setattr__(self, name, printable(getattr(self, name)))

    def to_json(self) -> dict[str, Any]:
        return {**asdict(self), "rows": list(self.rows)}


@contextmanager
def recipe_errors(findings: list[Finding], where: str = "") -> Iterator[None]:
    """Turn an error that a run would raise about the recipe into a finding, and continue."""
    try:
        yield
    except UserError as error:
        findings.append(Finding("recipe.check", "error", f"{where}{error}", "Change the recipe."))


def finding_for_rows(
    check: str,
    severity: Severity,
    where: tuple[str, int],
    hits: Iterable[tuple[int, str]],
    message: str,
    fix: str,
) -> Iterator[Finding]:
    """Yield one finding for all the rows that a check hits, or none.

    Args:
        check: its name, `part.what`.
        severity: of the finding.
        where: name of the data, and its rows.
        hits: number of each row, and an example of what is wrong there.
        message: what is wrong with these rows.
        fix: how to fix it.

    Example:
        >>> hits = [(3, "x"), (7, "y")]
        >>> [finding.count for finding in finding_for_rows("data.json", "error", ("train", 9), hits, "m", "f")]
        [2]
    """
    hits = list(hits)
    if hits:
        (name, of), (first, shown) = where, hits[0]
        example = f"row {first}: {excerpt(shown)}" if shown else f"row {first}"
        rows = tuple(row for row, _ in hits[:FIRST_ROWS])
        yield Finding(check, severity, message, fix, len(hits), of, rows, example, name)


def first_hit_per_row(hits: Iterable[tuple[int, str]]) -> list[tuple[int, str]]:
    """Return the first hit of each row."""
    first: dict[int, str] = {}
    for row, text in hits:
        first.setdefault(row, text)
    return [*first.items()]


def excerpt(text: str) -> str:
    """Return the start of a text in one line that is safe to print: invisible characters are escaped.

    Example:
        >>> excerpt("a\\u200bb")
        'a\\\\u200bb'
    """
    return printable(text[:EXCERPT]) + ("…" if len(text) > EXCERPT else "")
