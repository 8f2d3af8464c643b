"""Find characters that are probably mistakes: each rule returns the place of the first one in a text, or None."""

import re
import unicodedata

_CONTROL = re.compile("[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f]")
# Joiners have a meaning in many scripts and in emoji, but not between plain Latin characters.
_INVISIBLE = re.compile("[\u00ad\u200b\u2060\ufeff\u202a-\u202e\u2066-\u2069]|(?<=[ -~])[\u200c\u200d](?=[ -~])")
# UTF-8 decoded as Windows-1252: each byte became one character. The bytes of one character are a lead (C2..F4)
# and one to three continuations (80..BF), which cp1252 shows as these; its five gaps became control characters.
_CONTINUATION = bytes(range(0x80, 0xC0)).decode("cp1252", errors="ignore") + "\x81\x8d\x8f\x90\x9d"
_GARBLED = re.compile(
    f"[\u00c2\u00c3][{_CONTINUATION}]|[\u00e0-\u00ef][{_CONTINUATION}]{{2}}|[\u00f0-\u00f4][{_CONTINUATION}]{{3}}"
)


def replacement(text: str) -> int | None:
    """Find U+FFFD, which replaces characters that could not be decoded."""
    place = text.find("\ufffd")
    return None if place < 0 else place


def control(text: str) -> int | None:
    """Find a control character."""
    return _first(_CONTROL, text)


def invisible(text: str) -> int | None:
    """Find a zero-width character, soft hyphen or text direction mark."""
    return _first(_INVISIBLE, text)


def decomposed(text: str) -> int | None:
    """Find a letter followed by a separate accent: text that is not in normal form C."""
    if text.isascii() or len(normal := unicodedata.normalize("NFC", text)) >= len(text):
        return None
    return next((i for i, (a, b) in enumerate(zip(text, normal, strict=False)) if a != b), len(normal))


def composed(text: str) -> bool:
    """Return whether the text has an accented letter as one character."""
    return not text.isascii() and len(unicodedata.normalize("NFD", text)) > len(text)


def garbled(text: str) -> int | None:
    """Find UTF-8 that was decoded as Windows-1252, such as "Ã©" for "é" and "â€™" for "’".

    Two characters count as garbled only if the character they stand for is likely there: a letter beside lower-case
    letters ("cafÃ©"), a sign after Â ("Â°"). So "À LA UNE «LIBERTÉ»" is no finding.
    """
    for match in () if text.isascii() else _GARBLED.finditer(text):
        raw = b"".join(c.encode("cp1252") if ord(c) not in _GAPS else bytes([ord(c)]) for c in match.group())
        try:
            original = raw.decode("utf-8")
        except UnicodeDecodeError:
            continue
        before, after = text[: match.start()][-1:], text[match.end() :][:1]
        kind = unicodedata.category(original)
        if len(match.group()) > 2 or (kind[0] == "L" and (before + after).lower() == before + after != ""):
            if kind != "Cn" and kind != "Co":
                return match.start()
        elif match.group()[0] == "\u00c2" and kind[0] != "L" and not before.isupper():
            return match.start()
    return None


_GAPS = {0x81, 0x8D, 0x8F, 0x90, 0x9D}


def around(text: str, place: int) -> str:
    """Return the text around a place."""
    return text[max(0, place - 30) : place + 40]


def _first(pattern: re.Pattern[str], text: str) -> int | None:
    match = pattern.search(text)
    return match.start() if match else None
