"""Estimate how large a signal store will be, before anything is extracted (docs/signals.md has the table)."""

from collections.abc import Collection
from typing import Literal

from prefdistill.signals.kinds import Settings, make_kinds
from prefdistill.signals.packing import id_bits


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
    """Return the most bytes that a store takes, footers aside: Parquet's compression saves up to half of it.

    Args:
        kinds: of `KINDS`.
        tokens, responses: how many the store covers.
        vocabulary: rows of the model's head.
        positions, value_dtype, k, packed: as for `extract_signals`; `packed` is its topk_coding.
        own_ids: False for a store at another store's token ids.

    Example:
        >>> store_bytes(["topk"], 1_000, 0, 128_256) - store_bytes([], 1_000, 0, 128_256)   # 126 a token
        126250
    """
    topk = {"k": k, "vocabulary": vocabulary, "coding": "packed" if packed else "float32"}
    topk |= {"id_bits": id_bits(vocabulary)} | ({} if own_ids else {"ids_from": "another store"})
    settings = Settings(positions=positions, value_dtype=value_dtype, topk=topk)
    lengths = 0 if settings.endpoints else 2 * responses + tokens  # number of tokens, and where each token ends
    checks = 4 * responses  # of the token ids
    return lengths + checks + sum(kind.stored_bytes(tokens, responses) for kind in make_kinds(kinds, settings))
