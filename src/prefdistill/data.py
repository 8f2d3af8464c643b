"""Preference pairs: load them, put them through the chat template, find where the response starts and ends, batch them.

    dataset = load_pairs("pairs.jsonl")                                      # or a directory, or org/name#split
    encoded, dropped = encode_pairs(dataset, tokenizer, Truncation(2048))
    batch = PairCollator(tokenizer.pad_token_id)([encoded[0], encoded[1]])

A response is what the model generates: from after the template's generation prompt up to and including the end token.
Rows are counted from 0, here and in every message.
"""

from __future__ import annotations

import gzip
import hashlib
import json
import re
import reprlib
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from itertools import accumulate, takewhile
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from prefdistill.errors import UserError

if TYPE_CHECKING:
    from datasets import Dataset
    from transformers import PreTrainedTokenizerBase

RESPONSES = ("chosen", "rejected")
SCORES = ("score_chosen", "score_rejected")
FILE_TYPES = (".jsonl", ".jsonl.gz", ".parquet")
HUB_NAME = re.compile(r"\w[\w.-]*/\w[\w.-]*")
# Never write next to the user's data, and never reuse what an older version of a function wrote.
NO_CACHE = {"keep_in_memory": True, "load_from_cache_file": False}

# Why `encode_pairs` leaves a row out.
TEMPLATE_FAILED = "the chat template refuses its messages"
TEMPLATE_DIFFERS = "the chat template renders the prompt differently when a response follows"
TOKENS_MERGE = "the tokenizer merges tokens across the end of the prompt"
PROMPT_EMPTY = "the prompt has no tokens"
PROMPT_TOO_LONG = "the prompt leaves no room for a response within max_length"
RESPONSE_EMPTY = "a response has no tokens"


# ---- Loading ----------------------------------------


def load_pairs(source: str, *, split: str = "train") -> Dataset:
    """Preference pairs with the columns `prompt`, `chosen`, `rejected` and whatever else the source has.

    The three are all text, or all lists of messages. Without a `prompt` column, the shared start of `chosen` and
    `rejected` becomes the prompt.

    Args:
        source: a .jsonl, .jsonl.gz or .parquet file; a directory that holds such files or that `save_to_disk` wrote;
            or a Hub name. `org/name#test` and `directory#test` name a split.
        split: the split to take where `source` has several and names none.

    Raises:
        UserError: the source cannot be read, or a row is not a preference pair.
    """
    dataset = _read(source, split)
    if "prompt" not in dataset.column_names:
        _require(dataset, source, RESPONSES)
        dataset = _split_off_prompt(dataset, source)
    _check_pairs(dataset, source)
    return dataset


def load_messages(source: str, *, split: str = "train") -> Dataset:
    """Examples for supervised fine-tuning, with the columns `prompt` and `completion` and no others.

    Taken from `messages` (the completion is the last assistant turn), or `prompt` and `completion`, or the chosen side
    of preference pairs. Arguments and errors are those of `load_pairs`.
    """
    dataset = _read(source, split)
    columns = dataset.column_names
    if "messages" in columns:
        dataset = dataset.select_columns("messages").map(
            _split_off_answer, with_indices=True, fn_kwargs={"source": source}, remove_columns="messages", **NO_CACHE
        )
    elif "completion" not in columns and "chosen" in columns:
        if "prompt" not in columns and "rejected" in columns:
            dataset = _split_off_prompt(dataset, source)
        dataset = dataset.rename_column("chosen", "completion")
    _require(dataset, source, ("prompt", "completion"), "SFT data has `messages`, or `prompt` and `completion`.")
    _check_rows(dataset, source, ("prompt", "completion"))
    return dataset.select_columns(["prompt", "completion"])


def data_fingerprint(dataset: Dataset) -> str:
    """SHA-256 over prompt, chosen, rejected and scores of every row, in order; the same for JSONL, Parquet and Hub."""
    digest = hashlib.sha256()
    columns = ("prompt", *RESPONSES)
    for row in dataset.select_columns([name for name in (*columns, *SCORES) if name in dataset.column_names]):
        texts = [_without_nulls(row.get(name)) for name in columns]
        scores = [None if row.get(name) is None else float(row[name]) for name in SCORES]
        digest.update(json.dumps(texts + scores, sort_keys=True).encode() + b"\n")
    return digest.hexdigest()


def _read(source: str, split: str) -> Dataset:
    name, suffix = source, ""
    if not Path(source).expanduser().exists():  # a path may itself contain '#'
        name, _, suffix = source.partition("#")
    path = Path(name).expanduser()
    if path.is_dir():
        dataset = _read_directory(path, suffix or split)
    elif path.is_file():
        if suffix:
            raise UserError(f"{name}: a file has no splits. Leave out '#{suffix}'.")
        dataset = _read_file(path)
    elif HUB_NAME.fullmatch(name) and not name.endswith(FILE_TYPES):
        from datasets import load_dataset

        with _explain(f"{source}: no such file or directory, and loading it from the Hub failed. Check the name"):
            dataset = load_dataset(name, split=suffix or split)
    else:
        raise UserError(
            f"{source}: no such file or directory. Give a {', '.join(FILE_TYPES)} file, a directory, "
            "or a Hub name such as org/name."
        )
    return dataset


def _read_directory(path: Path, split: str) -> Dataset:
    from datasets import DatasetDict, load_dataset, load_from_disk

    for suffix in FILE_TYPES:
        if (file := path / f"{split}{suffix}").is_file():
            return _read_file(file)
    if not any((path / name).is_file() for name in ("dataset_dict.json", "state.json")):
        with _explain(f"{path}: no split '{split}' could be loaded from this directory. Check its files"):
            return load_dataset(str(path), split=split)
    with _explain(f"{path}: the saved data set cannot be read. Save it again"):
        saved = load_from_disk(str(path))
    if not isinstance(saved, DatasetDict):
        return saved
    if split not in saved:
        raise UserError(f"{path}: no split '{split}'. Name one of its splits after '#': {', '.join(saved)}.")
    return saved[split]


def _read_file(path: Path) -> Dataset:
    from datasets import Dataset

    if path.name.endswith(".parquet"):
        with _explain(f"{path}: not a readable Parquet file. Write it again"):
            return Dataset.from_parquet(str(path))
    if not path.name.endswith(FILE_TYPES):
        raise UserError(f"{path}: unknown file type. Give a {', '.join(FILE_TYPES)} file.")
    rows = list(_read_jsonl(path))
    columns = dict.fromkeys(name for row in rows for name in row)
    with _explain(f"{path}: holds a value that Arrow cannot store. Fix or remove it"):
        # Columns of mixed types are kept as JSON: ours are refused by the checks, with row numbers; others may stay.
        return Dataset.from_dict({name: [row.get(name) for row in rows] for name in columns}, on_mixed_types="use_json")


def _read_jsonl(path: Path) -> Iterator[dict[str, Any]]:
    """The objects of a JSON Lines file. Not through `datasets`, whose errors name neither the line nor the column."""
    with (
        _explain(f"{path}: cannot be read. Write it again"),
        gzip.open(path) if path.name.endswith(".gz") else path.open("rb") as file,
    ):
        for number, line in enumerate(file, 1):
            if not line.strip():
                continue
            try:
                row = json.loads(line)
            except ValueError as error:  # not JSON, or not UTF-8
                reason = f"column {error.colno}: {error.msg}" if isinstance(error, json.JSONDecodeError) else error
                raise UserError(f"{path}, line {number}: not valid JSON ({reason}). Fix or remove the line.") from error
            if not isinstance(row, dict):
                raise UserError(f"{path}, line {number}: a line must be a JSON object, not {reprlib.repr(row)}.")
            yield row


@contextmanager
def _explain(what: str) -> Iterator[None]:
    """Turn whatever a reader raises into a UserError; readers share no base class of errors narrower than Exception."""
    try:
        yield
    except UserError:
        raise
    except Exception as error:
        reason = next(iter(str(error).splitlines()), "")[:200]
        raise UserError(f"{what} ({type(error).__name__}: {reason}).") from error


# ---- Checking ----------------------------------------


def _check_pairs(dataset: Dataset, source: str) -> None:
    _require(dataset, source, ("prompt", *RESPONSES))
    for name in SCORES:
        dtype = str(getattr(dataset.features.get(name), "dtype", "null"))
        if not dtype.startswith(("float", "int", "uint", "null")):
            raise UserError(f"{source}: column '{name}' must hold numbers, it holds {dtype}. Convert or rename it.")
    _check_rows(dataset, source, ("prompt", *RESPONSES))


def _require(dataset: Dataset, source: str, columns: Sequence[str], expected: str = "") -> None:
    if len(dataset) == 0:
        raise UserError(f"{source}: there are no rows in it. Give data with at least one row.")
    missing = [name for name in columns if name not in dataset.column_names]
    if missing:
        expected = expected or "A pair has `prompt`, `chosen`, `rejected`; the prompt may be the start of both others."
        raise UserError(f"{source}: no column {_listed(missing)}; it has {_listed(dataset.column_names)}. {expected}")


def _check_rows(dataset: Dataset, source: str, columns: Sequence[str]) -> None:
    """Every value is text or a list of messages, the same throughout; prompts and responses hold the right roles."""
    first: dict[str, str] = {}
    for index, row in enumerate(dataset.select_columns(list(columns))):
        where = f"{source}, row {index}"
        for name in columns:
            first.setdefault(_form(row[name], f"{where}: '{name}'"), f"row {index} ('{name}')")
        if len(first) == 2:
            raise UserError(
                f"{source}: {first['plain']} is plain text and {first['conversational']} is a list of messages. "
                "Use one form in all rows and columns."
            )
        if "conversational" in first:
            for name in columns:
                _check_roles(row[name], name, where)


def _form(value: Any, what: str) -> str:
    if isinstance(value, str):
        return "plain"
    if isinstance(value, list) and value and all(_is_message(message) for message in value):
        return "conversational"
    raise UserError(
        f"{what} must be text or a list of messages with a text `role` and `content`, not {reprlib.repr(value)}."
    )


def _is_message(value: Any) -> bool:
    return isinstance(value, dict) and all(isinstance(value.get(key), str) for key in ("role", "content"))


def _check_roles(messages: list[dict[str, Any]], name: str, where: str) -> None:
    roles = [message["role"] for message in messages]
    if name == "prompt" and roles[-1] == "assistant":
        raise UserError(f"{where}: the prompt ends with an assistant message. End it with the turn to answer.")
    if name != "prompt" and (others := sorted({*roles} - {"assistant"})):
        fix = "Keep assistant messages only; what comes before them belongs to the prompt."
        raise UserError(f"{where}: '{name}' has a message with the role '{others[0]}'. {fix}")


def _split_off_prompt(dataset: Dataset, source: str) -> Dataset:
    """Move the shared start of `chosen` and `rejected` into `prompt`."""
    return dataset.map(_extract_prompt, with_indices=True, fn_kwargs={"source": source}, **NO_CACHE)


def _extract_prompt(row: dict[str, Any], index: int, source: str) -> dict[str, Any]:
    from trl import extract_prompt

    where = f"{source}, row {index}"
    for name in RESPONSES:
        _form(row[name], f"{where}: '{name}'")
    if not row["chosen"] or row["chosen"][:1] != row["rejected"][:1]:  # TRL's function takes a shared start for granted
        raise UserError(f"{where}: 'chosen' and 'rejected' do not start alike. Add a `prompt` column.")
    return extract_prompt(row)


def _split_off_answer(row: dict[str, Any], index: int, source: str) -> dict[str, Any]:
    where, messages = f"{source}, row {index}", row["messages"]
    if _form(messages, f"{where}: 'messages'") == "plain":
        raise UserError(f"{where}: 'messages' must be a list of messages, not {reprlib.repr(messages)}.")
    answer = list(takewhile(lambda message: message["role"] == "assistant", reversed(messages)))
    if not answer or len(answer) == len(messages):
        raise UserError(f"{where}: 'messages' must be a prompt and then an assistant message. Fix or remove the row.")
    return {"prompt": messages[: -len(answer)], "completion": messages[-len(answer) :]}


def _without_nulls(value: Any) -> Any:
    """Messages without the empty keys that Arrow adds where the messages of a column do not all have the same keys."""
    if not isinstance(value, list):
        return value
    return [{key: item for key, item in message.items() if item is not None} for message in value]


def _listed(names: Sequence[str]) -> str:
    return ", ".join(f"'{name}'" for name in names)


# ---- Tokenising ----------------------------------------


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
    def from_reasons(cls, reasons: Sequence[str]) -> Dropped:
        """One reason per row, empty for a row that was kept."""
        counts = Counter(reason for reason in reasons if reason)
        return cls(dict(counts.most_common()), {reason: reasons.index(reason) for reason in counts})

    def __len__(self) -> int:
        return sum(self.counts.values())

    def __str__(self) -> str:
        total = f"dropped {len(self)} row{'' if len(self) == 1 else 's'}"
        reasons = (f"{reason} ({n}, first row {self.first_rows[reason]})" for reason, n in self.counts.items())
        return f"{total}: {'; '.join(reasons)}" if self.counts else total


class _Ending(NamedTuple):
    """What the chat template writes after an assistant message: `before` up to and with the end token, then `after`."""

    token: int | None = None
    before: str = ""
    after: str = ""


def _template_ending(tokenizer: PreTrainedTokenizerBase) -> _Ending:
    """Let the template show its end token: the first special token it writes after an assistant message."""
    if not tokenizer.chat_template:
        return _Ending()
    from jinja2 import TemplateError

    answer = "probe answer"
    conversation = [{"role": "user", "content": "probe question"}, {"role": "assistant", "content": answer}]
    try:
        text = str(tokenizer.apply_chat_template(conversation, tokenize=False))
    except TemplateError as error:
        raise UserError(f"The chat template refuses a user and an assistant message ({error}). Fix it.") from error
    _, found, tail = text.rpartition(answer)
    special = {token for token, added in tokenizer.added_tokens_decoder.items() if added.special}
    for token in tokenizer(tail, add_special_tokens=False)["input_ids"] if found else []:
        if token in special:
            before, end_text, after = tail.partition(str(tokenizer.convert_ids_to_tokens(token)))
            return _Ending(token, before + end_text, after)
    return _Ending()


def end_token_ids(tokenizer: PreTrainedTokenizerBase) -> set[int]:
    """The tokens that end a response: the tokenizer's EOS, and the one its chat template puts after an answer."""
    return {tokenizer.eos_token_id, _template_ending(tokenizer).token} - {None}


def encode_pairs(
    dataset: Dataset, tokenizer: PreTrainedTokenizerBase, truncation: Truncation, num_proc: int | None = None
) -> tuple[Dataset, Dropped]:
    """Tokenise preference pairs, and leave out the rows whose response cannot be told apart from the prompt.

    Conversations go through the chat template, which alone decides about BOS and the end token. Plain text gets the
    tokenizer's own special tokens in front and one EOS at the end.

    Returns:
        The rows that were kept, held in memory (8 bytes per response token), with the columns
        - `row`: the index in `dataset`;
        - `prompt_ids`, `chosen_ids`, `rejected_ids`: concatenated, the tokens of the whole text up to the end token;
        - `chosen_ended`, `rejected_ended`: whether the response has its end token;
        - `chosen_offsets`, `rejected_offsets`: for each response token, where it ends in the text after the prompt, in
          characters. Tokens that share a character all end after it.

        And what was dropped, for which reason.

    Raises:
        UserError: the data are not pairs, the tokenizer lacks what they need, or no row is left.
    """
    _check_pairs(dataset, "The data set")
    encode = _PairEncoder(tokenizer, truncation, conversational=isinstance(dataset[0]["prompt"], list))
    encoded = dataset.map(
        encode,
        batched=True,
        with_indices=True,
        remove_columns=dataset.column_names,
        features=_encoded_features(),
        num_proc=num_proc,
        desc="Tokenising pairs",
        **NO_CACHE,
    )
    reasons = list(encoded["dropped"])
    dropped = Dropped.from_reasons(reasons)
    if len(dropped) == len(reasons):
        raise UserError(f"No pair is left: {dropped}. Change the data, the chat template or the lengths.")
    kept = [index for index, reason in enumerate(reasons) if not reason]
    return encoded.remove_columns("dropped").select(kept, keep_in_memory=True), dropped


def _encoded_features() -> Any:
    from datasets import Features, List, Value

    tokens = List(Value("int32"))
    responses = {f"{name}_{key}": tokens for name in RESPONSES for key in ("ids", "offsets")}
    ended = {f"{name}_ended": Value("bool") for name in RESPONSES}
    return Features({"row": Value("int64"), "dropped": Value("string"), "prompt_ids": tokens, **responses, **ended})


class _Refused(Exception):
    """A row cannot be encoded; the argument is the reason."""


class _PairEncoder:
    """What `encode_pairs` maps over batches of rows; every batch is one call of the tokenizer."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, truncation: Truncation, conversational: bool) -> None:
        if not tokenizer.is_fast:
            raise UserError("The tokenizer does not report character offsets. Load a fast one (use_fast=True).")
        if conversational and not tokenizer.chat_template:
            raise UserError("The data are conversations but the tokenizer has no chat template. Set one, or use text.")
        if not conversational and tokenizer.eos_token is None:
            raise UserError("The data are plain text but the tokenizer has no EOS token. Set tokenizer.eos_token.")
        self.tokenizer, self.truncation, self.conversational = tokenizer, truncation, conversational
        self.ending = _template_ending(tokenizer) if conversational else _Ending()
        self.end_tokens = {tokenizer.eos_token_id, self.ending.token}
        self.appends_eos = not conversational and tokenizer("a")["input_ids"][-1] == tokenizer.eos_token_id

    def __call__(self, batch: dict[str, list[Any]], indices: list[int]) -> dict[str, list[Any]]:
        rows = zip(batch["prompt"], batch["chosen"], batch["rejected"], strict=True)
        texts = [self._render(*row) for row in rows]
        tokens = self._tokenise([text for row in texts if row for text in row])
        columns: dict[str, list[Any]] = {name: [] for name in _encoded_features()}
        for index, row in zip(indices, texts, strict=True):
            try:
                encoded = self._encode(row, tokens)
            except _Refused as refusal:
                encoded = {"dropped": str(refusal)}
            for name, column in columns.items():
                column.append(index if name == "row" else encoded.get(name))
        return columns

    def _render(self, prompt: Any, chosen: Any, rejected: Any) -> tuple[str, str, str] | None:
        """The texts of the prompt, of prompt and chosen, of prompt and rejected; None where the template refuses."""
        if not self.conversational:
            eos = self.tokenizer.eos_token
            chosen, rejected = (text if text.endswith(eos) else text + eos for text in (chosen, rejected))
            return prompt, prompt + chosen, prompt + rejected
        from jinja2 import TemplateError

        # Newer versions of transformers leave the nulls out themselves; 5.17 renders "None".
        prompt, chosen, rejected = (_without_nulls(messages) for messages in (prompt, chosen, rejected))
        render = partial(self.tokenizer.apply_chat_template, tokenize=False)
        try:
            prompt_text = str(render(prompt, add_generation_prompt=True))
            chosen_text, rejected_text = (str(render(prompt + answer)) for answer in (chosen, rejected))
        except TemplateError:
            return None
        return prompt_text, self._cut_after_end(chosen_text), self._cut_after_end(rejected_text)

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

    def _encode(self, texts: tuple[str, ...] | None, tokens: Iterator[tuple[list[int], list[int]]]) -> dict[str, Any]:
        if texts is None:
            raise _Refused(TEMPLATE_FAILED)
        prompt_text, *full_texts = texts
        (prompt_ids, _), *full = [next(tokens) for _ in texts]
        if not prompt_ids:
            raise _Refused(PROMPT_EMPTY)
        kept_prompt = self.truncation.cut_prompt(prompt_ids, self.tokenizer.bos_token_id)
        room = self.truncation.room_after(kept_prompt)
        encoded: dict[str, Any] = {"dropped": "", "prompt_ids": kept_prompt}
        for name, full_text, (full_ids, ends) in zip(RESPONSES, full_texts, full, strict=True):
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
            encoded[f"{name}_ended"] = ids[-1] in self.end_tokens and (room is None or len(ids) <= room)
        return encoded


# ---- Batching ----------------------------------------


@dataclass(frozen=True)
class PairCollator:
    """Make tensors from rows of `encode_pairs`.

    With B rows and R responses, N = R*B sequences of prompt and response, all of the first response, then all of the
    second, padded on the right to the longest, L:
    - `input_ids` [N, L], `attention_mask` [N, L] (1 up to the end of the sequence, whatever the padding token is);
    - `prompt_lengths` [N], `lengths` [N] (prompt tokens and response tokens);
    - `features`: the named numbers of the rows, name -> float32 [B].
    """

    pad_token_id: int
    responses: tuple[str, ...] = RESPONSES
    features: tuple[str, ...] = ()

    def __call__(self, rows: Sequence[dict[str, Any]]) -> dict[str, Any]:
        import torch
        from torch.nn.utils.rnn import pad_sequence

        pairs = [(row["prompt_ids"], row[f"{name}_ids"]) for name in self.responses for row in rows]
        prompt_lengths = torch.tensor([len(prompt) for prompt, _ in pairs])
        lengths = torch.tensor([len(response) for _, response in pairs])
        sequences = [torch.tensor([*prompt, *response]) for prompt, response in pairs]
        input_ids = pad_sequence(sequences, batch_first=True, padding_value=self.pad_token_id)
        positions = torch.arange(input_ids.shape[1])
        return {
            "input_ids": input_ids,
            "attention_mask": (positions < (prompt_lengths + lengths)[:, None]).long(),
            "prompt_lengths": prompt_lengths,
            "lengths": lengths,
            "features": {
                name: torch.tensor([row[name] for row in rows], dtype=torch.float32) for name in self.features
            },
        }
