"""Checks of preference pairs as tokens: chat template, tokenizer and truncation."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from prefdistill.core.errors import UserError
from prefdistill.data import truncation as reasons
from prefdistill.data.columns import SIDES, ended_column
from prefdistill.data.encode import encode_untruncated
from prefdistill.data.template import end_token_ids
from prefdistill.data.truncation import Dropped, Reading, Truncated, Truncation
from prefdistill.experiment.doctor.findings import Finding, Severity, first_hit_per_row
from prefdistill.experiment.doctor.pairs import Tokens

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from prefdistill.core.progress import Progress
    from prefdistill.experiment.doctor.pairs import Pair, PairSet, Tokens

BATCH = 256
# Why training would drop a row: the check, and the fix.
DROPPED = {
    reasons.TEMPLATE_FAILED: ("template.refused", "Bring roles and turns into the order that the template requires."),
    reasons.TEMPLATE_DIFFERS: (
        "template.differs",
        "Use a template whose generation prompt is the start of a response. Some open a thinking block there: "
        "a teacher is read after it with --response-prefix (model.teacher_response_prefix).",
    ),
    **dict.fromkeys(
        (reasons.TEXT_CHANGED, reasons.TOKENS_CHANGED),
        ("template.sampled", "Sample again with this tokenizer and template, or remove `NAME_ids` to render the text."),
    ),
    reasons.TOKENS_MERGE: (
        "tokens.merge",
        "End the prompt where a token ends: not with a space, or use a template with special tokens around turns.",
    ),
    reasons.PROMPT_EMPTY: ("tokens.prompt-empty", "Give these rows a prompt."),
    reasons.RESPONSE_EMPTY: ("tokens.response-empty", "Remove these rows."),
}


@dataclass(frozen=True)
class Encoding:
    """How pairs are encoded: the tokenizer, the truncation, and the end tokens."""

    tokenizer: PreTrainedTokenizerBase
    truncation: Truncation
    ends: frozenset[int]

    @classmethod
    def of(cls, tokenizer: PreTrainedTokenizerBase, truncation: Truncation) -> Encoding:
        return cls(tokenizer, truncation, frozenset(end_token_ids(tokenizer)))

    def truncate(self, pair: Pair) -> Truncated:
        """Return the tokens of a pair after truncation."""
        assert pair.tokens is not None
        ids = {name: part.tolist() for name, part in pair.tokens.ids.items()}
        return self.truncation.apply(ids, self.tokenizer.bos_token_id)

    def reading(self, data: PairSet) -> Reading:
        """Return how training and signals will read the pairs, as `encode.reading_of` does."""
        cuts = [pair.tokens.dropped or self.truncate(pair) for pair in data.pairs if pair.tokens]
        reasons = [cut if isinstance(cut, str) else cut.dropped for cut in cuts]
        truncated = [cut.names for cut in cuts if not isinstance(cut, str) and not cut.dropped]
        prompts, responses = (sum(not names.isdisjoint(cut) for cut in truncated) for names in ({"prompt"}, {*SIDES}))
        return Reading(len(truncated), Dropped.from_reasons(reasons), prompts, responses)


def tokenise(data: PairSet, tokenizer: PreTrainedTokenizerBase, progress: Progress) -> Iterator[Finding]:
    """Encode every pair in place; yield a finding if the tokenizer cannot encode the data at all."""
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
            yield Finding(
                "template.unusable",
                "error",
                str(error),
                "Change the tokenizer or the data.",
                len(data.pairs),
                len(data.pairs),
            )
            return
        progress.update(len(batch))


def _changed(pair: Pair, texts: tuple[str, ...] | None) -> tuple[str, str]:
    """Return how the template changes a message, and the first such message."""
    if not pair.messages or texts is None:
        return "", ""
    for name, text in zip(SIDES, texts[1:], strict=True):
        for message in [*pair.columns["prompt"], *pair.columns[name]]:
            content = message["content"]
            if content not in text:
                how = "stripped" if content.strip() in text else "changed"
                return how, f"{message['role']}: {content}"
    return "", ""


def encoded(data: PairSet) -> list[tuple[Pair, Tokens]]:
    """Return the pairs that training would not drop, with their tokens."""
    return [(pair, pair.tokens) for pair in data.pairs if pair.tokens and not pair.tokens.dropped]


# -- checks ------------------------------------------------------------------------------------------------------------


def dropped(data: PairSet, encoding: Encoding) -> Iterator[Finding]:
    for reason, (check, fix) in DROPPED.items():
        hits = [(p.row, p.texts["prompt"]) for p in data.pairs if p.tokens and p.tokens.dropped == reason]
        severity: Severity = "error" if len(hits) == len(data.pairs) else "warning"
        yield from data.finding(check, severity, hits, f"{reason}; such rows are dropped", fix)


def texts_changed(data: PairSet, encoding: Encoding) -> Iterator[Finding]:
    changed = [(pair.row, *tokens.changed) for pair, tokens in encoded(data) if tokens.changed[0]]
    yield from data.finding(
        "template.strips",
        "note",
        [(row, text) for row, how, text in changed if how == "stripped"],
        "the chat template strips spaces or newlines around a message",
        "Nothing to do, if the student is used with the same template.",
    )
    yield from data.finding(
        "template.changes-text",
        "warning",
        [(row, text) for row, how, text in changed if how == "changed"],
        "the chat template drops or rewrites a message",
        "Check the template: some drop system messages or thinking. Move such text into the user's message.",
    )


def begin_tokens(data: PairSet, encoding: Encoding) -> Iterator[Finding]:
    bos = encoding.tokenizer.bos_token_id
    rows = [(pair, tokens.ids["prompt"]) for pair, tokens in encoded(data)]
    twice = [(pair.row, pair.texts["prompt"]) for pair, ids in rows if bos is not None and (ids[:2] == bos).sum() == 2]
    yield from data.finding(
        "tokens.bos-twice",
        "warning",
        twice,
        "the text starts with two BOS tokens",
        "Remove the BOS from the data or the template: only one of data, template and tokenizer should write it.",
    )
    adds = bos is not None and encoding.tokenizer("a")["input_ids"][:1] == [bos]
    missing = [(pair.row, pair.texts["prompt"]) for pair, ids in rows if adds and ids[0] != bos]
    yield from data.finding(
        "tokens.bos-missing",
        "warning",
        missing,
        "the tokenizer starts texts with BOS, but the chat template does not",
        "Write {{ bos_token }} at the start of the template: the model was trained on texts with it.",
    )


def end_tokens(data: PairSet, encoding: Encoding) -> Iterator[Finding]:
    missing, twice = [], []
    for pair, tokens in encoded(data):
        for name in SIDES:
            inside = np.isin(tokens.ids[name][:-1], [*encoding.ends])
            if inside.any():
                twice.append((pair.row, f"{name}: {pair.texts[name]}"))
            elif not tokens.ended[name] and pair.columns.get(ended_column(name)) is not False:
                missing.append((pair.row, f"{name}: {pair.texts[name][-60:]}"))
    yield from data.finding(
        "tokens.end-missing",
        "warning",
        first_hit_per_row(missing),
        "a response has no end token: nothing is learnt of where to stop",
        "Let the chat template write the end token after an assistant message.",
    )
    yield from data.finding(
        "tokens.end-twice",
        "warning",
        first_hit_per_row(twice),
        "a response has an end token before its end",
        "Remove the end token from the text, or merge several messages into one: generation stops at the first one.",
    )


def special_in_text(data: PairSet, encoding: Encoding) -> Iterator[Finding]:
    """Find text that the tokenizer encodes as special tokens, other than end tokens in responses."""
    tokenizer = encoding.tokenizer
    added = {token.content: i for i, token in tokenizer.added_tokens_decoder.items() if token.special}
    if not added:
        return
    pattern = re.compile("|".join(map(re.escape, sorted(added, key=len, reverse=True))))
    hits = []
    for pair, _ in encoded(data):
        for name, text in pair.texts.items():
            markup = [m for m in pattern.finditer(text) if name == "prompt" or added[m.group()] not in encoding.ends]
            if markup:
                hits.append((pair.row, f"{name}: {text[max(0, markup[0].start() - 20) : markup[0].end() + 20]}"))
                break
    yield from data.finding(
        "tokens.special-in-text",
        "warning",
        hits,
        "a text contains the text of a special token",
        "Rewrite or remove it: it is encoded as that token, such as the start of a turn.",
    )


def unknown(data: PairSet, encoding: Encoding) -> Iterator[Finding]:
    unk = encoding.tokenizer.unk_token_id
    ends = encoding.ends
    hits = [
        (pair.row, f"{name}: {pair.texts[name]}")
        for pair, tokens in encoded(data)
        for name in [next((n for n, ids in tokens.ids.items() if unk is not None and (ids == unk).any()), "")]
        if name and unk not in ends
    ]
    yield from data.finding(
        "tokens.unknown",
        "warning",
        hits,
        "characters that are not in the vocabulary are encoded as the unknown token",
        "Use a tokenizer with byte fallback, or remove these characters.",
    )


def truncated(data: PairSet, encoding: Encoding) -> Iterator[Finding]:
    """Report what truncation changes, as training and signals truncate."""
    prompts, responses, equal_whole = [], [], []
    cut_sides = Counter[str]()
    by_reason: dict[str, list[tuple[int, str]]] = {reasons.PROMPT_TOO_LONG: [], reasons.EQUAL_AFTER_CUT: []}
    for pair, tokens in encoded(data):
        cut, sizes = encoding.truncate(pair), {name: len(ids) for name, ids in tokens.ids.items()}
        if np.array_equal(tokens.ids["chosen"], tokens.ids["rejected"]) and pair.key("chosen") != pair.key("rejected"):
            equal_whole.append((pair.row, f"{pair.texts['chosen']!r} and {pair.texts['rejected']!r}"))
        if cut.dropped:
            example = f"the prompt has {len(cut.ids['prompt'])} tokens, chosen {sizes['chosen']}"
            by_reason[cut.dropped].append((pair.row, f"{example}: {pair.texts['prompt']}"))
            continue
        if "prompt" in cut.names:
            prompts.append((pair.row, f"{sizes['prompt']} tokens: {pair.texts['prompt']}"))
        cut_sides.update(cut.names)
        if side := next((side for side in SIDES if side in cut.names), None):
            responses.append((pair.row, f"{side} has {sizes[side]} tokens: {pair.texts[side]}"))
    longest, prompt_limit = encoding.truncation.max_length, encoding.truncation.max_prompt_length
    yield from data.finding(
        "tokens.prompt-cut",
        "warning",
        prompts,
        f"the prompt is longer than max_prompt_length={prompt_limit}: its start (system message, instruction) is cut",
        "Raise max_prompt_length, or remove these rows.",
    )
    yield from data.finding(
        "tokens.response-cut",
        "warning",
        responses,
        f"a response does not fit max_length={longest}: it is truncated and its end token dropped "
        f"(chosen in {cut_sides['chosen']:,} rows, rejected in {cut_sides['rejected']:,})",
        "Raise max_length, or remove these rows.",
    )
    yield from data.finding(
        "tokens.no-room",
        "error" if len(by_reason[reasons.PROMPT_TOO_LONG]) == len(data.pairs) else "warning",
        by_reason[reasons.PROMPT_TOO_LONG],
        f"{reasons.PROMPT_TOO_LONG} ({longest}); such rows are dropped",
        "Raise max_length, or lower max_prompt_length.",
    )
    yield from data.finding(
        "tokens.equal-after-cut",
        "error" if len(by_reason[reasons.EQUAL_AFTER_CUT]) == len(data.pairs) else "warning",
        by_reason[reasons.EQUAL_AFTER_CUT],
        f"{reasons.EQUAL_AFTER_CUT} (max_length={longest}); such rows are dropped",
        "Raise max_length, or remove these rows.",
    )
    yield from data.finding(
        "tokens.equal-responses",
        "warning",
        equal_whole,
        "the two responses have the same tokens, though their texts differ: the pair expresses no preference",
        "Remove these rows; the template or the tokenizer does not distinguish their spaces or rare characters.",
    )


def token_facts(data: PairSet, encoding: Encoding) -> dict[str, Any]:
    """Return lengths in tokens before truncation, and totals after it."""
    rows, reading = encoded(data), encoding.reading(data)
    cuts = [cut.ids for pair, _ in rows if not (cut := encoding.truncate(pair)).dropped]
    sizes = [(len(ids["prompt"]), [len(ids[name]) for name in SIDES]) for ids in cuts]
    return {
        "tokens": {name: quantiles([len(tokens.ids[name]) for _, tokens in rows]) for name in ("prompt", *SIDES)},
        "read": {**reading.to_json(), "text": str(reading)},
        "kept": {
            "pairs": len(cuts),
            "response_tokens": sum(sum(responses) for _, responses in sizes),
            "longest": max((prompt + max(responses) for prompt, responses in sizes), default=0),
        },
    }


def quantiles(lengths: list[int]) -> dict[str, int]:
    """Return minimum, maximum and quantiles by name."""
    if not lengths:
        return {}
    at = {"min": 0.0, "5%": 0.05, "median": 0.5, "95%": 0.95, "99%": 0.99, "max": 1.0}
    return {name: int(np.quantile(lengths, q)) for name, q in at.items()}


TOKEN_CHECKS = (
    dropped,
    texts_changed,
    begin_tokens,
    end_tokens,
    special_in_text,
    unknown,
    truncated,
)
