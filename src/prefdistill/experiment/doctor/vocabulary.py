"""Checks of vocabularies: whether teacher and student share token ids, and whether models have a row for each."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from prefdistill.core.errors import UserError
from prefdistill.data.encode import encode_untruncated
from prefdistill.experiment.doctor.findings import FIRST_ROWS, Finding, excerpt
from prefdistill.models.logprobs import vocabulary_rows
from prefdistill.training.arguments import adapter_config

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from prefdistill.experiment.doctor.pairs import Pair
    from prefdistill.training.options import Training

PROBES = (
    "Hello, world!",
    "  two  spaces and\ttabs\n\n",
    "It's 1,234.5 and don't",
    "naïve café – 東京 🙂",
    "def f(x):\n    return x",
)
SAMPLE = 200  # pairs to tokenise with both tokenizers


def extra_tokens(student: PreTrainedTokenizerBase, teacher: PreTrainedTokenizerBase) -> Iterator[Finding]:
    """Report tokens that only one of two tokenizers has whose shared tokens agree."""
    student_ids, teacher_ids = student.get_vocab(), teacher.get_vocab()
    if len(student_ids) != len(teacher_ids):
        larger = "student" if len(student_ids) > len(teacher_ids) else "teacher"
        extra = sorted(student_ids.keys() ^ teacher_ids.keys())
        shared = len(student_ids.keys() & teacher_ids.keys())
        yield Finding(
            "vocabulary.extra",
            "note",
            f"the {larger} has {len(extra):,} tokens that the other lacks; the {shared:,} they share agree, the others "
            "are trimmed",
            "Nothing to do.",
            len(extra),
            max(len(student_ids), len(teacher_ids)),
            example=excerpt(repr(extra[0])),
        )


def special_tokens(student: PreTrainedTokenizerBase, teacher: PreTrainedTokenizerBase) -> Iterator[Finding]:
    """Report special tokens and chat templates that differ."""
    for name, severity in (("bos_token", "warning"), ("eos_token", "warning"), ("pad_token", "note")):
        student_token, teacher_token = getattr(student, name), getattr(teacher, name)
        if student_token != teacher_token:
            yield Finding(
                "vocabulary.special",
                "warning" if severity == "warning" else "note",
                f"{name} is {student_token} for the student and {teacher_token} for the teacher",
                "The teacher scores the student's tokens: check that it knows them as start and end of a text."
                if severity == "warning"
                else "Nothing to do: padding is masked.",
            )
    if student.chat_template and teacher.chat_template and student.chat_template != teacher.chat_template:
        yield Finding(
            "vocabulary.template",
            "warning",
            "teacher and student have different chat templates: the teacher scores texts in the student's",
            "Use the teacher's template for the student, if the student was not trained with its own.",
        )


def same_tokenization(
    student: PreTrainedTokenizerBase, teacher: PreTrainedTokenizerBase, pairs: list[Pair], name: str
) -> Iterator[Finding]:
    """Report texts that two tokenizers with the same ids split into different tokens."""
    rows = pairs[:SAMPLE]
    if not rows:
        return
    try:
        whole = encode_untruncated([pair.columns for pair in rows], student)
        rendered = [(pair, texts[1]) for pair, (texts, _) in zip(rows, whole, strict=True) if texts]
    except UserError:
        return  # the student's tokenizer cannot encode them; that is another finding
    student_ids, teacher_ids = (
        tokenizer([text for _, text in rendered], add_special_tokens=False)["input_ids"]
        for tokenizer in (student, teacher)
    )
    different = [pair for (pair, _), a, b in zip(rendered, student_ids, teacher_ids, strict=True) if a != b]
    if different:
        yield Finding(
            "vocabulary.reading",
            "warning",
            "the two tokenizers have the same ids, but split a text into different tokens",
            "Use the same tokenizer files for both; the teacher scores the student's tokens.",
            len(different),
            len(rendered),
            tuple(pair.row for pair in different[:FIRST_ROWS]),
            f"row {different[0].row}: {excerpt(different[0].texts['chosen'])}",
            name,
        )


def same_as_file(
    role: str, tokenizer: PreTrainedTokenizerBase, file: Path | None, texts: Sequence[str]
) -> Iterator[Finding]:
    """Report texts that a tokenizer splits otherwise than `tokenizer.json`, which servers read.

    AutoTokenizer builds some classes anew, with rules of their own.
    """
    if file is None:
        return
    from tokenizers import Tokenizer

    try:
        stored = Tokenizer.from_file(str(file))
    except Exception:  # tokenizers raises nothing more specific; that it cannot be read is not this check's
        return
    stored.no_truncation()
    stored.no_padding()
    probes = [*PROBES, *texts]
    encoded = stored.encode_batch(probes, add_special_tokens=False)
    loaded = tokenizer(probes, add_special_tokens=False)["input_ids"]
    unlike = [text for text, a, b in zip(probes, encoded, loaded, strict=True) if a.ids != b]
    if unlike:
        yield Finding(
            "vocabulary.unlike-file",
            "warning",
            f"the {role}'s tokenizer, as AutoTokenizer loads it, splits {len(unlike)} of {len(probes)} texts otherwise "
            "than its tokenizer.json does",
            "Compare both with the tokenizer the model was trained with, and save that one beside the model again; "
            "servers such as vLLM and llama.cpp read the file.",
            len(unlike),
            len(probes),
            example=excerpt(unlike[0]),
        )


def embedding_rows(role: str, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> Iterator[Finding]:
    """Report token ids without an embedding row, and rows without a token."""
    rows, top = vocabulary_rows(model), max(tokenizer.get_vocab().values()) + 1
    if top > rows:
        yield Finding(
            "vocabulary.rows-missing",
            "error",
            f"the {role} has {rows:,} embedding rows, but its tokenizer has ids up to {top - 1:,}",
            "Use the tokenizer it was trained with, or resize its embeddings (model.resize_token_embeddings).",
            top - rows,
            top,
        )
    elif rows > top:
        yield Finding(
            "vocabulary.rows-padded",
            "note",
            f"{rows - top:,} of the {role}'s {rows:,} embedding rows have no token; they are trimmed",
            "Nothing to do.",
            rows - top,
            rows,
        )


def adapted_head(where: str, training: Training, model: PreTrainedModel) -> Iterator[Finding]:
    """Report an adapter on the head or the embeddings."""
    config = adapter_config(training)
    if config is None or config.target_modules == "all-linear":  # PEFT leaves the head out of these
        return
    from peft.tuners.tuners_utils import check_target_module_exists

    tables = (model.get_input_embeddings(), model.get_output_embeddings())
    names = [n for n, module in model.named_modules() if module in tables and check_target_module_exists(config, n)]
    if names:
        tied = getattr(model.config.get_text_config(), "tie_word_embeddings", False)
        yield Finding(
            "recipe.lora-head",
            "warning",
            f"{where}: the adapter is on {' and '.join(names)}, a row for every token"
            + (
                "; the model ties head and embeddings, which the merged model has apart, as a larger file"
                if tied
                else ""
            ),
            "Leave it out of lora.target_modules: the adapters of the layers move the logits too, and servers such as "
            "vLLM refuse an adapter on the head.",
        )


def positions(role: str, model: PreTrainedModel, longest: int) -> Iterator[Finding]:
    """Report texts that are longer than the model's positions."""
    limit: Any = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    if isinstance(limit, int) and longest > limit:
        yield Finding(
            "model.positions",
            "error",
            f"the {role} has {limit:,} positions, but texts have up to {longest:,} tokens after truncation",
            f"Give --max-length {limit} (data.max_length in a recipe), or another model.",
        )
