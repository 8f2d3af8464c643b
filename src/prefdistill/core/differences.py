"""Name where two requests differ: the dotted path and both values."""

import re
from collections.abc import Collection, Iterator
from dataclasses import dataclass
from typing import Any

SHOWN = 40  # characters of a value that a message shows
NAMED = 5  # differences that a message names
# Keys that say where a thing lies and how it is read, and not what it is: directories may be moved, and the form of a
# tokenizer is in the digest of its template.
NAMES = frozenset({"name", "read_as", "form"})
_DIGEST = re.compile(r"(sha256:)?[0-9a-f]{20,}")


class _Unset:
    def __repr__(self) -> str:
        return "unset"


UNSET = _Unset()


@dataclass(frozen=True)
class Difference:
    """A place at which two requests differ; a key that one of them lacks is `UNSET` there.

    Example:
        >>> str(Difference("methods.tvkd.alpha", 0.1, 0.2))
        'methods.tvkd.alpha is 0.2, was 0.1'
        >>> Difference("max_length", 256, 128).side_by_side()
        'max_length (256, 128)'
    """

    path: str
    before: Any
    after: Any

    def __str__(self) -> str:
        before, after = _short(self.before, self.after)
        if _is_digest(self.before) and _is_digest(self.after):
            return f"{self.path} differs ({after}, was {before})"
        return f"{self.path} is {after}, was {before}"

    def side_by_side(self) -> str:
        """For two things of which neither is the earlier one."""
        return f"{self.path} ({', '.join(_short(self.before, self.after))})"


def compare(before: Any, after: Any, ignored: Collection[str] = NAMES, path: str = "") -> list[Difference]:
    """Compare two requests or manifests, or parts of them. A key that is missing equals one that is None.

    Args:
        before, after: JSON values.
        ignored: keys that do not count, at any depth.
        path: of both, for messages.

    Example:
        >>> compare({"a": {"b": [1, 2]}}, {"a": {"b": [1, 3]}})
        [Difference(path='a.b[1]', before=2, after=3)]
    """
    return list(_walk(before, after, ignored, path))


def _walk(before: Any, after: Any, ignored: Collection[str], path: str) -> Iterator[Difference]:
    if isinstance(before, dict) and isinstance(after, dict):
        for key in sorted({*before, *after} - set(ignored)):
            inner = f"{path}.{key}" if path else key
            old, new = before.get(key, UNSET), after.get(key, UNSET)
            if {type(old), type(new)} != {_Unset, type(None)}:
                yield from _walk(old, new, ignored, inner)
    elif isinstance(before, list) and isinstance(after, list) and len(before) == len(after):
        for place, (old, new) in enumerate(zip(before, after, strict=True)):
            yield from _walk(old, new, ignored, f"{path}[{place}]")
    elif before != after:
        yield Difference(path or "the value", before, after)


def differences(before: dict[str, Any], after: dict[str, Any]) -> list[str]:
    """Name where two requests differ, one text per place.

    Example:
        >>> differences({"name": "a", "model": {"dtype": "float32"}}, {"name": "b", "model": {"dtype": "bfloat16"}})
        ["model.dtype is 'bfloat16', was 'float32'"]
    """
    return [str(difference) for difference in compare(before, after)]


def listed(texts: list[str]) -> str:
    """Join differences for a message, the first few by name.

    Example:
        >>> listed(["a", "b", "c", "d", "e", "f", "g"])
        'a; b; c; d; e; 2 more'
    """
    more = [f"{len(texts) - NAMED} more"] if len(texts) > NAMED else []
    return "; ".join(texts[:NAMED] + more)


def _short(before: Any, after: Any) -> tuple[str, str]:
    """Both values, short enough for a message, and still different."""
    digests = [_is_digest(value) for value in (before, after)]
    texts = [
        value.removeprefix("sha256:") if digest else repr(value)
        for value, digest in zip((before, after), digests, strict=True)
    ]
    pairs = enumerate(zip(*texts, strict=False))
    same = next((place for place, (a, b) in pairs if a != b), min(map(len, texts)))  # characters they begin with
    if any(digests):
        length = max(4, same + 1) if all(digests) else 8
        old, new = (f"{t[:length]}..." if digest else _cut(t, 0) for t, digest in zip(texts, digests, strict=True))
        return old, new
    if max(map(len, texts)) <= SHOWN:
        return texts[0], texts[1]
    start = same - SHOWN // 4 if same >= SHOWN // 2 else 0
    return _cut(texts[0], start), _cut(texts[1], start)


def _cut(text: str, start: int) -> str:
    end = start + SHOWN
    return ("..." if start else "") + text[start:end] + ("..." if len(text) > end else "")


def _is_digest(value: Any) -> bool:
    return isinstance(value, str) and _DIGEST.fullmatch(value) is not None
