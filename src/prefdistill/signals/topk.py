"""The signal kind "topk": the most likely tokens of each state, their log-probabilities, and the mass of all others."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from prefdistill.core.errors import UserError
from prefdistill.signals.kinds import Column, Kind, Tile
from prefdistill.signals.packing import (
    MOST,
    id_bits,
    kl_error,
    pack_sorted,
    pack_unsorted,
    unpack_sorted,
    unpack_unsorted,
)

if TYPE_CHECKING:
    import pyarrow as pa
    from torch import Tensor

    from prefdistill.signals.interfaces import Store, Stores

COLUMNS = {
    "counts": Column("int32", ragged=True, encoding="DICTIONARY"),  # often the same number throughout
    "ids": Column("int32", ragged=True, encoding="DELTA_BINARY_PACKED"),
    "logps": Column("float32", ragged=True, encoding="BYTE_STREAM_SPLIT"),
    "rest": Column("float32", ragged=True, encoding="BYTE_STREAM_SPLIT"),
}
PACKED_COLUMNS = {
    "counts": COLUMNS["counts"],
    "ids": Column("binary"),
    "levels": Column("binary"),
    "gap": Column("float16", ragged=True, encoding="BYTE_STREAM_SPLIT"),
    "span": Column("float16", ragged=True, encoding="BYTE_STREAM_SPLIT"),
    "odds": Column("float16", ragged=True, encoding="BYTE_STREAM_SPLIT"),
}
PACKED_AT_IDS = ("counts", "levels", "span", "odds")


@dataclass(frozen=True)
class TopK:
    """Token distributions of n states: ids [n, k], -1 where there are fewer, log-probs [n, k], -inf there, rest [n]."""

    ids: np.ndarray
    logps: np.ndarray
    rest: np.ndarray


@dataclass(frozen=True)
class TopKRequest:
    """Which tokens of each state a "topk" signal keeps.

    Args:
        k: how many, the most likely ones; "vocab" is all of them.
        p: keep fewer where fewer hold this share of the probability.
        ids_from: score at the token ids of this store instead, so that the two can be compared token by token.
        coding: "packed" (2.5 bytes an id, see packing.py) or "float32" (exact, 8 bytes). Default: exact for the whole
            vocabulary, as `ids_from` was, or else packed.
    """

    k: int | Literal["vocab"] = 50
    p: float | None = None
    ids_from: Store | None = None
    coding: Literal["packed", "float32"] | None = None

    def __post_init__(self) -> None:
        if self.k != "vocab" and (isinstance(self.k, bool) or not isinstance(self.k, int) or self.k < 1):
            raise UserError(f"k must be 1 or more, or the word vocab, got {self.k!r}")
        if self.p is not None and not 0 < self.p <= 1:
            raise UserError(f"p is a share of the probability and must lie in 0..1, got {self.p}")
        if self.coding not in (None, "packed", "float32"):
            raise UserError(f"topk_coding must be packed or float32, got {self.coding!r}")

    @property
    def packed(self) -> bool:
        if self.coding is not None:
            return self.coding == "packed"
        return self.k != "vocab" if self.ids_from is None else self.ids_from.manifest["topk"]["coding"] == "packed"

    def manifest(self, vocabulary: int, head_rows: int) -> dict[str, Any]:
        """Return the `topk` part of a manifest; `vocabulary` counts the tokens that can be, below `head_rows`."""
        tokens: dict[str, Any] = {"ids_from": self.ids_from.digest} if self.ids_from else {"k": self.k, "p": self.p}
        coding = {"coding": "packed", "id_bits": id_bits(head_rows)} if self.packed else {"coding": "float32"}
        return tokens | {"vocabulary": vocabulary} | coding


class TopKKind(Kind):
    name = "topk"
    description = "the k most likely tokens of s_0 .. s_{T-1}, and the mass of all others"
    uses = ("k", "p", "topk_coding", "ids_from")
    infinite = ("topk_rest",)
    needs_logits = False
    in_batch = True
    needs_same_tokens = True

    @property
    def own_ids(self) -> bool:
        """Whether the store has ids of its own, and not those of another store."""
        return not self.settings.topk.get("ids_from")

    @property
    def packed(self) -> bool:
        return bool(self.settings.topk["coding"] == "packed")

    @property
    def names(self) -> tuple[str, ...]:
        """The columns of the store, without "topk_" in front."""
        if self.packed:
            return tuple(PACKED_COLUMNS) if self.own_ids else PACKED_AT_IDS
        return tuple(name for name in COLUMNS if self.own_ids or name != "ids")

    @property
    def columns(self) -> Mapping[str, Column]:  # type: ignore[override]
        columns = PACKED_COLUMNS if self.packed else COLUMNS
        return {f"topk_{name}": columns[name] for name in self.names}

    @property
    def k(self) -> int:
        """The most tokens of a state."""
        topk = self.settings.topk
        k = self.settings.ids_from.manifest["topk"]["k"] if self.settings.ids_from else topk["k"]
        return topk["vocabulary"] if k == "vocab" else min(k, topk["vocabulary"])

    # -- extraction ----------------------------------------------------------------------------------------------------

    def state_inputs(self, places: Sequence[tuple[int, str]], has_final_state: bool) -> Tensor | None:
        """Return the ids of the other store, [states, k]; s_T has none."""
        if self.settings.ids_from is None:
            return None
        import torch

        parts = [self.settings.ids_from.topk(response, np.array([row])).ids for row, response in places]
        width = max(part.shape[1] for part in parts)
        after = int(has_final_state)
        return torch.from_numpy(
            np.concatenate([np.pad(x, ((0, after), (0, width - x.shape[1])), constant_values=-1) for x in parts])
        )

    def reduce(self, tile: Tile) -> tuple[Tensor, ...]:
        from prefdistill.models.logprobs import topk_logps

        ids = tile.inputs.get(self.name)
        if ids is None:
            return tile.likeliest(self.k, self.settings.topk["p"])
        return (ids, *topk_logps(tile.logits, ids)[:2])

    @property
    def collected(self) -> Collection[str]:
        return [f"topk_{name}" for name in COLUMNS if self.own_ids or name != "ids"]

    def collect(self, parts: Sequence[np.ndarray], ended: bool) -> dict[str, Any]:
        ids, logps, rest = parts
        filled = ids >= 0
        columns = {"counts": filled.sum(1, dtype=np.int32), "ids": ids[filled], "logps": logps[filled], "rest": rest}
        return {f"topk_{name}": part for name, part in columns.items() if self.own_ids or name != "ids"}

    def pack(self, columns: dict[str, list[Any]], rows: Sequence[int]) -> tuple[dict[str, Sequence[Any]], list[float]]:
        if not self.packed:
            return super().pack(columns, rows)
        n = len(rows)
        ids = columns["topk_ids"] if self.own_ids else [None] * n
        counts = columns["topk_counts"]
        packed: dict[str, list[Any]] = {name: [] for name in self.names if name != "counts"}
        errors: list[float] = []
        for i in range(n):
            state_errors, code = self._pack(ids[i], columns["topk_logps"][i], columns["topk_rest"][i], counts[i])
            errors += state_errors
            for name, column in packed.items():
                column.append(code[name])
        return {"topk_counts": counts} | {f"topk_{name}": column for name, column in packed.items()}, errors

    def _pack(
        self, ids: np.ndarray | None, logps: np.ndarray, rest: np.ndarray, counts: np.ndarray
    ) -> tuple[list[float], dict[str, Any]]:
        """Pack one response, and measure what that did to each state."""
        bits = self.settings.topk["id_bits"]
        code = pack_unsorted(logps, rest, counts) if ids is None else pack_sorted(ids, logps, rest, counts, bits)
        columns = {name: [part] if isinstance(part, bytes) else part for name, part in code.items()}
        decoded = self._unpack(columns, counts, np.array([len(counts)]))[1:]
        return kl_error(logps, rest, *decoded, counts).tolist(), code

    def _unpack(
        self, columns: dict[str, Any], counts: np.ndarray, states: np.ndarray
    ) -> tuple[np.ndarray | None, np.ndarray, np.ndarray]:
        if not self.own_ids:
            return None, *unpack_unsorted(**columns, counts=counts, states=states)
        return unpack_sorted(**columns, counts=counts, states=states, bits=self.settings.topk["id_bits"])

    # -- reading -------------------------------------------------------------------------------------------------------

    def distributions(
        self, store: Store, response: str, rows: np.ndarray
    ) -> tuple[np.ndarray, np.ndarray | None, np.ndarray, np.ndarray]:
        """Return counts [states], ids and log-probabilities [n] and rests [states], one state after another."""
        table = store.table(rows, tuple(f"{response}_topk_{name}" for name in self.names))
        arrays = {name: table.column(f"{response}_topk_{name}").combine_chunks() for name in self.names}
        columns = {name: _flat(array) for name, array in arrays.items()}
        counts = columns.pop("counts")
        if not self.packed:
            return counts, columns.get("ids"), columns["logps"], columns["rest"]
        return counts, *self._unpack(columns, counts, arrays["counts"].value_lengths().to_numpy())

    def topk(self, store: Store, response: str, rows: np.ndarray, ids_from: Store | None = None) -> TopK:
        """Return the distributions at s_0 .. s_{T-1} of each row in turn, as [states, k]."""
        counts, ids, logps, rest = self.distributions(store, response, rows)
        if ids_from is not None:
            ids = TopKKind(ids_from.settings).distributions(ids_from, response, rows)[1]
        assert ids is not None
        shape = (len(counts), int(counts.max(initial=0)))
        if (counts == shape[1]).all():
            return TopK(ids.astype(np.int64).reshape(shape), logps.reshape(shape), rest)
        filled = np.arange(shape[1]) < counts[:, None]
        padded = TopK(np.full(shape, -1, np.int64), np.full(shape, -np.inf, np.float32), rest)
        padded.ids[filled], padded.logps[filled] = ids, logps
        return padded

    def read(self, store: Store, response: str, row: int) -> dict[str, Any]:
        parts = zip(COLUMNS, self.distributions(store, response, np.array([row])), strict=True)
        return {f"topk_{name}": part for name, part in parts if part is not None}

    def batch(self, signals: Stores, role: str, response: str) -> dict[str, np.ndarray]:
        states = signals.topk(role, response)
        return {
            f"{response}_ids": states.ids,
            f"{role}_{response}_topk": states.logps,
            f"{role}_{response}_rest": states.rest,
        }

    # -- sizes ---------------------------------------------------------------------------------------------------------

    @property
    def numbers_per_state(self) -> int:
        return self.k

    def stored_bytes(self, tokens: int, responses: int) -> int:
        k, bits_per_id = self.k, id_bits(self.settings.topk["vocabulary"])
        if self.packed and self.own_ids:
            bits = k * bits_per_id + k + min(MOST, max(0, 16 * k - 47)) + 3 * 16
        elif self.packed:
            bits = 8 * k + 2 * 16
        else:
            bits = k * (32 + (bits_per_id if self.own_ids else 0)) + 32
        return tokens * bits // 8


def _flat(column: pa.Array) -> Any:
    """Return a column of lists as one array, of bytes as a list."""
    import pyarrow as pa

    return column.flatten().to_numpy() if pa.types.is_list(column.type) else column.to_pylist()
