"""Checks of a teacher that reads the texts with another tokenizer than the student: what it can serve, and in which
rows."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from prefdistill.core.errors import UserError
from prefdistill.data.spans import CUT_INSIDE, NO_TEXT, NOT_GIVEN_BACK, PROMPT_CUT, REASONS
from prefdistill.experiment.check import AS_STUDENT
from prefdistill.experiment.doctor.findings import Finding, Severity, excerpt
from prefdistill.experiment.needs import of_own_tokens, reads_teacher
from prefdistill.methods import METHODS, Method
from prefdistill.models.vocabulary import token_conflicts
from prefdistill.signals.aligned import CUT_ELSEWHERE, EMPTY, ENDS_DIFFER
from prefdistill.signals.join import INSTEAD
from prefdistill.signals.overlap import Overlap

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from prefdistill.experiment.doctor.pairs import PairSet

# Why a row that both read has no signals in the student's tokens: the check, and the fix.
UNSERVED = {
    REASONS[NO_TEXT]: (
        "across.no-text",
        "Give these rows one assistant message of text, and use chat templates that write it as it is.",
    ),
    REASONS[PROMPT_CUT]: ("across.prompt-cut", "Raise max_prompt_length, or remove these rows."),
    REASONS[NOT_GIVEN_BACK]: (
        "across.changed-text",
        "Write these texts as the tokenizer does (Unicode normal form, spaces), or use a tokenizer that keeps them.",
    ),
    CUT_ELSEWHERE: ("across.cut-elsewhere", "Raise max_length until both read whole responses, or remove these rows."),
    REASONS[CUT_INSIDE]: ("across.cut-inside", "Raise max_length, or remove these rows."),
    EMPTY: ("across.empty", "Remove these rows, or use a chat template that writes nothing before the end token."),
    ENDS_DIFFER: ("across.ends-differ", "Use chat templates that both write an end token after a response."),
}


def of_teacher(findings: Iterable[Finding]) -> Iterator[Finding]:
    """Yield findings about the tokens that the teacher reads."""
    for finding in findings:
        yield replace(finding, message=f"teacher: {finding.message}")


def other_tokens(
    student: PreTrainedTokenizerBase, teacher: PreTrainedTokenizerBase, methods: Mapping[str, Method] | None
) -> Iterator[Finding]:
    """Report that the teacher reads the texts with a tokenizer or template of its own, and which methods that suits.

    Args:
        student, teacher: what they are read with.
        methods: of a recipe, by name; None: all that are registered.
    """
    available = _registered() if methods is None else methods
    refused = [name for name, method in available.items() if of_own_tokens(method)]
    works = [name for name, method in available.items() if reads_teacher(method) and name not in refused]
    conflicts, ids = token_conflicts(student, teacher), student.get_vocab()
    what, example = "the recipe reads the teacher with another chat template than the student", ""
    if conflicts:
        differ = f"{len(conflicts):,} of the student's {len(ids):,} tokens differ"
        what = f"teacher and student have different tokenizers ({differ}), so each reads the texts with its own"
        teacher_tokens = {number: token for token, number in teacher.get_vocab().items()}
        token, number = conflicts[0], ids[conflicts[0]]
        in_teacher = teacher_tokens.get(number, "nothing")
        example = f"{token!r} has id {number} for the student, where the teacher has {in_teacher!r}"
    instead = INSTEAD if conflicts else AS_STUDENT
    parts = [f"methods on numbers of whole texts or of states work: {', '.join(works)}"] if works else []
    parts += [f"those on distributions over tokens are refused: {', '.join(refused)}"] if refused else []
    yield Finding(
        "vocabulary.other-tokens",
        "error" if refused and methods is not None else "note",
        "; ".join([what, *parts]),
        f"{instead[:1].upper()}{instead[1:]}." if refused else "Nothing to do.",
        max(1, len(conflicts)),
        len(ids),
        example=excerpt(example),
    )


def no_template() -> Iterator[Finding]:
    """Report a teacher that cannot read conversations."""
    yield Finding(
        "template.missing",
        "error",
        "the tokenizer has no chat template, which conversations need",
        "Name one: --teacher-chat-template FILE, or plain, which writes them as text (model.teacher_chat_template).",
    )


def _registered() -> dict[str, Method]:
    """Return the registered methods with their default options, as far as they have any."""
    methods: dict[str, Method] = {}
    for name in METHODS:
        try:
            methods[name] = METHODS[name]()
        except (UserError, TypeError):  # it has options without a default
            continue
    return methods


def unserved(data: PairSet, overlap: Overlap) -> Iterator[Finding]:
    """Report the rows that both read and that a training on the teacher's signals drops."""
    severity: Severity = "warning" if overlap.kept else "error"
    hits: dict[str, list[tuple[int, str]]] = defaultdict(list)
    for place, (reason, response) in sorted(overlap.unserved.items()):
        pair = data.pairs[place]
        hits[reason].append((pair.row, f"{response}: {pair.texts[response]}"))
    for reason in hits:
        check, fix = UNSERVED[reason]
        yield from data.finding(check, severity, hits[reason], f"{reason}; such rows are dropped", fix)


def facts(overlap: Overlap) -> dict[str, Any]:
    """Return the rows that are left of the data, those that are dropped by reason, and the share of shared states."""
    return {
        "rows": overlap.rows,
        "kept": overlap.kept,
        "dropped": overlap.dropped.counts,
        "shared_states": overlap.shared,
    }
