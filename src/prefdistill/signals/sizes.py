"""How large a signal store will be, before anything is read (docs/signals.md has the table)."""

from collections.abc import Collection
from typing import Literal

from prefdistill.signals.gauge import DIRECTIONS
from prefdistill.signals.packing import MOST, id_bits
from prefdistill.signals.reading import VALUES


def store_bytes(
    kinds: Collection[str],
    tokens: int,
    responses: int,
    vocabulary: int,
    *,
    positions: Literal["all", "endpoints"] = "all",
    value_dtype: Literal["float32", "float16"] = "float32",
    k: int | Literal["vocab"] = 50,
    packed: bool = True,
    own_ids: bool = True,
) -> int:
    """The most bytes that a store takes, footers aside: Parquet's own compression saves up to half of it.

    Args:
        kinds: of `KINDS`.
        tokens, responses: how many the store tells of.
        vocabulary: rows of the model's head.
        positions, value_dtype, k, packed: as for `extract_signals`; `packed` is its topk_coding.
        own_ids: False for a store that is read at another's ids.

    Example:
        >>> store_bytes(["topk"], 1_000, 0, 128_256) - store_bytes([], 1_000, 0, 128_256)   # 126 a token
        126250
    """
    if positions == "endpoints":
        return 8 * responses
    states = tokens + responses
    total = 2 * responses + tokens  # lengths, and where each token ends
    for kind in set(VALUES).intersection(kinds):
        total += states * (2 if value_dtype == "float16" else 4)
        total += 4 * DIRECTIONS * responses if kind == "values" else 0
    total += 4 * responses * len({"logps", "q"}.intersection(kinds))
    if "topk" in kinds:
        most = vocabulary if k == "vocab" else min(k, vocabulary)
        if packed and own_ids:
            bits = most * id_bits(vocabulary) + most + min(MOST, max(0, 16 * most - 47)) + 3 * 16
        elif packed:
            bits = 8 * most + 2 * 16
        else:
            bits = most * (32 + (id_bits(vocabulary) if own_ids else 0)) + 32
        total += tokens * bits // 8
    return total
