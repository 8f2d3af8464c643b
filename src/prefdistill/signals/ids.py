"""The token ids that a store was computed from: digests of them, and the check that pairs still have them."""

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from hashlib import sha256
from typing import TYPE_CHECKING, Any
from zlib import crc32

import numpy as np

from prefdistill.core.errors import UserError
from prefdistill.core.progress import say_once
from prefdistill.core.text import printable
from prefdistill.data.template import changes_with_time
from prefdistill.signals.shards import IDS_CHECK
from prefdistill.signals.store import Signals

if TYPE_CHECKING:
    from datasets import Dataset
    from transformers import PreTrainedTokenizerBase

CONTEXT = 24  # characters that a message shows on either side of a difference


class OtherIds(UserError):
    """Pairs are encoded into other token ids than those that a store was computed from."""


@dataclass(frozen=True)
class Ids:
    """Digests of the token ids of encoded pairs.

    Args:
        rows: of the data, [n].
        checks: for each response the CRC-32 of the prompt's and the response's ids, as little-endian int32, [n].
        lengths: for each response the number of its tokens, [n].
        sha256: of all of them.
    """

    rows: np.ndarray
    checks: Mapping[str, np.ndarray]
    lengths: Mapping[str, np.ndarray]
    sha256: str

    @classmethod
    def of(cls, encoded: "Dataset", responses: Sequence[str]) -> "Ids":
        """Compute the digests of what `encode_pairs` returns."""
        rows = np.asarray(encoded["row"][:], dtype="<i8")
        checks: dict[str, list[int]] = {name: [] for name in responses}
        lengths: dict[str, list[int]] = {name: [] for name in responses}
        digest = sha256(rows.tobytes())
        names = ("prompt", *responses)
        for table in encoded.select_columns([f"{name}_ids" for name in names]).with_format("arrow").iter(1_024):
            ids = {name: _lists(table[f"{name}_ids"].combine_chunks()) for name in names}
            prompts = [crc32(prompt) for prompt in ids["prompt"]]
            for name in names:
                digest.update(np.array([len(one) for one in ids[name]], dtype="<i4").tobytes())
                digest.update(np.concatenate(ids[name]).tobytes())
            for name in responses:
                checks[name] += [crc32(one, prompt) for one, prompt in zip(ids[name], prompts, strict=True)]
                lengths[name] += map(len, ids[name])
        return cls(
            rows,
            {name: np.array(checks[name], dtype=np.uint32) for name in responses},
            {name: np.array(lengths[name], dtype=np.int32) for name in responses},
            digest.hexdigest(),
        )


def rows_digest(rows: np.ndarray, checks: Mapping[str, np.ndarray]) -> str:
    """Return a short digest of rows and of the CRC-32 of their token ids, the same for a store and for a training."""
    digest = sha256(np.asarray(rows, dtype="<i8").tobytes())
    for name in sorted(checks):
        digest.update(np.asarray(checks[name], dtype="<u4").tobytes())
    return digest.hexdigest()[:12]


def reading_of_store(store: Signals) -> dict[str, Any]:
    """Return how the rows of a store were read, as `Reading.to_json` does; without what an older version lacks."""
    columns = {name: f"{name}_{IDS_CHECK}" for name in store.responses}
    checks = {name: store.scalar(column, store.rows) for name, column in columns.items() if column in store.columns}
    about = store.manifest
    return {
        "rows": about["data"]["rows"],
        "kept": len(store.rows),
        "dropped": about["dropped"]["reasons"],
        **{f"truncated_{part}": count for part, count in (about.get("truncated") or {}).items()},
        **({"ids": rows_digest(store.rows, checks)} if checks else {}),
    }


def _lists(column: Any) -> list[Any]:
    """Return the ids of each row of an Arrow column, without copying them."""
    values = column.values.to_numpy().astype("<i4", copy=False)
    return [values[start:end] for start, end in itertools.pairwise(column.offsets.to_numpy())]


def example_ids(encoded: "Dataset", responses: Sequence[str]) -> dict[str, Any]:
    """Return the ids of the first of some encoded rows, for a message that shows what has changed."""
    columns = {"row": "row", **{name: f"{name}_ids" for name in ("prompt", *responses)}}
    return {name: encoded[0][column] for name, column in columns.items()} if len(encoded) else {}


def check_ids(
    store: Signals,
    encoded: "Dataset",
    tokenizer: "PreTrainedTokenizerBase",
    ids: Ids | None = None,
    within: range | None = None,
) -> None:
    """Check that pairs are encoded into the token ids that their signals were computed from.

    A store of an older version has no digests of its ids: their numbers are compared, with a warning.

    Args:
        store: the signals.
        encoded: what `encode_pairs` returns, for all data or a part.
        tokenizer: that of `encoded`.
        ids: digests of `encoded`, if they were computed before.
        within: the rows of the data that `encoded` is of, to refuse a row with signals that is dropped now.

    Raises:
        OtherIds: naming the first row that differs, with both texts where the store has the ids of that row.
    """
    responses = tuple(name for name in store.responses if f"{name}_ids" in encoded.column_names)
    ids = ids or Ids.of(encoded, responses)
    stored = np.isin(ids.rows, store.rows)
    rows = ids.rows[stored]
    if responses == store.responses and not stored.all():
        raise _other_ids(store, tokenizer, int(ids.rows[~stored][0]), "it was dropped then and is not dropped now")
    if within is not None:
        of_part = store.rows[(store.rows >= within.start) & (store.rows < within.stop)]
        for row in np.setdiff1d(of_part, rows)[:1]:
            raise _other_ids(store, tokenizer, int(row), "it is dropped now")
    for name in responses:
        differs = ids.lengths[name][stored] != store.scalar(f"{name}_tokens", rows)
        if f"{name}_{IDS_CHECK}" in store.columns:
            differs |= ids.checks[name][stored] != store.scalar(f"{name}_{IDS_CHECK}", rows)
        else:
            say_once(
                f"warning: the {store.role} signals ({store.place}) are of an older version, without digests of their "
                "token ids: only the numbers of tokens are compared; extract them again to be sure"
            )
        if differs.any():
            row, count = int(rows[np.argmax(differs)]), int(differs.sum())
            now = encoded[int(np.argmax(ids.rows == row))]
            what = f"{name}: {_both(store, row, name, now, tokenizer)}"
            others = f", and {count - 1:,} of {len(rows) - 1:,} other rows" if count > 1 else ""
            raise _other_ids(store, tokenizer, row, what + others)


def _both(store: Signals, row: int, response: str, now: dict[str, Any], tokenizer: "PreTrainedTokenizerBase") -> str:
    """Return what a row was and is: as text, or as numbers of tokens where the store lacks the ids of the row."""
    examples = (shard.notes.get("example", {}) for shard in store.shards)
    example = next((ids for ids in examples if ids.get("row") == row), None)
    after = now["prompt_ids"] + now[f"{response}_ids"]
    if example is None:
        tokens = int(store.scalar(f"{response}_tokens", np.array([row]))[0])
        text = _text(after[: 2 * CONTEXT], tokenizer)
        return f"{tokens} tokens stored, {len(now[f'{response}_ids'])} now, of {printable(text)!r}"
    before = example["prompt"] + example[response]
    stored, current = (_text(ids, tokenizer) for ids in (before, after))
    if stored == current:
        place = _first_difference(before, after)
        return f"the same text, in the ids {before[place:][:4]} stored and {after[place:][:4]} now"
    place = _first_difference(stored, current)
    parts = (printable(text[max(0, place - CONTEXT) : place + CONTEXT]) for text in (stored, current))
    return "stored {!r}, now {!r}".format(*parts)


def _text(ids: list[int], tokenizer: "PreTrainedTokenizerBase") -> str:
    return str(tokenizer.decode(ids, clean_up_tokenization_spaces=False))


def _first_difference(before: Sequence[Any], after: Sequence[Any]) -> int:
    pairs = enumerate(zip(before, after, strict=False))
    return next((place for place, (a, b) in pairs if a != b), min(len(before), len(after)))


def _other_ids(store: Signals, tokenizer: "PreTrainedTokenizerBase", row: int, what: str) -> OtherIds:
    import transformers

    version = store.manifest.get("versions", {}).get("transformers", transformers.__version__)
    causes = ["the chat template prints the date or the time"] if changes_with_time(tokenizer) else []
    if version != transformers.__version__:
        causes.append(f"transformers was {version} and is {transformers.__version__}")
    return OtherIds(
        f"the {store.role} signals ({store.place}) were computed from other token ids than the data have now, first in "
        f"row {row} ({what}){'; '.join(['', *causes])}; delete them and extract them again with `prefdistill signals`"
    )
