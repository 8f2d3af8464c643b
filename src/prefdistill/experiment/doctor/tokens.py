"""Checks of the pairs as tokens: what the template and the tokenizer make of them, and what truncation leaves."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from prefdistill.core.errors import UserError
from prefdistill.data import truncation as reasons
from prefdistill.data.columns import SIDES, ended_column
from prefdistill.data.encode import encode_untruncated
from prefdistill.data.template import end_token_ids
from prefdistill.data.truncation import Truncation
from prefdistill.experiment.doctor.findings import Finding, Severity, found, once_a_row

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from prefdistill.core.progress import Progress
    from prefdistill.experiment.doctor.pairs import Pair, PairSet

BATCH = 256
# Why a row would be left out: the check, and what to do.
DROPPED = {
    reasons.TEMPLATE_FAILED: ("template.refused", "Bring roles and turns into the order that the template asks for."),
    reasons.TEMPLATE_DIFFERS: (
        "template.differs",
        "Use a template whose generation prompt is the start of an answer (some open a thinking block there).",
    ),
    reasons.TOKENS_MERGE: (
        "tokens.merge",
        "End the prompt where a token ends: not with a space, or use a template with special tokens around turns.",
    ),
    reasons.PROMPT_EMPTY: ("tokens.prompt-empty", "Give these rows a prompt."),
    reasons.RESPONSE_EMPTY: ("tokens.response-empty", "Remove these rows."),
}


@dataclass(frozen=True)
class Tokens:
    """A pair before truncation: the tokens of the prompt and of each response, or why it would be left out."""

    dropped: str
    ids: dict[str, np.ndarray]  # int32, by column
    ended: dict[str, bool]
    changed: tuple[str, str]  # a text that the template has changed: how, and its start


@dataclass(frozen=True)
class Reading:
    """With what the pairs are read."""

    tokenizer: PreTrainedTokenizerBase
    truncation: Truncation
    ends: frozenset[int]

    @classmethod
    def of(cls, tokenizer: PreTrainedTokenizerBase, truncation: Truncation) -> Reading:
        return cls(tokenizer, truncation, frozenset(end_token_ids(tokenizer)))

    def cut(self, pair: Pair) -> dict[str, np.ndarray]:
        """What truncation leaves of the prompt and the responses."""
        assert pair.tokens is not None
        whole = pair.tokens.ids["prompt"].tolist()
        prompt = self.truncation.cut_prompt(whole, self.tokenizer.bos_token_id)
        room = self.truncation.room_after(prompt)
        return {"prompt": np.array(prompt), **{name: pair.tokens.ids[name][:room] for name in SIDES}}


def tokenise(data: PairSet, tokenizer: PreTrainedTokenizerBase, progress: Progress) -> Iterator[Finding]:
    """Give every pair its tokens; a finding if the tokenizer cannot read these data at all."""
    for start in range(0, len(data.pairs), BATCH):
        batch = data.pairs[start : start + BATCH]
        try:
            for pair, (texts, row) in zip(
                batch, encode_untruncated([pair.columns for pair in batch], tokenizer), strict=True
            ):
                ids = {name: np.array(row.get(f"{name}_ids") or [], np.int32) for name in ("prompt", *SIDES)}
                ended = {name: bool(row.get(f"{name}_ended")) for name in SIDES}
                pair.tokens = Tokens(row["dropped"], ids, ended, _changed(pair, texts))
        except UserError as error:
            yield Finding("template.unusable", "error", str(error), "See there.", len(data.pairs), len(data.pairs))
            return
        progress.update(len(batch))


def _changed(pair: Pair, texts: tuple[str, ...] | None) -> tuple[str, str]:
    """The first message that is not in the text as it was written."""
    if not pair.messages or texts is None:
        return "", ""
    for name, text in zip(SIDES, texts[1:], strict=True):
        for message in [*pair.columns["prompt"], *pair.columns[name]]:
            content = message["content"]
            if content not in text:
                how = "stripped" if content.strip() in text else "changed"
                return how, f"{message['role']}: {content}"
    return "", ""


def read(data: PairSet) -> list[tuple[Pair, Tokens]]:
    """The pairs whose responses can be told apart from their prompt."""
    return [(pair, pair.tokens) for pair in data.pairs if pair.tokens and not pair.tokens.dropped]


# -- checks ------------------------------------------------------------------------------------------------------------


def left_out(data: PairSet, reading: Reading) -> Iterator[Finding]:
    for reason, (check, fix) in DROPPED.items():
        hits = [(p.row, p.texts["prompt"]) for p in data.pairs if p.tokens and p.tokens.dropped == reason]
        severity: Severity = "error" if len(hits) == len(data.pairs) else "warning"
        yield from found(check, severity, data.where, hits, f"{reason}; such rows are left out", fix)


def texts_changed(data: PairSet, reading: Reading) -> Iterator[Finding]:
    changed = [(pair.row, *tokens.changed) for pair, tokens in read(data) if tokens.changed[0]]
    yield from found(
        "template.strips",
        "note",
        data.where,
        [(row, text) for row, how, text in changed if how == "stripped"],
        "the chat template strips spaces or newlines around a message",
        "Nothing to do, if prompts are built with the same template where the student is used.",
    )
    yield from found(
        "template.changes-text",
        "warning",
        data.where,
        [(row, text) for row, how, text in changed if how == "changed"],
        "the chat template leaves out or rewrites a message",
        "Look at the template: some drop system messages or thinking. Put what must stay into the user's message.",
    )


def begin_tokens(data: PairSet, reading: Reading) -> Iterator[Finding]:
    bos = reading.tokenizer.bos_token_id
    rows = [(pair, tokens.ids["prompt"]) for pair, tokens in read(data)]
    twice = [(pair.row, pair.texts["prompt"]) for pair, ids in rows if bos is not None and (ids[:2] == bos).sum() == 2]
    yield from found(
        "tokens.bos-twice",
        "warning",
        data.where,
        twice,
        "the text begins with two BOS tokens",
        "Take the BOS out of the data or the template: only one of data, template and tokenizer writes it.",
    )
    adds = bos is not None and reading.tokenizer("a")["input_ids"][:1] == [bos]
    missing = [(pair.row, pair.texts["prompt"]) for pair, ids in rows if adds and ids[0] != bos]
    yield from found(
        "tokens.bos-missing",
        "warning",
        data.where,
        missing,
        "the tokenizer begins texts with BOS, and the chat template does not",
        "Write {{ bos_token }} at the start of the template: the model has hardly seen texts without it.",
    )


def end_tokens(data: PairSet, reading: Reading) -> Iterator[Finding]:
    missing, twice = [], []
    for pair, tokens in read(data):
        for name in SIDES:
            inside = np.isin(tokens.ids[name][:-1], [*reading.ends])
            if inside.any():
                twice.append((pair.row, f"{name}: {pair.texts[name]}"))
            elif not tokens.ended[name] and pair.columns.get(ended_column(name)) is not False:
                missing.append((pair.row, f"{name}: {pair.texts[name][-60:]}"))
    yield from found(
        "tokens.end-missing",
        "warning",
        data.where,
        once_a_row(missing),
        "a response has no end token: the student does not learn to stop",
        "Let the chat template write the end token after an assistant message.",
    )
    yield from found(
        "tokens.end-twice",
        "warning",
        data.where,
        once_a_row(twice),
        "a response has an end token before its end",
        "Take the end token out of the text, or make one message of several: generation stops at the first one.",
    )


def special_in_text(data: PairSet, reading: Reading) -> Iterator[Finding]:
    """Text that the tokenizer takes for its own markup, other than end tokens in responses."""
    tokenizer = reading.tokenizer
    added = {token.content: i for i, token in tokenizer.added_tokens_decoder.items() if token.special}
    if not added:
        return
    pattern = re.compile("|".join(map(re.escape, sorted(added, key=len, reverse=True))))
    hits = []
    for pair, _ in read(data):
        for name, text in pair.texts.items():
            markup = [m for m in pattern.finditer(text) if name == "prompt" or added[m.group()] not in reading.ends]
            if markup:
                hits.append((pair.row, f"{name}: {text[max(0, markup[0].start() - 20) : markup[0].end() + 20]}"))
                break
    yield from found(
        "tokens.special-in-text",
        "warning",
        data.where,
        hits,
        "a text holds what the tokenizer takes for a special token",
        "Rewrite or remove it: it becomes one token, such as the start of a turn.",
    )


def unknown(data: PairSet, reading: Reading) -> Iterator[Finding]:
    unk = reading.tokenizer.unk_token_id
    ends = reading.ends
    hits = [
        (pair.row, f"{name}: {pair.texts[name]}")
        for pair, tokens in read(data)
        for name in [next((n for n, ids in tokens.ids.items() if unk is not None and (ids == unk).any()), "")]
        if name and unk not in ends
    ]
    yield from found(
        "tokens.unknown",
        "warning",
        data.where,
        hits,
        "characters that the tokenizer does not know became its unknown token",
        "Use a tokenizer with byte fallback, or remove these characters.",
    )


def truncated(data: PairSet, reading: Reading) -> Iterator[Finding]:
    """What truncation changes, as training and signals would have it."""
    prompts, responses, no_room, equal, equal_whole = [], [], [], [], []
    for pair, tokens in read(data):
        kept = reading.cut(pair)
        if len(kept["prompt"]) < len(tokens.ids["prompt"]):
            prompts.append((pair.row, f"{len(tokens.ids['prompt'])} tokens: {pair.texts['prompt']}"))
        if not len(kept["chosen"]):
            no_room.append((pair.row, f"the prompt has {len(kept['prompt'])} tokens: {pair.texts['prompt']}"))
            continue
        short = [name for name in SIDES if len(kept[name]) < len(tokens.ids[name])]
        if short:
            responses.append((pair.row, f"{short[0]} has {len(tokens.ids[short[0]])} tokens: {pair.texts[short[0]]}"))
        if np.array_equal(tokens.ids["chosen"], tokens.ids["rejected"]):
            if pair.key("chosen") != pair.key("rejected"):
                equal_whole.append((pair.row, f"{pair.texts['chosen']!r} and {pair.texts['rejected']!r}"))
        elif short and np.array_equal(kept["chosen"], kept["rejected"]):
            equal.append((pair.row, pair.texts["chosen"]))
    longest, prompt_limit = reading.truncation.max_length, reading.truncation.max_prompt_length
    yield from found(
        "tokens.prompt-cut",
        "warning",
        data.where,
        prompts,
        f"the prompt is longer than max_prompt_length={prompt_limit} and loses its start (system message, instruction)",
        "Raise max_prompt_length, or remove these rows.",
    )
    yield from found(
        "tokens.response-cut",
        "warning",
        data.where,
        responses,
        f"a response does not fit max_length={longest}: it loses its end, and its end token",
        "Raise max_length, or remove these rows.",
    )
    yield from found(
        "tokens.no-room",
        "error" if len(no_room) == len(data.pairs) else "warning",
        data.where,
        no_room,
        f"{reasons.PROMPT_TOO_LONG} ({longest}); such rows are left out",
        "Raise max_length, or lower max_prompt_length.",
    )
    yield from found(
        "tokens.equal-after-cut",
        "warning",
        data.where,
        equal,
        "the two responses are the same once they are cut: nothing is preferred",
        "Raise max_length, or remove these rows.",
    )
    yield from found(
        "tokens.equal-responses",
        "warning",
        data.where,
        equal_whole,
        "the two responses become the same tokens, though their texts differ: nothing is preferred",
        "Remove these rows; the template or the tokenizer takes spaces or rare characters for the same.",
    )


def token_facts(data: PairSet, reading: Reading) -> dict[str, Any]:
    """Lengths in tokens before truncation, and what is left after it."""
    rows = read(data)
    kept = [reading.cut(pair) for pair, _ in rows]
    return {
        "tokens": {name: quantiles([len(tokens.ids[name]) for _, tokens in rows]) for name in ("prompt", *SIDES)},
        "kept": {
            "pairs": len(rows),
            "response_tokens": sum(len(cut[name]) for cut in kept for name in SIDES),
            "longest": max((len(cut["prompt"]) + len(cut[name]) for cut in kept for name in SIDES), default=0),
        },
    }


def quantiles(lengths: list[int]) -> dict[str, int]:
    if not lengths:
        return {}
    at = {"min": 0.0, "5%": 0.05, "median": 0.5, "95%": 0.95, "99%": 0.99, "max": 1.0}
    return {name: int(np.quantile(lengths, q)) for name, q in at.items()}


TOKEN_CHECKS = (
    left_out,
    texts_changed,
    begin_tokens,
    end_tokens,
    special_in_text,
    unknown,
    truncated,
)
