"""Truncate encoded pairs, and count the rows that encoding drops."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from prefdistill.core.errors import UserError
from prefdistill.data.columns import SIDES

# Why `encode_pairs` drops a row.
TEMPLATE_FAILED = "the chat template refuses its messages"
TEMPLATE_DIFFERS = "the chat template renders the prompt differently when a response follows"
TOKENS_MERGE = "the tokenizer merges tokens across the end of the prompt"
TEXT_CHANGED = "a sampled response is of another prompt or tokenizer, and the chat template changes its text"
TOKENS_CHANGED = "a sampled response is of another prompt, and its text has other tokens than were sampled"
PROMPT_EMPTY = "the prompt has no tokens"
PROMPT_TOO_LONG = "the prompt leaves no room for a response within max_length"
RESPONSE_EMPTY = "a response has no tokens"
EQUAL_AFTER_CUT = "chosen and rejected are equal after truncation"
NO_SIGNALS = "there are no signals of it: they were dropped, because of another response or by the teacher's tokenizer"


class Truncated(NamedTuple):
    """A row after truncation: tokens by column, the columns that were cut, why it is dropped ("": it is not)."""

    ids: dict[str, list[int]]
    names: set[str]
    dropped: str


@dataclass(frozen=True)
class Truncation:
    """How long an encoded pair may be, in tokens; None is no limit.

    A prompt longer than `max_prompt_length` keeps its end, and its BOS token if it starts with one. Each response is
    then cut on the right so that prompt and response fit `max_length`; a cut response has not ended.
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
        """Return a prompt's tokens, cut on the left to `max_prompt_length`."""
        limit = self.max_prompt_length
        if limit is None or len(ids) <= limit:
            return ids
        head = ids[:1] if ids[0] == bos else []
        return head + ids[len(ids) - limit + len(head) :]

    def room_after(self, prompt_ids: list[int]) -> int | None:
        """Return how many response tokens fit after a prompt that was cut; None is no limit."""
        return None if self.max_length is None else max(0, self.max_length - len(prompt_ids))

    def apply(self, ids: dict[str, list[int]], bos: int | None) -> Truncated:
        """Truncate a row: its `prompt`, and responses by column. A pair whose sides this makes equal is dropped."""
        prompt = self.cut_prompt(ids["prompt"], bos)
        room = self.room_after(prompt)
        cut = {name: prompt if name == "prompt" else part[:room] for name, part in ids.items()}
        truncated = {name for name in ids if len(cut[name]) < len(ids[name])}
        chosen, rejected = ((cut.get(side), ids.get(side)) for side in SIDES)
        equal = chosen[0] is not None and chosen[0] == rejected[0] and chosen[1] != rejected[1]
        return Truncated(cut, truncated, PROMPT_TOO_LONG if room == 0 else EQUAL_AFTER_CUT if equal else "")


@dataclass(frozen=True)
class Dropped:
    """The rows that `encode_pairs` dropped: how many for each reason, and the first of them. `len()` is the total."""

    counts: dict[str, int]
    first_rows: dict[str, int]

    @classmethod
    def from_reasons(cls, reasons: Sequence[str], first: int = 0) -> Dropped:
        """Count reasons, one per row from row `first` on; an empty reason is a row that was kept."""
        counts = Counter(reason for reason in reasons if reason)
        return cls(dict(counts.most_common()), {reason: first + reasons.index(reason) for reason in counts})

    def with_rows(self, reasons: Mapping[int, str]) -> Dropped:
        """Return these and other rows, given with the reason to drop each."""
        counts = Counter(self.counts) + Counter(reasons.values())
        first_rows = {reason: min(row for row in reasons if reasons[row] == reason) for reason in {*reasons.values()}}
        return Dropped(dict(counts.most_common()), first_rows | self.first_rows)

    def __len__(self) -> int:
        return sum(self.counts.values())

    def __str__(self) -> str:
        total = f"dropped {len(self)} row{'' if len(self) == 1 else 's'}"
        reasons = (f"{reason} ({n}, first row {self.first_rows[reason]})" for reason, n in self.counts.items())
        return f"{total}: {'; '.join(reasons)}" if self.counts else total


@dataclass(frozen=True)
class Reading:
    """What reading a data set left of it: the same for `doctor`, signals, training and the report.

    Args:
        kept: rows that were not dropped.
        dropped: the other rows.
        prompts: kept rows whose prompt is truncated.
        responses: kept rows of which a response is truncated.
        ids: a digest of the kept rows' numbers and token ids, where it was computed.
        warnings: of what a training learns from these rows.
        across: what a student shares with a teacher of other tokens, see `signals.join.Joined`.
    """

    kept: int
    dropped: Dropped
    prompts: int
    responses: int
    ids: str = ""
    warnings: tuple[str, ...] = ()
    across: Mapping[str, float] = field(default_factory=dict)

    @property
    def rows(self) -> int:
        return self.kept + len(self.dropped)

    @property
    def complete(self) -> bool:
        """Whether nothing is dropped or truncated."""
        return not (self.dropped or self.prompts or self.responses)

    def __str__(self) -> str:
        parts = [str(self.dropped)] if self.dropped else []
        if self.prompts:
            parts.append(f"prompts truncated: {self.prompts:,}")
        if self.responses:
            parts.append(f"rows with a truncated response: {self.responses:,}")
        return "; ".join([*parts, f"{self.kept:,} of {self.rows:,} rows are read"])

    def to_json(self) -> dict[str, Any]:
        return {
            "rows": self.rows,
            "kept": self.kept,
            "dropped": self.dropped.counts,
            "truncated_prompts": self.prompts,
            "truncated_responses": self.responses,
            **({"ids": self.ids} if self.ids else {}),
            **({"warnings": list(self.warnings)} if self.warnings else {}),
            **({"across": {**self.across}} if self.across else {}),
        }


def nothing_left(dropped: Dropped) -> str:
    """Return the error message for data of which every row was dropped."""
    return f"No row is left: {dropped}. Change the data, the chat template or the lengths."
