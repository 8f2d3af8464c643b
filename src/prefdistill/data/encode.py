"""Preference pairs as tokens: the chat template, where the response starts and ends, truncation.

    encoded, dropped = encode_pairs(dataset, tokenizer, Truncation(2048))

A response is what the model generates: from after the template's generation prompt up to and including the end token.
Rows are counted from 0, here and in every message.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import TYPE_CHECKING, Any, NamedTuple

from prefdistill.core.errors import UserError
from prefdistill.core.files import value_digest
from prefdistill.core.progress import say
from prefdistill.data.columns import SIDES, ended_column
from prefdistill.data.load import NO_CACHE, check_pairs, data_fingerprint, without_nulls
from prefdistill.models.identity import tokenizer_identity

if TYPE_CHECKING:
    from datasets import Dataset
    from transformers import PreTrainedTokenizerBase

# Why `encode_pairs` leaves a row out.
TEMPLATE_FAILED = "the chat template refuses its messages"
TEMPLATE_DIFFERS = "the chat template renders the prompt differently when a response follows"
TOKENS_MERGE = "the tokenizer merges tokens across the end of the prompt"
PROMPT_EMPTY = "the prompt has no tokens"
PROMPT_TOO_LONG = "the prompt leaves no room for a response within max_length"
RESPONSE_EMPTY = "a response has no tokens"

NO_TEMPLATE = "The data are conversations but the tokenizer has no chat template. Set one, or use text."


@dataclass(frozen=True)
class Truncation:
    """How long an encoded pair may be, in tokens; None is no limit.

    A prompt longer than `max_prompt_length` keeps its end, and its BOS token where it has one. Each response is then
    cut on the right so that prompt and response fit `max_length`; a cut response has not ended.
    """

    max_length: int | None = 1024
    max_prompt_length: int | None = None

    def __post_init__(self) -> None:
        for name in ("max_length", "max_prompt_length"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise UserError(f"{name} is {value}. Give at least 1, or none for no limit.")
        if self.max_length and self.max_prompt_length and self.max_prompt_length >= self.max_length:
            raise UserError(
                f"max_prompt_length ({self.max_prompt_length}) leaves no room for a response: "
                f"give less than max_length ({self.max_length})."
            )

    def cut_prompt(self, ids: list[int], bos: int | None) -> list[int]:
        limit = self.max_prompt_length
        if limit is None or len(ids) <= limit:
            return ids
        head = ids[:1] if ids[0] == bos else []
        return head + ids[len(ids) - limit + len(head) :]

    def room_after(self, prompt_ids: list[int]) -> int | None:
        return None if self.max_length is None else max(0, self.max_length - len(prompt_ids))


@dataclass(frozen=True)
class Dropped:
    """The rows that `encode_pairs` left out: how many for each reason, and the first of them. `len()` is the total."""

    counts: dict[str, int]
    first_rows: dict[str, int]

    @classmethod
    def from_reasons(cls, reasons: Sequence[str], first: int = 0) -> Dropped:
        """One reason per row from row `first` on, empty for a row that was kept."""
        counts = Counter(reason for reason in reasons if reason)
        return cls(dict(counts.most_common()), {reason: first + reasons.index(reason) for reason in counts})

    def __len__(self) -> int:
        return sum(self.counts.values())

    def __str__(self) -> str:
        total = f"dropped {len(self)} row{'' if len(self) == 1 else 's'}"
        reasons = (f"{reason} ({n}, first row {self.first_rows[reason]})" for reason, n in self.counts.items())
        return f"{total}: {'; '.join(reasons)}" if self.counts else total


class Ending(NamedTuple):
    """What the chat template writes after an assistant message: `before` up to and with the end token, then `after`."""

    token: int | None = None
    before: str = ""
    after: str = ""


def rendered(tokenizer: PreTrainedTokenizerBase, messages: list[dict[str, Any]], *, generate: bool = False) -> str:
    """Messages through the chat template, with the header of an answer where one is to be generated.

    Raises:
        jinja2.TemplateError: whatever goes wrong in the template, which is a program and may raise anything.
    """
    from jinja2 import TemplateError, TemplateRuntimeError

    try:
        return str(tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=generate))
    except TemplateError:
        raise
    except Exception as error:
        raise TemplateRuntimeError(f"{type(error).__name__}: {error}") from error


def rendered_row(tokenizer: PreTrainedTokenizerBase, prompt: Any, *answers: Any) -> tuple[str, ...] | None:
    """The texts of a prompt of messages, and of it with each answer; None where the chat template refuses."""
    from jinja2 import TemplateError

    # Newer versions of transformers leave the nulls out themselves; 5.17 renders "None".
    start, *ends = (without_nulls(messages) for messages in (prompt, *answers))
    try:
        asked = rendered(tokenizer, start, generate=True)
        return asked, *(rendered(tokenizer, start + end) for end in ends)
    except TemplateError:
        return None


def takes(tokenizer: PreTrainedTokenizerBase, prompt: Any) -> bool:
    """Whether a prompt can be answered: text can, and messages that the chat template does not refuse."""
    return isinstance(prompt, str) or rendered_row(tokenizer, prompt) not in (None, ("",))


def highest_id(encoded: Dataset) -> int:
    """Of all tokens in the columns `*_ids`."""
    import pyarrow.compute as pc

    columns = [name for name in encoded.column_names if name.endswith("_ids") and name != "position_ids"]
    tables = encoded.select_columns(columns).with_format("arrow").iter(1_024)
    return max((pc.max(pc.list_flatten(part)).as_py() or 0 for table in tables for part in table.columns), default=0)


def template_ending(tokenizer: PreTrainedTokenizerBase) -> Ending:
    """Let the template show its end token: the first special token it writes after an assistant message."""
    if not tokenizer.chat_template:
        return Ending()
    from jinja2 import TemplateError

    answer = "probe answer"
    conversation = [{"role": "user", "content": "probe question"}, {"role": "assistant", "content": answer}]
    try:
        text = rendered(tokenizer, conversation)
    except TemplateError as error:
        raise UserError(f"The chat template refuses a user and an assistant message ({error}). Fix it.") from error
    _, found, tail = text.rpartition(answer)
    special = {token for token, added in tokenizer.added_tokens_decoder.items() if added.special}
    for token in tokenizer(tail, add_special_tokens=False)["input_ids"] if found else []:
        if token in special:
            before, end_text, after = tail.partition(str(tokenizer.convert_ids_to_tokens(token)))
            return Ending(token, before + end_text, after)
    return Ending()


def end_token_ids(tokenizer: PreTrainedTokenizerBase) -> set[int]:
    """The tokens that end a response: the tokenizer's EOS, and the one its chat template puts after an answer."""
    return {tokenizer.eos_token_id, template_ending(tokenizer).token} - {None}


def encode_pairs(
    dataset: Dataset,
    tokenizer: PreTrainedTokenizerBase,
    truncation: Truncation,
    num_proc: int | None = None,
    *,
    responses: tuple[str, ...] = SIDES,
    rows: range | None = None,
) -> tuple[Dataset, Dropped]:
    """Tokenise preference pairs, and leave out the rows whose response cannot be told apart from the prompt.

    Conversations go through the chat template, which alone decides about BOS and the end token. Plain text gets the
    tokenizer's own special tokens in front and one EOS at the end. A sampled response whose column `NAME_ended` says
    that it was cut gets no end token.

    Args:
        dataset, tokenizer, truncation: the pairs, and how they become tokens.
        num_proc: processes that share the work.
        responses: columns of the data.
        rows: a part of a data set that `check_pairs` has seen; of a part nothing may be left. Default: all.

    Returns:
        The rows that were kept, held in memory (8 bytes per response token), with the columns
        - `row`: the index in `dataset`;
        - `prompt_ids`, `chosen_ids`, `rejected_ids`: concatenated, the tokens of the whole text up to the end token;
        - `chosen_ended`, `rejected_ended`: whether the response has its end token;
        - `chosen_offsets`, `rejected_offsets`: for each response token, where it ends in the text after the prompt, in
          characters. Tokens that share a character all end after it.
        Other `responses` than chosen and rejected have columns of the same kind.

        And what was dropped, for which reason.

    Raises:
        UserError: the data are not pairs, the tokenizer lacks what they need, or no row is left.
    """
    if rows is None:
        check_pairs(dataset, "The data set", responses)
    encode = _PairEncoder(tokenizer, truncation, responses, conversational=isinstance(dataset[0]["prompt"], list))
    if rows is not None and len(rows) < len(dataset):
        return _encode_all(dataset.select(rows), encode, num_proc, first=rows.start)
    lengths = [truncation.max_length, truncation.max_prompt_length]
    key = value_digest([data_fingerprint(dataset, responses), responses, tokenizer_identity(tokenizer), lengths])
    if key not in _ENCODED:
        while len(_ENCODED) >= ENCODED_KEPT:
            _ENCODED.pop(next(iter(_ENCODED)))
        _ENCODED[key] = _encode_all(dataset, encode, num_proc)
    encoded, dropped = _ENCODED[key]
    if rows is None and not len(encoded):
        raise UserError(nothing_left(dropped))
    return encoded, dropped


def render_pairs(
    dataset: Dataset, tokenizer: PreTrainedTokenizerBase, responses: tuple[str, ...] = SIDES
) -> Iterator[tuple[str, ...] | None]:
    """The texts whose tokens `encode_pairs` gives: of each row's prompt, and of the prompt with each response.

    None for a row that the chat template refuses. The `offsets` of a response count from the end of the prompt's text.
    """
    encode = _PairEncoder(tokenizer, Truncation(None), responses, isinstance(dataset[0]["prompt"], list))
    for row in dataset:
        cut = [row.get(ended_column(name)) is False for name in responses]
        yield encode.render(cut, row["prompt"], *(row[name] for name in responses))


def without_refused(
    dataset: Dataset, tokenizer: PreTrainedTokenizerBase, what: str, responses: tuple[str, ...] = SIDES
) -> Dataset:
    """The rows whose messages the chat template takes; `what` they are for says what was dropped. Text needs none.

    Raises:
        UserError: the tokenizer has no chat template, or no row is left.
    """
    if not isinstance(dataset[0]["prompt"], list):
        return dataset
    if not tokenizer.chat_template:
        raise UserError(NO_TEMPLATE)
    template_ending(tokenizer)
    texts = (rendered_row(tokenizer, row["prompt"], *(row[name] for name in responses)) for row in dataset)
    reasons = ["" if found else TEMPLATE_FAILED for found in texts]
    dropped = Dropped.from_reasons(reasons)
    if not dropped:
        return dataset
    if len(dropped) == len(dataset):
        raise UserError(nothing_left(dropped))
    say(f"{what}: {dropped}")
    return dataset.select([index for index, reason in enumerate(reasons) if not reason])


def nothing_left(dropped: Dropped) -> str:
    return f"No row is left: {dropped}. Change the data, the chat template or the lengths."


# Every stage of a run encodes the same pairs: train and test, for a teacher and a student, and what they sampled.
ENCODED_KEPT = 8
_ENCODED: dict[str, tuple[Dataset, Dropped]] = {}


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
    kept = [index for index, reason in enumerate(reasons) if not reason]
    dropped = Dropped.from_reasons(reasons, first)
    return encoded.remove_columns("dropped").select(kept, keep_in_memory=True), dropped


def _encoded_features(responses: Sequence[str]) -> Any:
    from datasets import Features, List, Value

    tokens = List(Value("int32"))
    parts = {f"{name}_{key}": tokens for name in responses for key in ("ids", "offsets")}
    ended = {f"{name}_ended": Value("bool") for name in responses}
    return Features({"row": Value("int64"), "dropped": Value("string"), "prompt_ids": tokens, **parts, **ended})


def encode_whole(
    rows: Sequence[dict[str, Any]], tokenizer: PreTrainedTokenizerBase, responses: tuple[str, ...] = SIDES
) -> Iterator[tuple[tuple[str, ...] | None, dict[str, Any]]]:
    """Rows of one form before truncation, for those who look at them.

    Returns:
        For each row the texts that become tokens, of the prompt and of the prompt with each response (None where the
        chat template refuses), and its columns as in `encode_pairs`, with `dropped`, the reason to leave it out or "".

    Raises:
        UserError: the tokenizer lacks what they need.
    """
    encode = _PairEncoder(tokenizer, Truncation(None), responses, isinstance(rows[0]["prompt"], list))
    yield from encode.rows({name: [row.get(name) for row in rows] for name in {key for row in rows for key in row}})


class _Refused(Exception):
    """A row cannot be encoded; the argument is the reason."""


class _PairEncoder:
    """What `encode_pairs` maps over batches of rows; every batch is one call of the tokenizer."""

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
        if not conversational and tokenizer.eos_token is None:
            raise UserError("The data are plain text but the tokenizer has no EOS token. Set tokenizer.eos_token.")
        self.tokenizer, self.truncation, self.conversational = tokenizer, truncation, conversational
        self.responses = responses
        self.ending = template_ending(tokenizer) if conversational else Ending()
        self.end_tokens = {tokenizer.eos_token_id, self.ending.token}
        self.appends_eos = not conversational and tokenizer("a")["input_ids"][-1] == tokenizer.eos_token_id

    def __call__(self, batch: dict[str, list[Any]], indices: list[int], first: int = 0) -> dict[str, list[Any]]:
        columns: dict[str, list[Any]] = {name: [] for name in _encoded_features(self.responses)}
        for index, (_, encoded) in zip(indices, self.rows(batch), strict=True):
            for name, column in columns.items():
                column.append(first + index if name == "row" else encoded.get(name))
        return columns

    def rows(self, batch: dict[str, list[Any]]) -> Iterator[tuple[tuple[str, ...] | None, dict[str, Any]]]:
        """The texts of each row, and what is made of them."""
        rows = list(zip(batch["prompt"], *(batch[name] for name in self.responses), strict=True))
        flags = [batch.get(ended_column(name)) or [None] * len(rows) for name in self.responses]
        cuts = [[ended is False for ended in row] for row in zip(*flags, strict=True)]
        texts = [self.render(cut, *row) for cut, row in zip(cuts, rows, strict=True)]
        tokens = self._tokenise([text for row in texts if row for text in row])
        for row, cut in zip(texts, cuts, strict=True):
            try:
                encoded = self._encode(row, tokens, cut)
            except _Refused as refusal:
                encoded = {"dropped": str(refusal)}
            yield row, encoded

    def render(self, cut: list[bool], prompt: Any, *responses: Any) -> tuple[str, ...] | None:
        """The texts of the prompt, and of the prompt with each response; None where the template refuses.

        A response that was cut gets nothing behind it: what ends it was not written by who was cut.
        """
        if not self.conversational:
            eos = self.tokenizer.eos_token
            whole = (
                text if text.endswith(eos) or was_cut else text + eos
                for text, was_cut in zip(responses, cut, strict=True)
            )
            return prompt, *(prompt + text for text in whole)
        found = rendered_row(self.tokenizer, prompt, *responses)
        if found is None:
            return None
        prompt_text, *full_texts = found
        texts = [self._cut_after_end(text) for text in full_texts]
        before = self.ending.before
        return prompt_text, *(
            text.removesuffix(before) if was_cut else text for text, was_cut in zip(texts, cut, strict=True)
        )

    def _cut_after_end(self, text: str) -> str:
        """Found from the end of the text, so that an end token inside the content does not cut it short."""
        _, before, after = self.ending
        return text.removesuffix(after) if text.endswith(before + after) else text

    def _tokenise(self, texts: list[str]) -> Iterator[tuple[list[int], list[int]]]:
        """For each text its token ids, and where in the text each of them ends."""
        if not texts:
            return
        special = not self.conversational  # a chat template writes its own
        tokens = self.tokenizer(texts, add_special_tokens=special, return_offsets_mapping=True, verbose=False)
        stop = -1 if self.appends_eos else None
        for ids, spans in zip(tokens["input_ids"], tokens["offset_mapping"], strict=True):
            yield ids[:stop], [end for _, end in spans[:stop]]

    def _encode(
        self, texts: tuple[str, ...] | None, tokens: Iterator[tuple[list[int], list[int]]], cut: list[bool]
    ) -> dict[str, Any]:
        if texts is None:
            raise _Refused(TEMPLATE_FAILED)
        prompt_text, *full_texts = texts
        (prompt_ids, _), *full = [next(tokens) for _ in texts]
        if not prompt_ids:
            raise _Refused(PROMPT_EMPTY)
        kept_prompt = self.truncation.cut_prompt(prompt_ids, self.tokenizer.bos_token_id)
        room = self.truncation.room_after(kept_prompt)
        encoded: dict[str, Any] = {"dropped": "", "prompt_ids": kept_prompt}
        for name, full_text, (full_ids, ends), was_cut in zip(self.responses, full_texts, full, cut, strict=True):
            if not full_text.startswith(prompt_text):
                raise _Refused(TEMPLATE_DIFFERS)
            if full_ids[: len(prompt_ids)] != prompt_ids:
                raise _Refused(TOKENS_MERGE)
            ids = full_ids[len(prompt_ids) :]
            if not ids:
                raise _Refused(RESPONSE_EMPTY)
            if room == 0:
                raise _Refused(PROMPT_TOO_LONG)
            # A token without text, such as an added prefix space, may report an earlier end: offsets never go back.
            offsets = accumulate((end - len(prompt_text) for end in ends[len(prompt_ids) :]), max)
            encoded[f"{name}_ids"] = ids[:room]
            encoded[f"{name}_offsets"] = list(offsets)[:room]
            whole = ids[-1] in self.end_tokens and (room is None or len(ids) <= room)
            encoded[f"{name}_ended"] = whole and not was_cut
        return encoded


def judged_ids(tokenizer: PreTrainedTokenizerBase, prompt: Any, response: Any) -> list[int]:
    """The tokens in which a reward model reads a response to a prompt, as TRL's RewardTrainer makes them.

    Args:
        tokenizer: the reward model's.
        prompt: messages (through the chat template) or plain text.
        response: messages or text; text after messages is what the assistant says.

    Raises:
        UserError: on messages where the tokenizer has no chat template, or one that refuses them.
    """
    if isinstance(prompt, str):
        text = prompt + response
        end = str(tokenizer.eos_token)
        return tokenizer(text if text.endswith(end) else text + end)["input_ids"]
    if not tokenizer.chat_template:
        raise UserError(
            f"the reward model {tokenizer.name_or_path} has no chat template, and the data are conversations; choose "
            "one that has, or set tokenizer.chat_template"
        )
    answer = [{"role": "assistant", "content": response}] if isinstance(response, str) else without_nulls(response)
    from jinja2 import TemplateError

    messages = without_nulls(prompt) + answer
    try:
        text = rendered(tokenizer, messages)
    except TemplateError as error:
        roles = ", ".join(message["role"] for message in messages)
        raise UserError(
            f"the chat template of the reward model {tokenizer.name_or_path} refuses messages of {roles} ({error}); "
            "choose another, or change the data"
        ) from error
    return tokenizer(text, add_special_tokens=False)["input_ids"]
