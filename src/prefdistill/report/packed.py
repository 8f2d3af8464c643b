"""Compress the pairs of the token view: tokens and numbers in planes of bytes, deflated in blocks.

A block holds `BLOCK` pairs, and the page unpacks the one it shows:

    length of the head (uint32, little-endian), the head (JSON), then for the tokens of every pair, chosen before
    rejected: the number of each token's piece, and a number per field; and where the teacher has other tokens, whether
    it shares the state after each of these, then for its own tokens pieces, that flag, and the steps of its values

A whole array is written one byte of its numbers after another (the lowest first), which compresses better. The
piece of a token is its id and the text it stands for, both in one table for the whole page, the commonest first.
Numbers of a field are int16 multiples of a step, about 1/2000 of the scale they are shown on or, where a pair needs it,
more; MISSING is a place without a number. A field that is a path (the value of each state) is written as differences
that add up to the rounded path.
"""

import base64
import json
import struct
import zlib
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np

BLOCK = 64
MISSING = -(2**15)
LIMIT = 2**15 - 1


class Pieces:
    """The table of pieces, numbered in the order they are first seen until `ranked` sorts them."""

    def __init__(self) -> None:
        self._numbers: dict[tuple[int, str], int] = {}

    def number(self, ids: Sequence[int], text: str, ends: Sequence[int]) -> np.ndarray:
        """Return the pieces of one response, [T], from its tokens and where each ends in its text."""
        numbers, pieces, start = self._numbers, [], 0
        for token, end in zip(ids, ends, strict=True):
            pieces.append(numbers.setdefault((token, text[start:end]), len(numbers)))
            start = end
        return np.array(pieces, dtype=np.int64)

    def ranked(self, counts: np.ndarray) -> tuple[list[tuple[int, str]], np.ndarray]:
        """Return the table with the most common piece first, and each piece's new place, from how often each occurs."""
        order = np.argsort(-counts, kind="stable")
        places = np.empty(len(order), dtype=np.int64)
        places[order] = np.arange(len(order))
        table = list(self._numbers)
        return [table[i] for i in order], places

    def __len__(self) -> int:
        return len(self._numbers)


def finest(scale: float) -> int:
    """Return the exponent e of the smallest step 2^e for numbers that are shown on a scale."""
    return int(np.floor(np.log2(scale))) - 11


def quantised(numbers: np.ndarray, least: int) -> tuple[np.ndarray, int]:
    """Return numbers (nan where there is none) as int16, and the exponent e of their step 2^e, `least` or more."""
    present = np.isfinite(numbers)
    exponent = _exponent(np.abs(numbers[present]).max(initial=0.0), least)
    scaled = np.round(np.where(present, numbers, 0.0) / 2.0**exponent)
    return np.where(present, scaled, MISSING).astype(np.int16), exponent


def quantised_steps(paths: Sequence[np.ndarray], least: int) -> tuple[list[np.ndarray], int]:
    """Return differences along each path [T + 1] as int16 [T], and the exponent of their step; no error adds up."""
    exponent = _exponent(max(float(np.abs(np.diff(path)).max(initial=0.0)) for path in paths), least)
    return [np.diff(np.round((path - path[0]) / 2.0**exponent)).astype(np.int16) for path in paths], exponent


def _exponent(largest: float, least: int) -> int:
    """Return the exponent that fits; differences of rounded numbers are off by one step at most, which fits too."""
    return max(least, int(np.ceil(np.log2(largest / (LIMIT - 1))))) if largest > 0 else least


def block(head: Any, numbers: Iterable[tuple[np.ndarray, int]]) -> str:
    """Return a block as text: its head, and arrays of numbers, each with how many bytes one of them takes."""
    text = _json(head)
    parts = [_planes(part.astype("<i4"), width) for part, width in numbers]
    return deflated(b"".join([struct.pack("<I", len(text)), text, *parts]))


def deflated_json(value: Any) -> str:
    return deflated(_json(value))


def deflated(data: bytes) -> str:
    return base64.b64encode(zlib.compress(data, 9)).decode()


def width_of(count: int) -> int:
    """Return how many bytes the numbers below `count` take."""
    return max(1, ((count - 1).bit_length() + 7) // 8)


def _planes(numbers: np.ndarray, width: int) -> bytes:
    return np.ascontiguousarray(numbers.view(np.uint8).reshape(-1, numbers.itemsize)[:, :width].T).tobytes()


def _json(value: Any) -> bytes:
    return json.dumps(value, separators=(",", ":"), allow_nan=False).encode()
