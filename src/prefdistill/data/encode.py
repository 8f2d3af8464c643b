"""Encode preference pairs: token ids of prompts and responses, their ends, and truncation.

    encoded, dropped = encode_pairs(dataset, tokenizer, Truncation(2048))

A response is what the model generates: from after the template's generation prompt up to and including the end token.
Rows are counted from 0, here and in every message.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import accumulate
from typing import TYPE_CHECKING, Any

import numpy as np

from prefdistill.core.errors import UserError
from prefdistill.core.files import value_digest
from prefdistill.core.progress import say
from prefdistill.data.columns import SIDES, ended_column
from prefdistill.data.encoder import Encoder
from prefdistill.data.fingerprint import data_fingerprint
from prefdistill.data.load import check_pairs
from prefdistill.data.prompts import prompt_of
from prefdistill.data.sampled import RowTexts, row_texts
from prefdistill.data.sources import NO_CACHE
from prefdistill.data.spans import locate, response_text
from prefdistill.data.template import NO_TEMPLATE, check_text_form, template_ending
from prefdistill.data.truncation import (
    PROMPT_EMPTY,
    RESPONSE_EMPTY,
    TEMPLATE_DIFFERS,
    TEMPLATE_FAILED,
    TOKENS_CHANGED,
    TOKENS_MERGE,
    Dropped,
    Reading,
    Truncation,
    nothing_left,
)
from prefdistill.models.identity import tokenizer_identity

if TYPE_CHECKING:
    from datasets import Dataset
    from transformers import PreTrainedTokenizerBase

# Every stage of a run encodes the same pairs: train and test, for a teacher and a student, and sampled responses.
CACHE_SIZE = 8
_CACHE: dict[str, tuple[Dataset, Dropped]] = {}


def encode_pairs(
    dataset: Dataset,
    tokenizer: PreTrainedTokenizerBase,
    truncation: Truncation,
    num_proc: int | None = None,
    *,
    responses: tuple[str, ...] = SIDES,
    rows: range | None = None,
) -> tuple[Dataset, Dropped]:
    """Tokenise preference pairs, and drop the rows whose response cannot be separated from the prompt.

    Conversations go through the chat template, which alone decides about BOS and the end token. Plain text gets the
    tokenizer's own special tokens in front and one EOS at the end. A sampled response that was cut, as its column
    `NAME_ended` says, gets no end token. Where a row has sampled token ids that belong to its prompt and text, they are
    the response, see `data.sampled`.

    Args:
        dataset: preference pairs, or rows with the columns `responses`.
        tokenizer, truncation: how they become tokens.
        num_proc: processes that share the work.
        responses: columns of the data.
        rows: encode this part only, of a data set that `check_pairs` has passed. Dropping all of a part is no error.

    Returns:
        The rows that were kept, held in memory (8 bytes per response token), with the columns
        - `row`: the index in `dataset`;
        - `prompt_ids`, `chosen_ids`, `rejected_ids`: concatenated, the tokens of the whole text up to the end token;
        - `chosen_ended`, `rejected_ended`: whether the response has its end token;
        - `prompt_truncated`, `chosen_truncated`, `rejected_truncated`: whether it is truncated;
        - `chosen_offsets`, `rejected_offsets`: for each response token, where it ends in the text after the prompt, in
          characters. Tokens that share a character all end after it;
        - `chosen_text_start`, `chosen_text_end`, ...: where the response's own text stands there, see `data.spans`.
        Other `responses` than chosen and rejected have columns of the same kind.

        And the rows that were dropped, by reason.

    Raises:
        UserError: if the data are not pairs, the tokenizer lacks what they need, or no row is left.
    """
    if rows is None:
        check_pairs(dataset, "The data set", responses)
    encode = _PairEncoder(tokenizer, truncation, responses, conversational=isinstance(dataset[0]["prompt"], list))
    if rows is not None and len(rows) < len(dataset):
        return _encode_all(dataset.select(rows), encode, num_proc, first=rows.start)
    lengths = [truncation.max_length, truncation.max_prompt_length]
    key = value_digest([data_fingerprint(dataset, responses), responses, tokenizer_identity(tokenizer), lengths])
    if key not in _CACHE:
        while len(_CACHE) >= CACHE_SIZE:
            _CACHE.pop(next(iter(_CACHE)))
        _CACHE[key] = _encode_all(dataset, encode, num_proc)
    encoded, dropped = _CACHE[key]
    if rows is None and not len(encoded):
        raise UserError(nothing_left(dropped))
    return encoded, dropped


def render_pairs(dataset: Dataset, tokenizer: PreTrainedTokenizerBase) -> Iterator[tuple[str, ...] | None]:
    """Yield the texts that `encode_pairs` tokenises: of each row's prompt, and of the prompt with each response.

    None for a row that the chat template refuses. The `offsets` of a response count from the end of the prompt's text.
    """
    encoder = Encoder(tokenizer)
    for row in dataset:
        yield row_texts(encoder, row, SIDES).texts


def encode_untruncated(
    rows: Sequence[dict[str, Any]], tokenizer: PreTrainedTokenizerBase
) -> Iterator[tuple[tuple[str, ...] | None, dict[str, Any]]]:
    """Encode rows of one form without truncation, for inspection.

    Yields:
        For each row the texts that become tokens, of the prompt and of the prompt with each response (None where the
        chat template refuses), and its columns as in `encode_pairs`, with `dropped`, the reason to drop it or "".

    Raises:
        UserError: if the tokenizer lacks what the rows need.
    """
    encode = _PairEncoder(tokenizer, Truncation(None), SIDES, isinstance(rows[0]["prompt"], list))
    yield from encode.rows({name: [row.get(name) for row in rows] for name in {key for row in rows for key in row}})


def drop_refused(dataset: Dataset, tokenizer: PreTrainedTokenizerBase, what: str) -> tuple[Dataset, Dropped]:
    """Return the pairs whose messages the chat template renders, and those that were dropped. Plain text is kept.

    Args:
        what: the pairs are for, as the name of the message.

    Raises:
        UserError: if the tokenizer has no chat template, or no row is left.
    """
    if not isinstance(dataset[0]["prompt"], list):
        return dataset, Dropped({}, {})
    if not tokenizer.chat_template:
        raise UserError(NO_TEMPLATE)
    template_ending(tokenizer)
    encoder = Encoder(tokenizer)
    texts = (encoder.texts(prompt_of(row), *(row[side] for side in SIDES)) for row in dataset)
    reasons = [TEMPLATE_FAILED if of_row is None else "" for of_row in texts]
    dropped = Dropped.from_reasons(reasons)
    if not dropped:
        return dataset, dropped
    if len(dropped) == len(dataset):
        raise UserError(nothing_left(dropped))
    say(f"{what}: {dropped}")
    return dataset.select([index for index, reason in enumerate(reasons) if not reason]), dropped


def reading_of(encoded: Dataset, dropped: Dropped) -> Reading:
    """Return how a data set was read, from what `encode_pairs` returns."""
    responses = [name for name in encoded.column_names if name.endswith("_truncated") and name != "prompt_truncated"]
    flags = [np.array(encoded[name][:], dtype=bool) for name in responses]
    prompts = int(np.sum(encoded["prompt_truncated"][:], dtype=np.int64))
    return Reading(len(encoded), dropped, prompts, int(np.any(flags, axis=0).sum()))


def highest_token_id(encoded: Dataset) -> int:
    """Return the highest token id in the columns `*_ids`."""
    import pyarrow.compute as pc

    columns = [name for name in encoded.column_names if name.endswith("_ids") and name != "position_ids"]
    tables = encoded.select_columns(columns).with_format("arrow").iter(1_024)
    return max((pc.max(pc.list_flatten(part)).as_py() or 0 for table in tables for part in table.columns), default=0)


def longest_text(encoded: Dataset) -> int:
    """Return the number of tokens of the longest prompt with a response, of the columns `*_ids`."""
    import pyarrow.compute as pc

    responses = [name for name in encoded.column_names if name.endswith("_ids") and name != "prompt_ids"]
    columns = [*(["prompt_ids"] if "prompt_ids" in encoded.column_names else []), *responses]
    longest = 0
    for table in encoded.select_columns(columns).with_format("arrow").iter(1_024):
        lengths = {name: pc.fill_null(pc.list_value_length(table[name]), 0) for name in columns}
        for name in responses:
            total = pc.add(lengths["prompt_ids"], lengths[name]) if "prompt_ids" in lengths else lengths[name]
            longest = max(longest, pc.max(total).as_py() or 0)
    return longest


def _encode_all(
    dataset: Dataset, encode: _PairEncoder, num_proc: int | None, first: int = 0
) -> tuple[Dataset, Dropped]:
    encoded = dataset.map(
        encode,
        batched=True,
        with_indices=True,
        remove_columns=dataset.column_names,
        features=_encoded_features(encode.responses),
        fn_kwargs={"first": first},
        num_proc=num_proc,
        desc="Tokenising pairs",
        **NO_CACHE,
    )
    reasons = list(encoded["dropped"])
    kept_rows = [index for index, reason in enumerate(reasons) if not reason]
    dropped = Dropped.from_reasons(reasons, first)
    return encoded.remove_columns("dropped").select(kept_rows, keep_in_memory=True), dropped


def _encoded_features(responses: Sequence[str]) -> Any:
    from datasets import Features, List, Value

    tokens = List(Value("int32"))
    parts = {f"{name}_{key}": tokens for name in responses for key in ("ids", "offsets")}
    places = [f"{name}_text_{part}" for name in responses for part in ("start", "end")]
    flags = [*(f"{name}_ended" for name in responses), *(f"{name}_truncated" for name in ("prompt", *responses))]
    return Features(
        {
            "row": Value("int64"),
            "dropped": Value("string"),
            "prompt_ids": tokens,
            **parts,
            **dict.fromkeys(places, Value("int32")),
            **dict.fromkeys(flags, Value("bool")),
        }
    )


class _Refused(Exception):
    """A row cannot be encoded; the argument is the reason."""


class _PairEncoder:
    """Encode a batch of rows, with one call of the tokenizer; `encode_pairs` maps it over the data set."""

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        truncation: Truncation,
        responses: tuple[str, ...],
        conversational: bool,
    ) -> None:
        if not tokenizer.is_fast:
            raise UserError("The tokenizer does not report character offsets. Load a fast one (use_fast=True).")
        if conversational and not tokenizer.chat_template:
            raise UserError(NO_TEMPLATE)
        if not conversational:
            check_text_form(tokenizer)
        if not conversational and tokenizer.eos_token is None:
            raise UserError("The data are plain text but the tokenizer has no EOS token. Set tokenizer.eos_token.")
        self.encoder, self.truncation, self.responses = Encoder(tokenizer), truncation, responses
        self.plain, self.bos = not conversational, tokenizer.bos_token_id
        self.ends = self.encoder.ends_of_text(plain=self.plain)
        self.end_tokens = {tokenizer.eos_token_id, self.encoder.ending.token if conversational else None}

    def __call__(self, batch: dict[str, list[Any]], indices: list[int], first: int = 0) -> dict[str, list[Any]]:
        columns: dict[str, list[Any]] = {name: [] for name in _encoded_features(self.responses)}
        for index, (_, encoded) in zip(indices, self.rows(batch), strict=True):
            for name, column in columns.items():
                column.append(first + index if name == "row" else encoded.get(name))
        return columns

    def rows(self, batch: dict[str, list[Any]]) -> Iterator[tuple[tuple[str, ...] | None, dict[str, Any]]]:
        """Yield the texts and the encoded columns of each row."""
        rows = [dict(zip(batch, values, strict=True)) for values in zip(*batch.values(), strict=True)]
        texts = [row_texts(self.encoder, row, self.responses) for row in rows]
        tokens = self.encoder.ids_and_ends([text for row in texts for text in row.texts or ()], plain=self.plain)
        for row, of_row in zip(rows, texts, strict=True):
            try:
                encoded = self._encode(row, of_row, tokens)
            except _Refused as refusal:
                encoded = {"dropped": str(refusal)}
            yield of_row.texts, encoded

    def _encode(
        self, row: dict[str, Any], of_row: RowTexts, tokens: Iterator[tuple[list[int], list[int]]]
    ) -> dict[str, Any]:
        if of_row.texts is None:
            raise _Refused(of_row.refused)
        prompt_text, *full_texts = of_row.texts
        full_text = dict(zip(self.responses, full_texts, strict=True))
        (prompt_ids, _), *full = [next(tokens) for _ in of_row.texts]
        if not prompt_ids:
            raise _Refused(PROMPT_EMPTY)
        if of_row.refused:
            raise _Refused(of_row.refused)
        ids = {"prompt": prompt_ids}
        offsets = {}
        columns = (self.responses, of_row.sampled, of_row.expected, full)
        for name, sampled, expected, (full_ids, ends) in zip(*columns, strict=True):
            if sampled is not None and full_ids != prompt_ids + sampled:
                ids[name], offsets[name] = sampled, iter(self.encoder.ends(sampled))
                continue
            if not full_text[name].startswith(prompt_text):
                raise _Refused(TEMPLATE_DIFFERS)
            if full_ids[: len(prompt_ids)] != prompt_ids:
                raise _Refused(TOKENS_MERGE)
            if len(full_ids) == len(prompt_ids):
                raise _Refused(RESPONSE_EMPTY)
            ids[name] = full_ids[len(prompt_ids) :]
            if expected not in (None, ids[name]):
                raise _Refused(TOKENS_CHANGED)
            # A token without text, such as an added prefix space, may report an earlier end: offsets never go back.
            offsets[name] = accumulate((end - len(prompt_text) for end in ends[len(prompt_ids) :]), max)
        result = self.truncation.apply(ids, self.bos)
        if result.dropped:
            raise _Refused(result.dropped)
        encoded: dict[str, Any] = {"dropped": ""}
        for name, part in result.ids.items():
            encoded |= {f"{name}_ids": part, f"{name}_truncated": name in result.names}
        for name in self.responses:
            encoded[f"{name}_offsets"] = list(offsets[name])[: len(result.ids[name])]
            start, end = locate(response_text(row[name]), full_text[name][len(prompt_text) :], self.ends)
            encoded |= {f"{name}_text_start": start, f"{name}_text_end": end}
            whole = ids[name][-1] in self.end_tokens and name not in result.names
            encoded[f"{name}_ended"] = whole and row.get(ended_column(name)) is not False
        return encoded
