"""Text that no file can hold, and text that is not to be shown as it is."""

import re

_SURROGATE = re.compile("[\ud800-\udfff]")


def surrogate(text: str) -> int | None:
    """The place of the first half of a surrogate pair, which can be read from JSON but not written in UTF-8."""
    found = _SURROGATE.search(text)
    return found.start() if found else None


def printable(text: str) -> str:
    """What cannot be seen, or would steer a terminal, written out.

    Example:
        >>> printable("a\\u200b")
        'a\\\\u200b'
    """
    return "".join(c if c.isprintable() else c.encode("unicode_escape", "surrogatepass").decode() for c in text)
