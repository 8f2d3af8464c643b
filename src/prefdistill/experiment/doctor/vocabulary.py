"""Whether teacher and student speak of the same tokens, and whether the models have a place for each."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from prefdistill.core.errors import UserError
from prefdistill.data.encode import encode_untruncated
from prefdistill.experiment.doctor.findings import FIRST_ROWS, Finding, excerpt
from prefdistill.models.logprobs import vocabulary_rows
from prefdistill.models.vocabulary import token_conflicts

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from prefdistill.experiment.doctor.pairs import Pair

SAMPLE = 200  # pairs that are read with both tokenizers


def same_ids(student: PreTrainedTokenizerBase, teacher: PreTrainedTokenizerBase) -> Iterator[Finding]:
    ours, theirs = student.get_vocab(), teacher.get_vocab()
    shared = len(ours.keys() & theirs.keys())
    if conflicts := token_conflicts(student, teacher):
        token = conflicts[0]
        meaning = {i: other for other, i in theirs.items()}
        at = (
            f"{token!r} is {ours[token]} for the student, where the teacher has {meaning.get(ours[token], 'nothing')!r}"
        )
        yield Finding(
            "vocabulary.conflict",
            "error",
            f"teacher and student have different tokenizers: {len(conflicts):,} of the student's {len(ours):,} tokens "
            f"differ ({shared:,} words are in both)",
            "Choose a teacher and a student of one family.",
            len(conflicts),
            len(ours),
            example=excerpt(at),
        )
    elif len(ours) != len(theirs):
        more = "student" if len(ours) > len(theirs) else "teacher"
        extra = sorted(ours.keys() ^ theirs.keys())
        yield Finding(
            "vocabulary.extra",
            "note",
            f"the {more} has {len(extra):,} tokens that the other lacks; the {shared:,} they share agree, the others "
            "are trimmed",
            "Nothing to do.",
            len(extra),
            max(len(ours), len(theirs)),
            example=excerpt(repr(extra[0])),
        )


def special_tokens(student: PreTrainedTokenizerBase, teacher: PreTrainedTokenizerBase) -> Iterator[Finding]:
    for name, severity in (("bos_token", "warning"), ("eos_token", "warning"), ("pad_token", "note")):
        ours, theirs = getattr(student, name), getattr(teacher, name)
        if ours != theirs:
            yield Finding(
                "vocabulary.special",
                "warning" if severity == "warning" else "note",
                f"{name} is {ours} for the student and {theirs} for the teacher",
                "The teacher is read with the student's tokens: see that it knows them as the start and end of a text."
                if severity == "warning"
                else "Nothing to do: padding is masked.",
            )
    if student.chat_template and teacher.chat_template and student.chat_template != teacher.chat_template:
        yield Finding(
            "vocabulary.template",
            "warning",
            "teacher and student have different chat templates: the teacher is read in the student's",
            "Give the student the teacher's template, if it has not been trained with its own.",
        )


def same_reading(
    student: PreTrainedTokenizerBase, teacher: PreTrainedTokenizerBase, pairs: list[Pair], name: str
) -> Iterator[Finding]:
    """One id map can still cut texts into other tokens; then the teacher reads what it would not write."""
    rows = pairs[:SAMPLE]
    if not rows or token_conflicts(student, teacher):
        return
    try:
        whole = encode_untruncated([pair.columns for pair in rows], student)
        read = [(pair, texts[1]) for pair, (texts, _) in zip(rows, whole, strict=True) if texts]
    except UserError:
        return  # the student's tokenizer cannot read them; that is another finding
    ours, theirs = (
        tokenizer([text for _, text in read], add_special_tokens=False)["input_ids"] for tokenizer in (student, teacher)
    )
    other = [pair for (pair, _), a, b in zip(read, ours, theirs, strict=True) if a != b]
    if other:
        yield Finding(
            "vocabulary.reading",
            "warning",
            "the two tokenizers share their ids, and cut a text into different tokens",
            "Use the same tokenizer files for both; the teacher is read with the student's.",
            len(other),
            len(read),
            tuple(pair.row for pair in other[:FIRST_ROWS]),
            f"row {other[0].row}: {excerpt(other[0].texts['chosen'])}",
            name,
        )


def embedding_rows(role: str, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> Iterator[Finding]:
    rows, top = vocabulary_rows(model), max(tokenizer.get_vocab().values()) + 1
    if top > rows:
        yield Finding(
            "vocabulary.rows-missing",
            "error",
            f"the {role} has {rows:,} embedding rows, and its tokenizer ids up to {top - 1:,}",
            "Use the tokenizer it was trained with, or resize its embeddings (model.resize_token_embeddings).",
            top - rows,
            top,
        )
    elif rows > top:
        yield Finding(
            "vocabulary.rows-padded",
            "note",
            f"{rows - top:,} of the {role}'s {rows:,} embedding rows stand for no token; they are trimmed",
            "Nothing to do.",
            rows - top,
            rows,
        )


def positions(role: str, model: PreTrainedModel, longest: int) -> Iterator[Finding]:
    limit: Any = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    if isinstance(limit, int) and longest > limit:
        yield Finding(
            "model.positions",
            "error",
            f"the {role} knows {limit:,} positions, and texts have up to {longest:,} tokens after truncation",
            f"Give --max-length {limit} (data.max_length in a recipe), or another model.",
        )
