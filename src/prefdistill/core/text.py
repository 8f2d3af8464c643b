"""Text for people: sizes, characters that UTF-8 cannot hold, and characters that a terminal must not get."""

import re
from collections.abc import Collection, Sequence

_SURROGATE = re.compile("[\ud800-\udfff]")


def surrogate(text: str) -> int | None:
    """Return the place of the first half of a surrogate pair, which JSON can hold but UTF-8 cannot."""
    match = _SURROGATE.search(text)
    return match.start() if match else None


def printable(text: str) -> str:
    """Return the text with invisible and control characters escaped.

    Example:
        >>> printable("a\\u200b")
        'a\\\\u200b'
    """
    return "".join(c if c.isprintable() else c.encode("unicode_escape", "surrogatepass").decode() for c in text)


def size(count: float) -> str:
    """Return bytes for a reader.

    Example:
        >>> size(3 * 2**30 // 2), size(900 * 2**20)
        ('1.5 GiB', '900 MiB')
    """
    for unit, power in (("GiB", 30), ("MiB", 20), ("KiB", 10)):
        if (value := count / (1 << power)) >= 1:
            return f"{value:,.0f} {unit}" if value >= 100 else f"{value:.1f} {unit}"
    return f"{count:.0f} bytes"


def table(lines: Sequence[Sequence[str]], left: Collection[int] = (0,)) -> str:
    """Return lines of cells as columns, those of the places `left` aligned to the left and the others to the right.

    Example:
        >>> print(table([["step", "hours"], ["signals", "7.3"]]))
        step     hours
        signals    7.3
    """
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    return "\n".join(
        "  ".join(
            cell.ljust(width) if place in left else cell.rjust(width)
            for place, (cell, width) in enumerate(zip(line, widths, strict=True))
        ).rstrip()
        for line in lines
    )
